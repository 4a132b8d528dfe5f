"""Activations that move during real pretraining: the same bits, and no more memory than the simulator says."""

from functools import cache

import pytest
import torch

from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.pipeline.action import MOVES
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.costs_file import read
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.saved import SavedActivations
from megatron_cp.pipeline.simulate import simulate
from tests.cases import slow_unless
from tests.megatron import pretraining
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks, run_ranks_with_log

MODEL = "--num-layers 8 --micro-batch-size 2 --global-batch-size 12 --train-iters 2"
MICROS = 6
TWO, FOUR = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def trained(flags):
    """Losses, parameters, and of the last step: the peak of saved bytes, the bytes that left, and a chunk's bytes."""
    made = []

    def noting(old):
        def saved_activations(*args):
            made.append(old(*args))
            return made[-1]

        return saved_activations

    done = replace("megatron_cp.megatron.pipeline.schedule:saved_activations", noting)
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        restore(done)
    (saved,) = made or [None]
    assert saved is None or isinstance(saved, SavedActivations)
    return log, dict(parameters), saved and (saved.peak, saved.moved, dict(saved.sizes))


def run(world_size, *flags):
    ranks = run_ranks(world_size, trained, tiny(MODEL, *flags))
    log = next(log for log, *_ in ranks if log[0]["loss"] is not None)
    return log, [parameters for _, parameters, _ in ranks], [saved for *_, saved in ranks]


@pytest.fixture(scope="module")
def without():
    """Runs of the same schedules without moves, each made once."""
    return cache(run)


def assert_bit_equal(found, expected):
    for step, other in zip(found[0], expected[0], strict=True):
        assert step == other
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert list(ours) == list(theirs)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_memory(saved, name, p, plan, v):
    """The measured peak of every stage's first rank is the simulator's, in chunks, times that rank's chunk."""
    schedule = build(name, p, MICROS, v, moves=plan)
    # a chunk counts from its forward to its backward: what waits for W is a linear's, not the graph's
    peaks = simulate(schedule, uniform(schedule.placement, (1.0, 1.0, 1.0, 0.0), (1.0, 0.0))).peak
    moved = 0
    for rank, (peak, left, sizes) in enumerate(saved):
        if not sizes:
            # nothing is recorded where nothing moves
            assert not any(action.kind in MOVES for action in schedule.table[rank])
            continue
        own = [sizes[stage] for stage in schedule.placement.of_rank[rank]]
        if rank < p - 1 and len(set(own)) == 1:
            assert peak == round(peaks[rank] * v) * own[0]
        # stages on one rank differ in size, and the loss is saved beside the last
        assert peak <= round(peaks[rank] * v) * max(own)
        moved += left
    assert moved > 0


HOST = {
    "1f1b with recomputation": (4, "", 2, 1, (RECOMPUTE,)),
    "dapple-b": (2, "", 2, 1, ()),
    "gis": (4, CHUNKS, 4, 2, ()),
    "gis on two ranks with everything": (
        2,
        CHUNKS,
        2,
        2,
        ("--context-parallel-size 2 --cp-comm-type zigzag --use-distributed-optimizer --bf16",),
    ),
    "zb-v": (2, "", 3, 2, ()),
    "interleaved with tensor parallelism": (
        2,
        CHUNKS,
        3,
        2,
        ("--tensor-model-parallel-size 2 --sequence-parallel --overlap-grad-reduce",),
    ),
    "izb with experts": (
        2,
        CHUNKS,
        3,
        2,
        ("--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall",),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOST)
def test_activations_on_the_host_change_no_bit(without, case):
    p, chunks, limit, v, flags = HOST[case]
    name = case.split()[0]
    world = p * (2 if any("parallel-size 2" in flag for flag in flags) else 1)
    flags = (f"--pipeline-model-parallel-size {p}", chunks, *flags, f"--pp-schedule {name}")
    found = run(world, *flags, f"--pp-offload {limit}")
    assert_bit_equal(found, without(world, *flags))
    if "experts" not in case:
        assert_memory(found[2][:: world // p], name, p, Offload(limit), v)


PEER = {
    "bpipe": (4, ()),
    "bpipe with recomputation": (4, (RECOMPUTE,)),
    "bpipe in bf16, distributed optimizer": (4, ("--bf16 --use-distributed-optimizer",)),
}


@pytest.mark.parametrize("case", slow_unless(["bpipe"], PEER))
def test_bpipe_trains_as_megatrons_own_1f1b(without, case):
    p, flags = PEER[case]
    found = run(p, FOUR, *flags, "--pp-schedule bpipe")
    assert_bit_equal(found, without(p, FOUR, *flags))
    # three microbatches on every rank: of its own, or of its own and its peer's
    peaks, moved, sizes = zip(*((peak, left, max(of.values())) for peak, left, of in found[2]), strict=True)
    table = build("bpipe", 4, MICROS).table
    lent = [
        left / sum(action.kind == "EVICT" for action in cells) for left, cells in zip(moved[:2], table, strict=False)
    ]
    assert list(peaks) == [3 * sizes[0], 3 * sizes[1], 2 * sizes[2] + lent[1], sizes[3] + 2 * lent[0]]
    assert moved[2:] == (0, 0)


@pytest.mark.slow
def test_a_chunk_lent_by_a_schedule_with_several_per_rank(without):
    flags = (FOUR, CHUNKS, "--pp-schedule interleaved")
    found = run(4, *flags, "--pp-offload 9 --pp-offload-to peer")
    assert_bit_equal(found, without(4, *flags))
    assert sum(left for _, left, _ in found[2]) > 0


@pytest.mark.slow
def test_bpipe_on_two_ranks_runs_and_says_that_it_gains_nothing(without):
    ranks, text = run_ranks_with_log(2, trained, tiny(MODEL, TWO, "--pp-schedule bpipe"))
    assert "nothing is gained: without them no rank keeps more than 2 chunks at once" in text
    log = next(log for log, *_ in ranks if log[0]["loss"] is not None)
    assert_bit_equal((log, [parameters for _, parameters, _ in ranks]), without(2, TWO))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peer"])
def test_limit_beside_measured_steps(without, to, tmp_path):
    steps = "--train-iters 4"
    found = run(
        4,
        FOUR,
        steps,
        f"--pp-schedule auto --pp-profile-steps 2 --pp-offload 3 --pp-offload-to {to}",
        f"--save {tmp_path} --save-interval 99",
    )
    assert_bit_equal(found, without(4, FOUR, steps))
    assert sum(left for _, left, _ in found[2]) > 0
    measured = read(tmp_path / "pipeline-costs.yaml")
    assert measured.T_move > 0
    assert all(size > 0.1 for size in measured.M_B)


@pytest.mark.slow
def test_limit_that_fits_the_memory_limit(without):
    flags = (TWO, CHUNKS, "--pp-schedule gis")
    found = run(2, *flags, "--pp-offload auto --pp-memory-limit 1.5")
    assert_bit_equal(found, without(2, *flags))
    assert sum(left for _, left, _ in found[2]) > 0
