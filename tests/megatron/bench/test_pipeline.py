"""The pipeline bench measures what ran: memory is the simulator's, reductions start where the table says."""

import contextlib
import io
import json
import time
from collections import defaultdict
from itertools import accumulate

import pytest
import torch
from typer.testing import CliRunner

from megatron_cp.bench.activations import changes
from megatron_cp.bench.pipeline import ActionRecorder, GptSize, MeasuredSchedule, Pairs, TimedAction
from megatron_cp.cli import app
from megatron_cp.comm import GroupFabric
from megatron_cp.megatron.bench import pipeline as megatron_pipeline
from megatron_cp.megatron.bench.pipeline import BASELINES, ScheduleComparison, ScheduleGroup, pairs
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.passes import merge
from megatron_cp.pipeline.simulate import simulate
from tests.ranks import RankError, run_ranks

LOOP = [rule for rule in SCHEDULES if rule.placement == "loop" and rule.table and not (rule.lends or rule.delay)]
# gradients of two copies are compared with those of one
ONE_CHUNK = ScheduleGroup(1, (*(rule.name for rule in LOOP if rule.chunks == 1), "chimera-zb"), (4,))
TWO_CHUNKS = ScheduleGroup(2, tuple(rule.name for rule in LOOP if rule.chunks is None), (4,))
# slices against Megatron's own, and moves against the same schedule without: one schedule each, and one pair of runs
SLICED = ScheduleGroup(1, ("1f1b",), (2,), slices=2)
MOVED = ScheduleGroup(1, ("dapple-b",), (3,), offload=2)
TINY = GptSize(ranks=2, layers=4, hidden=64, seq=128)


@contextlib.contextmanager
def comparison(group, overlap=False):
    from megatron_cp.megatron.bench.model import ModelChunks, pipeline_of

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    fabric = GroupFabric(torch.distributed.group.WORLD)
    with pipeline_of(TINY.ranks), contextlib.redirect_stdout(io.StringIO()):
        chunks = ModelChunks(TINY, group.v, overlap, sliceable=group.slices is not None)
        yield ScheduleComparison(fabric, torch.device("cpu"), chunks, group)


def timed(groups):
    found = {}
    for group in groups:
        with comparison(group) as running:
            for m in group.micros:
                running.check(m)
                running.time(m, 1)
            found |= running.taken
    return found


@pytest.fixture(scope="module")
def measured():
    """Every schedule on the loop and one of two copies, by name; one in slices, and one whose activations move."""
    groups = [ONE_CHUNK, TWO_CHUNKS, SLICED, MOVED]
    taken = run_ranks(2, timed, groups)
    *found, sliced, moved = pairs(groups, taken)
    return {pair.ours.schedule.name: pair for pair in found} | {"slices": sliced, "offload": moved}


@pytest.mark.parametrize("name", [*ONE_CHUNK.names, *TWO_CHUNKS.names])
def test_peak_of_live_activations_is_the_simulators(measured, name):
    ours = measured[name].ours
    assert tuple(ours.peak) == ours.run.peak
    for after in ours.live:
        by_kind = defaultdict(set)
        for action, change in changes(after):
            by_kind[action.stage, action.kind].add(change)
        # all microbatches keep and free the same, and nothing is left
        assert all(len(sizes) == 1 for sizes in by_kind.values())
        assert after[-1][1] == 0


@pytest.mark.parametrize("name", [name for name in ONE_CHUNK.names if not SCHEDULES.get(name).split])
def test_peak_of_whole_backwards_is_a_number_of_microbatches(measured, name):
    schedule = measured[name].ours.schedule
    assert measured[name].row().peak == list(simulate(schedule, uniform(schedule.placement, (1, 1, 1, 0))).peak)


def test_a_step_is_recorded_action_by_action(measured):
    for pair in (pair for pair in measured.values() if isinstance(pair, Pairs)):
        for actions, line in zip(merge(pair.ours.schedule).table, pair.ours.steps[0], strict=True):
            assert [timed.action for timed in line if timed.action.kind in "FBIW"] == list(actions)
        assert pair.row().baseline_step > 0


def test_slices_are_simulated_with_the_times_of_each(measured):
    ours = measured["slices"].ours
    assert ours.schedule.slices == 2
    assert set(ours.of_slices) == {(stage, kind, number) for stage in (0, 1) for kind in "FB" for number in (0, 1)}
    for line in merge(ours.schedule).table:
        for stage, kind, micro in line:
            assert ours.costs.time(Action(stage, kind, micro)) == ours.of_slices[stage, kind, micro % 2]
    row = measured["slices"].row()
    assert (row.micros, row.slices) == (2, 2)
    # a step with one pair's medians is no faster than the busiest rank's work
    assert row.simulated >= 2 * max(row.times["0F"] + row.times["0B"], row.times["1F"] + row.times["1B"]) * (1 - 1e-9)


