"""The real pretrain() with experts that several ranks share (expert tensor parallelism) gives what one rank gives."""

import pytest

from tests.megatron.experts.test_parity import (
    DISTRIBUTED,
    EP2,
    GROUPED,
    OVERLAPPED,
    PP2,
    TP2,
    assert_equal,
    run,
)

ETP2 = "--expert-tensor-parallel-size 2"
DEEP = "--num-layers 4 --global-batch-size 8"
LONGER = "--global-batch-size 8 --train-iters 8"
WEIGHTS = "--moe-gather weights"
SWITCHING = "--moe-gather auto --moe-tuning steps"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

STEPS, LAYERS = 4, 2
# elements of an expert: a gated linear and one back
EXPERT = 3 * 32 * 48


@pytest.fixture(scope="module")
def alone():
    """Runs on one rank by their flags, each made once."""
    runs = {}

    def made(flags=""):
        if flags not in runs:
            runs[flags] = run(1, flags)[0].log
        return runs[flags]

    return made


# ranks, flags, and those of the run on one rank
STOCK = {
    "EP 2 x ETP 2, TP 2": (4, f"{TP2} {EP2} {ETP2} {OVERLAPPED}"),
    "ETP 2, TP 2, experts at once": (2, f"{TP2} {ETP2} {GROUPED}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STOCK)
def test_shared_experts_with_megatrons_dispatcher_train_as_on_one_rank(alone, case):
    ranks, flags = STOCK[case]
    found = run(ranks, flags)
    assert_equal(found[0].log, alone())
    assert {kind for each in found for kind in each.experts} == {"GroupedMLP" if GROUPED in flags else "SequentialMLP"}


# ranks, flags, those of the run on one rank, experts of a rank, microbatches and layers of a rank
GATHERED = {
    "EP 2 x ETP 2, TP 2, overlapped": (4, f"{TP2} {EP2} {ETP2} {OVERLAPPED}", "", 4, 1, 2),
    "EP 2 x ETP 2 in pieces, experts at once": (
        4,
        f"{EP2} {ETP2} {GROUPED} --moe-pieces 2 --micro-batch-size 1",
        "--micro-batch-size 1",
        4,
        1,
        2,
    ),
    "ETP 2, TP 2, experts at once, full recompute": (2, f"{TP2} {ETP2} {GROUPED} {RECOMPUTED}", "", 8, 2, 2),
    "ETP 2, TP 2, PP 2 zb-h1, distributed optimizer": (
        4,
        f"{PP2} {TP2} {ETP2} {GROUPED} --use-distributed-optimizer",
        DEEP,
        8,
        4,
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GATHERED)
def test_shared_experts_whose_weights_are_gathered_train_as_on_one_rank(alone, case):
    ranks, flags, alike, experts, microbatches, layers = GATHERED[case]
    found = run(ranks, flags, WEIGHTS)
    assert_equal(found[0].log, alone(alike))
    # weights once in a step, gradients after each microbatch, of half of each expert to the other rank
    there, home = STEPS * layers, STEPS * layers * microbatches
    size = 4 * experts * EXPERT // 2
    assert {each.gathered for each in found} == {(there, home, (there + home) * size)}
    lines = {line for each in found for line in each.banner if "exchange" in line}
    (line,) = lines
    assert line.endswith(f"weights of {experts} experts are gathered from 2 ranks, and tokens stay")


# ranks, flags, the ways that have two steps each, and gathers and scatters of weights of a rank
CHOSEN = {
    "tokens or weights": (
        4,
        f"{TP2} {EP2} {ETP2} {GROUPED} {DISTRIBUTED} {SWITCHING}",
        {"alltoall", "alltoall with weights gathered"},
        (2 * LAYERS, 2 * LAYERS),
    ),
    "whole or in pieces": (
        2,
        f"{EP2} --moe-comm-type tutel --moe-degrees 1,2 --moe-tuning steps",
        {"alltoall", "pipelined in 2 pieces"},
        (0, 0),
    ),
    "one hop or two, whole or in pieces": (
        4,
        "--expert-model-parallel-size 4 --moe-ranks-per-node 2 --moe-comm-type tutel --moe-degrees 1,2 "
        f"--moe-tuning steps {LONGER}",
        {"alltoall", "two-hop", "pipelined in 2 pieces", "two-hop in 2 pieces"},
        (0, 0),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOSEN)
def test_the_choice_changes_between_steps(alone, case):
    ranks, flags, ways, gathered = CHOSEN[case]
    found = run(ranks, flags)
    assert_equal(found[0].log, alone(LONGER if LONGER in flags else ""))
    (chosen,) = {each.chosen for each in found}
    assert set(chosen) == ways
    assert {chosen.count(way) for way in ways} == {2}
    assert {each.gathered[:2] for each in found} == {gathered}


@pytest.mark.slow
def test_a_checkpoint_moves_between_what_is_gathered(alone, tmp_path):
    length = "--lr-decay-iters 4"
    save = f"--train-iters 2 {length} --save {tmp_path} --save-interval 2"
    load = f"{length} --load {tmp_path} --use-checkpoint-opt-param-scheduler"
    first = run(2, f"{TP2} {ETP2} {DISTRIBUTED} {WEIGHTS}", save)[0]
    second = run(2, f"{TP2} {ETP2} {DISTRIBUTED}", load)[0]
    assert (first.gathered[0] > 0, second.gathered[0]) == (True, 0)
    assert_equal([*first.log, *second.log], alone())
