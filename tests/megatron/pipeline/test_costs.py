"""`auto` in training: its table comes from costs, given or measured, and never changes what is trained."""

import json
from pathlib import Path

import pytest

from megatron_cp.megatron.pipeline.costs import FILE_NAME
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs_file import CostsFile, Model, StageCosts, of_stages, read, write
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.profile import lower_split
from megatron_cp.pipeline.simulate import simulate
from tests.megatron.pipeline import test_v_placement
from tests.megatron.pipeline.test_schedules import CHUNKS, MODEL, TWO, assert_bit_equal, refusal, run, trained
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks, run_ranks_with_log

AUTO = (TWO, "--pp-schedule auto")
SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "seq_length": 32,
    "micro_batch_size": 2,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 1,
}
# the second stage is the slower one, and its forward the longest
COSTS = {"model": SIZES, "T_F": [1, 3], "T_I": [2, 2], "T_W": [1, 0.5], "T_comm": 0.25, "M_B": [4, 6], "M_W": [2, 3]}


def costs_file(folder: Path, **changed: object) -> str:
    """A file of COSTS with these entries changed; those that are None are left out."""
    file = folder / "costs.json"
    file.write_text(json.dumps({key: value for key, value in (COSTS | changed).items() if value is not None}))
    return str(file)


def ours(log: str) -> str:
    return "\n".join(line for line in log.splitlines() if line.startswith("[megatron-cp]"))


def run_and_say(*flags: str):
    ranks, said = run_ranks_with_log(2, trained, tiny(MODEL, *flags))
    log = next(log for log, _ in ranks if log[0]["loss"] is not None)
    return (log, [parameters for _, parameters in ranks]), ours(said)


@pytest.mark.slow
def test_a_schedule_for_measured_costs_trains_as_interleaved_and_is_made_again_from_their_file(tmp_path):
    steps = (CHUNKS, "--overlap-grad-reduce --train-iters 4")
    found, said = run_and_say(*AUTO, *steps, f"--pp-profile-steps 2 --save {tmp_path} --save-interval 100")
    assert_bit_equal(found, run(2, TWO, *steps))
    # what ran first, what was seen, what runs now
    before, seen, after, gain = (said.index(text) for text in ("equal F", "per stage, in ms", "from 2 meas", "resched"))
    assert before < seen < after < gain
    measured = read(tmp_path / FILE_NAME)
    sizes = SIZES | {"virtual_pipeline_model_parallel_size": 2}
    assert {name: getattr(measured.model, name) for name in SIZES} == sizes
    assert said.count(f"T_comm {measured.T_comm:.4g}") == 1
    # of the link to the host, though nothing moves here
    assert said.count(f"T_move {measured.T_move:.4g}") == 1
    # the last stage has the head beside its layers
    assert measured.M_B[3] > measured.M_B[1] > 0
    assert all(0 < held < kept for held, kept in zip(measured.M_W, measured.M_B, strict=True))
    again, said_again = run_and_say(*AUTO, *steps, f"--pp-costs {tmp_path / FILE_NAME}")
    assert_bit_equal(found, again)
    predicted = said.split("from 2 measured steps: ")[1].splitlines()[0]
    assert predicted in said_again


def test_costs_of_a_file_are_what_is_scheduled_for(tmp_path):
    file = costs_file(tmp_path)
    _, said = run_and_say(*AUTO, f"--train-iters 1 --pp-costs {file} --pp-memory-limit 1.5")
    # an M_B is what the fullest rank keeps of one microbatch: 6 MiB of the second stage
    assert "M_B of 6 MiB" in said
    costs = read(Path(file)).costs(loop(2))
    expected = simulate(build("auto", 2, 4, 1, costs=costs, caps=[1.5, 1.5]), costs)
    assert f"predicted from {file}: makespan {expected.makespan:.5g} ms, bubble {expected.bubble:.4f}" in said
    free = simulate(build("auto", 2, 4, 1, costs=costs), costs)
    assert max(expected.peak) <= 1.5 < max(free.peak)