def test_moves_are_compared_with_the_same_schedule_without(measured):
    pair, row = measured["offload"], measured["offload"].row()
    kinds = [[timed.action.kind for line in step for timed in line] for step in (*pair.steps, *pair.baseline_steps)]
    assert [("EVICT" in each, "LOAD" in each) for each in kinds] == [(True, True), (False, False)]
    assert row.moved > 0
    assert row.copies > 0
    assert row.ratios == [pytest.approx(row.step / row.baseline_step)]


def with_a_wrong_gradient(group):
    def wrong(call):
        def step(*args, **kwargs):
            losses = call(*args, **kwargs)
            kwargs["model"][0].buffers[0].grad_data[0] += 1
            return losses

        return step

    done = replace("megatron_cp.megatron.pipeline.schedule:Pipeline.__call__", wrong)
    try:
        with comparison(group) as running:
            running.check(2)
    finally:
        restore(done)


def test_wrong_gradients_get_no_figures():
    with pytest.raises(RankError) as error:
        run_ranks(2, with_a_wrong_gradient, ScheduleGroup(1, ("1f1b",), (2,)))
    assert all("WrongResultError: losses or gradients of 1f1b" in text for text in error.value.errors.values())


def reductions(group):
    """This rank's recorded step, and when each group of gradients began to be reduced, by its chunk."""
    began = defaultdict(list)

    def noting(start):
        def noted(group, *args, **kwargs):
            began[id(group)].append(time.perf_counter() * 1e3)
            return start(group, *args, **kwargs)

        return noted

    name = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync"
    done = replace(name, noting)
    try:
        with comparison(group, overlap=True) as running:
            (m,) = group.micros
            running.check(m)
            began.clear()
            line = record(running, group.names[0], m)
            groups = [[began[id(group)] for group in chunk.bucket_groups] for chunk in running.chunks.model]
    finally:
        restore(done)
    return torch.distributed.get_rank(), line, groups


def record(running, name, m):
    recorder = ActionRecorder()
    running.observe = recorder.observe
    running.step(name, m)
    return recorder.take()


def test_a_chunk_is_reduced_right_after_its_last_weight_gradient():
    group = ScheduleGroup(2, ("izb",), (4,))
    for rank, line, groups in run_ranks(4, reductions, group):
        # two data-parallel copies of each pipeline rank
        stages = build(group.names[0], 2, 4, group.v).placement.of_rank[rank // 2]
        for stage, starts in zip(stages, groups, strict=True):
            last = max(place for place, timed in enumerate(line) if timed.action[:2] in [(stage, "W"), (stage, "B")])
            reduce = line[last + 1]
            assert reduce.action[:2] == (stage, "REDUCE")
            assert starts
            for times in starts:
                assert len(times) == 1
                assert reduce.start <= times[0] <= reduce.end
        # the other chunk still computes meanwhile
        kinds = [timed.action.kind for timed in line]
        assert {"B", "W"} & set(kinds[kinds.index("REDUCE") :])


def as_played(name, m, core_share=1.0, speedup=1.1):
    """Pairs whose steps ran as the simulator says, the baseline's slower."""
    schedule = build(name, 2, m)
    run = simulate(merge(schedule), uniform(schedule.placement, (50.0, 60.0, 40.0, 2.0)))

    def step(slower=1.0):
        return [
            [TimedAction(*bar, core_share) for bar in zip(actions, starts, [end * slower for end in ends], strict=True)]
            for actions, starts, ends in zip(run.schedule.table, run.starts, run.ends, strict=True)
        ]

    sizes = {"F": 8, "I": -2, "W": -6, "B": -8}
    live = [
        list(zip(actions, accumulate(sizes[action.kind] for action in actions), strict=True))
        for actions in run.schedule.table
    ]
    return Pairs(MeasuredSchedule(schedule, [step()] * 3, live), BASELINES[False], [step(speedup)] * 3, 1), run


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("rule", [rule for rule in LOOP if rule.chunks == 1], ids=lambda rule: rule.name)
def test_what_runs_as_simulated_has_a_ratio_of_one(rule, m):
    pair, run = as_played(rule.name, m)
    row = pair.row()
    assert row.step == pytest.approx(run.makespan)
    assert row.ratio == pytest.approx(1)
    assert row.T_comm == pytest.approx(2)
    assert row.speedups == pytest.approx([1.1] * 3)
    assert row.wins == 3


def shown(monkeypatch, pair, *words):
    monkeypatch.setattr(megatron_pipeline, "bench", lambda *args: [pair])
    result = CliRunner().invoke(app, ["bench", "pipeline", "--schedule", "zb-h1", "-m", "4", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_competing_load_is_said_instead_of_a_verdict(monkeypatch):
    loud = shown(monkeypatch, as_played("zb-h1", 4, core_share=0.6)[0])
    assert "No verdict: a rank got only 60% of its core" in loud
    assert "3 of 3" not in loud
    quiet = shown(monkeypatch, as_played("zb-h1", 4)[0])
    assert "No verdict" not in quiet
    assert "3 of 3" in quiet
    assert "110.0 and 120.0: it does not lose" in quiet
    (row,) = json.loads(shown(monkeypatch, as_played("zb-h1", 4, core_share=0.6)[0], "--json"))
    assert row["ratio"] is row["speedups"] is None


def test_a_step_is_drawn_over_its_simulation(monkeypatch, tmp_path):
    file = tmp_path / "step.json"
    shown(monkeypatch, as_played("zb-h1", 4)[0], "--plot", str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    simulated, recorded = ([event["ts"] for event in events if event["pid"] == source] for source in (0, 1))
    assert recorded == pytest.approx(simulated)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule", "zb-h3"], "did you mean 'zb-h"),
        (["--schedule", "zb-v"], "has no counterpart among Megatron's own schedules"),
        (["--schedule", "izb", "--layers", "6"], "6 layers cannot be divided evenly among 4 stages"),
        (["--schedule", "interleaved", "-m", "3", "--layers", "4"], "the nearest m that works is"),
        (["--plot", "step.png"], "--plot draws one schedule"),
        (["--plot", "step.gif"], "a timeline must be a .png"),
        (["--schedule", "chimera", "--slices", "2"], "takes a schedule of one copy of the model, got chimera"),
        (["--schedule", "breadth-first", "-m", "2", "--slices", "2"], "breadth-first has no order for 2 slices"),
        (["--schedule", "1f1b", "-m", "2", "--slices", "9", "--seq", "16"], "take at most 8 slices"),
        (["--slices", "2"], "measures one schedule, got zb-h1 and izb"),
        (["--schedule", "1f1b", "--offload", "1"], "its smallest limit is 2"),
        (["--schedule", "1f1b", "--offload", "2"], "a limit of 2 moves nothing"),
        (["--slices", "2", "--offload", "2"], "leave one out"),
        (["--slices", "2", "--overhead"], "--overhead measures the executor on one rank, got --slices 2"),
        (["--schedule", "gis", "--offload", "2", "--plot", "step.png"], "--plot draws a step over its simulation"),
    ],
)
def test_bad_input_is_refused(words, message):
    result = CliRunner().invoke(app, ["bench", "pipeline", *words])
    assert result.exit_code != 0
    assert message in str(result.exception)


def overhead():
    from megatron_cp.megatron.bench.overhead import measure

    torch.distributed.init_process_group("gloo")
    return measure(torch.device("cpu"), 3, 2, 64, 16, 2)


def test_the_executor_alone_computes_as_megatrons_loop_does():
    (found,) = run_ranks(1, overhead)
    assert len(found.ratios) == 2
    assert min(found.forward, found.backward, found.ours, found.baseline) > 0


def test_sizes_and_repeats_reach_the_bench(monkeypatch):
    asked = {}
    monkeypatch.setattr(megatron_pipeline, "bench", lambda *args: asked.update(bench=args) or [])
    words = "--schedule zb-h1 -m 4 --hidden 256 --rounds 2 --repeat 5 --json".split()
    result = CliRunner().invoke(app, ["bench", "pipeline", *words])
    assert result.exit_code == 0, result.output
    size, groups, *times = asked["bench"]
    assert (size.hidden, times) == (256, [2, 5])
    assert groups == [ScheduleGroup(1, ("zb-h1",), (4,))]


def test_the_overhead_of_the_executor_is_printed_in_percent(monkeypatch):
    from megatron_cp.megatron.bench.overhead import Overhead

    found = Overhead(2, 4, 1.0, 2.0, 12.3, 12.0, [1.02, 1.025, 1.03], 1.0)
    asked = []
    monkeypatch.setattr(megatron_pipeline, "overhead", lambda *sizes: asked.append(sizes) or found)
    result = CliRunner().invoke(app, "bench pipeline --overhead --hidden 64 --seq 16 --rounds 3 --repeat 2".split())
    assert result.exit_code == 0, result.output
    assert asked == [(2, 4, 64, 16, 6)]
    assert "overhead         2.50% (2.00% to 3.00% over 3 pairs)" in result.stdout