@pytest.mark.slow
def test_auto_weighs_moves_by_the_time_of_a_file_and_trains_as_without(tmp_path):
    steps, limits = "--train-iters 2", "--pp-memory-limit 2.5 --pp-offload auto"
    costs = {key: [1, 1] for key in ("T_F", "T_I", "T_W")} | {"M_B": [6, 6], "M_W": [3, 3], "T_move": 0.5}
    found, said = run_and_say(*AUTO, steps, f"--pp-costs {costs_file(tmp_path, **costs)} {limits}")
    assert_bit_equal(found, run(2, TWO, steps))
    known = read(tmp_path / "costs.json").costs(loop(2))
    moved = simulate(build("auto", 2, 4, 1, costs=known, caps=[2.5, 2.5], moves=Offload(None)), known)
    plain = simulate(build("auto", 2, 4, 1, costs=known, caps=[2.5, 2.5]), known)
    assert moved.makespan < plain.makespan
    assert (
        f"moving M_B takes {0.5:.3g} T_F, makespan {moved.makespan:.5g} ms at 2.5 M_B with moves, "
        f"{plain.makespan:.5g} ms at 2 M_B without"
    ) in said
    assert "T_move) is not known" not in said


def test_a_file_without_the_time_of_a_move_is_named(tmp_path):
    file = costs_file(tmp_path)
    _, said = run_and_say(*AUTO, f"--train-iters 1 --pp-costs {file} --pp-memory-limit 1.5 --pp-offload auto")
    assert f"the time of a move (T_move) is not known from {file} and counts as 0; --pp-profile-steps" in said


def test_auto_on_the_v_trains_as_interleaved(tmp_path):
    stages = {"T_F": [1, 1, 1, 2], "T_I": [1] * 4, "T_W": [1] * 4, "M_B": [1] * 4, "M_W": None}
    file = costs_file(tmp_path, **stages, model=SIZES | {"virtual_pipeline_model_parallel_size": 2})
    flags = (TWO, test_v_placement.UNCLIPPED)
    found = test_v_placement.run(2, *flags, f"--pp-schedule auto --pp-placement v --pp-costs {file}")
    test_v_placement.assert_bit_equal(found, test_v_placement.run(2, *flags, CHUNKS))


def test_stages_are_measured_by_their_slowest_rank():
    from megatron_cp.comm import in_process
    from megatron_cp.pipeline.profile import agree

    def body(fabric):
        import torch

        # two pipelines of two ranks: ranks 0 and 2 hold stage 0
        times = StageCosts(1.0 + fabric.rank, 2.0, 3.0, 40.0, 20.0 - fabric.rank)
        return agree(fabric, torch.device("cpu"), {fabric.rank % 2: times}, 2, 0.5 * fabric.rank)

    expected = ([StageCosts(3.0, 2.0, 3.0, 40.0, 20.0), StageCosts(4.0, 2.0, 3.0, 40.0, 19.0)], 1.5, 0.0)
    assert in_process(4, body) == [expected] * 4


def test_while_measuring_every_backward_is_in_two_halves():
    for name in ("1f1b", "zb-h1"):
        table = lower_split(build(name, 4, 6)).table
        kinds = [[action.kind for action in actions] for actions in table]
        assert all(line.count("I") == line.count("W") == line.count("F") == 6 and "B" not in line for line in kinds)


def test_a_file_gives_back_what_was_written(tmp_path):
    stages = [StageCosts(1 / 3, 0.2, 0.1, 2**20, 2**19), StageCosts(0.7, 0.2, 0.1, 2**21, 1e6)]
    costs = of_stages(Model(**SIZES), stages, 1e-5)
    write(tmp_path / "costs.yaml", costs, 3)
    assert read(tmp_path / "costs.yaml") == costs
    assert costs.costs(loop(2)).forward == (1e3 / 3, 700.0)
    assert costs.costs(loop(2)).unit == 2.0


WRONG_FILES = {
    "negative": ({"T_F": [1, -1]}, "T_F.1 must be greater than 0, got -1"),
    "zero": ({"T_W": [0, 1]}, "T_W.0 must be greater than 0, got 0"),
    "no number": ({"T_I": [1, "x"]}, "T_I.1 must be a valid number"),
    "missing": ({"T_I": None}, "T_I is missing"),
    "unknown": ({"T_Comm": 1}, "unknown entry T_Comm; did you mean 'T_comm'?"),
    "memory": ({"M_W": [5, 1]}, "memory needs 0 <= M_W <= M_B"),
    "stages": ({"T_F": [1, 1, 1]}, "T_F is of 3 stages, the run has 2"),
    "another model": ({"model": SIZES | {"hidden_size": 64}}, "holds for hidden_size = 64, got 32"),
    "another cut": (
        {"model": SIZES | {"tensor_model_parallel_size": 2}},
        "holds for tensor_model_parallel_size = 2, got 1; measure again",
    ),
}
WRONG_FLAGS = {
    "neither": ("--pp-schedule auto", "give one of --pp-costs FILE and --pp-profile-steps 10, got none"),
    "both": ("--pp-schedule auto --pp-costs x --pp-profile-steps 2", "got both"),
    "no file": ("--pp-schedule auto --pp-costs no-such-file", "no-such-file: No such file"),
    "costs of a rule": ("--pp-schedule zb-h1 --pp-costs x", "--pp-costs x needs --pp-schedule auto, got zb-h1"),
    "costs alone": ("--pp-costs x", "--pp-costs x needs --pp-schedule auto, got none"),
    "profile of a rule": ("--pp-schedule zb-h1 --pp-profile-steps 3", "needs --pp-schedule auto, got zb-h1"),
    "placement of a rule": ("--pp-schedule zb-h1 --pp-placement v", "--pp-placement v needs --pp-schedule auto"),
    "no placement": ("--pp-schedule auto --pp-profile-steps 2 --pp-placement w", "unknown --pp-placement 'w'"),
    "no steps": ("--pp-schedule auto --pp-profile-steps 0", "must be 2 or more, the first step only warms up, got 0"),
    "limit alone": ("--pp-memory-limit 2", "--pp-memory-limit 2 needs --pp-schedule"),
    "no limit": ("--pp-schedule zb-h1 --pp-memory-limit 0", "is a positive number of M_B, got 0"),
    "low limit": ("--pp-schedule auto --pp-profile-steps 2 --pp-memory-limit 0.5", "0.5 is below the minimum 1 M_B"),
    "rule's limit": ("--pp-schedule zb-h1 --pp-memory-limit 1", "a cap of 1 M_B is below the minimum 2 M_B of zb-h1"),
}


def test_costs_that_do_not_fit_are_refused_in_one_line_on_every_rank(tmp_path):
    asked = {name: f"{TWO} {flags}" for name, (flags, _) in WRONG_FLAGS.items()}
    for name, (changed, _) in WRONG_FILES.items():
        (folder := tmp_path / name.replace(" ", "-")).mkdir()
        asked[name] = f"{TWO} --pp-schedule auto --pp-costs {costs_file(folder, **changed)}"
    expected = {name: text for name, (_, text) in (WRONG_FLAGS | WRONG_FILES).items()}
    for rank, lines in enumerate(run_ranks(2, refusal, {name: tiny(MODEL, flags) for name, flags in asked.items()})):
        for name, text in expected.items():
            assert lines[name].startswith(f"[megatron-cp] rank {rank}: "), name
            assert text in lines[name], name
            assert "\n" not in lines[name], name


def test_unreadable_files_are_said_in_one_line(tmp_path):
    for content in ("a: [", "- 1", ""):
        (file := tmp_path / "costs.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"costs\.yaml(:\d+)?: (not YAML|costs are a mapping)") as refused:
            read(file)
        assert "\n" not in str(refused.value)


def test_what_a_hand_written_file_leaves_out_is_not_compared():
    costs = CostsFile(**COSTS | {"M_W": None})
    assert costs.model.difference(Model(**SIZES, num_experts=8)) is None
    assert Model(**SIZES, num_experts=8).difference(costs.model) == "num_experts"
    assert costs.costs(loop(2)).held == costs.costs(loop(2)).kept
