"""`megatron-cp simulate`: figures, JSON, pictures, and one line for whatever cannot be."""

import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app

PROFILE = "29.718,29.444,19.927,0.527"


def ask(*words):
    result = CliRunner().invoke(app, ["simulate", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_of_a_rule():
    told = json.loads(ask(*f"--schedule zb-h1 -p 4 -m 6 --times {PROFILE} --memory 34,32 --json".split()))
    assert list(told) == ["makespan", "bubble", "span_bubble", "peak", "actions"]
    assert told["actions"][3] == "3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3F5 3I5 3W2 3W3 3W4 3W5".split()
    assert told["peak"] == pytest.approx([(4 - r) + r * 32 / 34 for r in range(4)])
    assert told["bubble"] == pytest.approx(1 - 6 * (29.718 + 29.444 + 19.927) / told["makespan"])


def test_figures_of_a_rule_in_words():
    told = ask(*f"--schedule izb -v 4 -p 8 -m 24 --times {PROFILE} --cap 8".split())
    assert "bubble       0.0482" in told
    assert "bubble 0.0363; gap 1.24%" in told
    assert "peak (M_B)   8 8 8 8 8 8 8 8" in told


def test_versions_of_weights_in_words_and_in_json():
    words = "--schedule pipedream -p 4 -m 2"
    told = ask(*words.split())
    assert "versions     3 2 2 1   of the weights, per rank" in told
    # a step that waits for the update, above the time without waiting
    assert "makespan     12.0000" in told
    assert "lower bound  6.0000" in told
    assert "free step    6.0000   where no rank waits for another one's update" in told
    found = json.loads(ask(*words.split(), "--json"))
    assert (found["versions"], found["free_step"]) == ([3, 2, 2, 1], 6)


@pytest.mark.parametrize(
    ("schedule", "makespan"), [("1f1b", 33.5), ("zb-v", 25.5)], ids=["two ranks hold it", "one rank holds both ends"]
)
def test_tied_embeddings_are_added_up_at_the_end(schedule, makespan):
    found = json.loads(ask(*f"--schedule {schedule} -p 4 -m 8 --tied-time 0.5 --json".split()))
    alone = json.loads(ask(*f"--schedule {schedule} -p 4 -m 8 --json".split()))
    assert found["makespan"] == makespan == alone["makespan"] + (0.5 if schedule == "1f1b" else 0)


def test_tied_rows_on_all_ranks_are_not_added_up():
    words = "--schedule interleaved -p 4 -m 8 --head 1 --vocab-parallel 1 --json".split()
    assert json.loads(ask(*words, "--tied-time", "50"))["makespan"] == json.loads(ask(*words))["makespan"]


def test_two_copies_of_the_model_in_words_and_in_json():
    words = "--schedule chimera-zb -p 4 -m 8 --sync-time 2"
    told = ask(*words.split())
    assert "copies       2 of the model; the makespan ends when their gradients are added up" in told
    assert "placement two-way" in told
    assert "transfers    48" in told
    found = json.loads(ask(*words.split(), "--json"))
    assert (found["copies"], found["makespan"]) == (2, 29)
    alone = json.loads(ask(*"--schedule chimera-zb -p 4 -m 8 --json".split()))
    assert (alone["makespan"], alone["actions"]) == (25, found["actions"])


def test_comparison_lists_every_schedule_and_why_one_is_missing():
    told = json.loads(ask(*"--compare all -p 4 -m 6 --cap 4 --json".split()))
    rows = {row["schedule"]: row for row in told}
    assert {"gpipe", "1f1b", "zb-h2", "izb", "zb-v", "dualpipe-v", "chimera", "auto (loop)", "auto (v)"} <= set(rows)
    assert rows["1f1b"]["makespan"] == 27
    assert "below the minimum 6 M_B of gpipe" in rows["gpipe"]["error"]
    assert "the nearest m that works is 7" in rows["dualpipe-v"]["error"]
    shown = ask(*"--compare all -p 4 -m 6 --cap 4".split())
    head = next(line for line in shown.splitlines() if line.startswith("schedule "))
    column = head.index(" v ")
    assert all(len(row.split()[0]) <= column for row in shown.splitlines())
    makespans = [
        float(row[column + 2 : head.index("makespan") + 8])
        for row in shown.splitlines()
        if re.match(rf"\S.{{{column - 1}}} [12] ", row)
    ]
    assert len(makespans) > 5
    assert makespans == sorted(makespans)
    assert shown.splitlines()[-1].startswith(("gpipe", "dapple", "zb-h2", "dualpipe", "auto"))
    assert f"{'gpipe':<{column}} a cap of 4 M_B is below the minimum 6 M_B" in shown
    assert f"{'1f1b':<{column}} 1      27.000   0.3333       0.3333   0.1429           4         36" in shown


def test_pairs_run_at_the_same_time_where_a_schedule_has_some():
    words = "--schedule dualpipe -p 8 -m 24"
    apart = json.loads(ask(*f"{words} --json".split()))
    runs = [json.loads(ask(*f"{words} --json --overlap {hidden}".split())) for hidden in (0, 0.5, 1)]
    assert [run["hidden"] for run in runs] == [0, 0.5, 1]
    assert "pairs" not in apart
    # a pair starts when both of its halves can
    assert [run["makespan"] for run in (apart, *runs)] == [75, 78, 69, 60]
    pairs = sum("+" in cell for cells in runs[0]["actions"] for cell in cells)
    assert [run["pairs"] for run in runs] == [pairs] * 3
    assert f"pairs        {pairs} of F and B; 0.5 of the shorter half is hidden" in ask(
        *f"{words} --overlap 0.5".split()
    )
    rows = {
        row["schedule"]: row
        for row in json.loads(ask(*"--compare 1f1b,dualpipe -p 8 -m 24 --overlap 1 --json".split()))
    }
    assert rows["dualpipe"]["makespan"] == runs[2]["makespan"]
    assert rows["1f1b"]["makespan"] == 93
    with pytest.raises(ValueError, match="zb-v overlaps no forward with a backward; take dualpipe-v, dualpipe"):
        ask(*"--schedule zb-v -p 4 -m 8 --overlap 1".split())
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        ask(*f"{words} --overlap 2".split())


def test_table_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n")
    assert "mine: p = 2, m = 2, v = 1, placement loop" in ask("--table", str(file), "--times", "1,1,1,0")
    with pytest.raises(ValueError, match="a --table has its own sizes; leave out -p, -m"):
        ask("--table", str(file), "-p", "3", "-m", "7")
    file.write_text("0F0 0F1 0B0 0B1\n1F1 1B1 1B0 1F0\n")
    with pytest.raises(ValueError, match="1B0: runs before its F") as caught:
        ask("--table", str(file))
    assert ">1B0<" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule 1f1b -p 4 -m 8 --times 1e308,1e308,1e308,0", "--times must be numbers of at most 1e.15"),
        ("--schedule 1f1b -p 4 -m 8 --memory inf,1", "--memory must be numbers"),
        ("--schedule 1f1b -p 2000 -m 8", "at most 512 ranks"),
        ("--compare all -p 4 -m 99999999", "200,000 passes"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_simulated(words, message):
    with pytest.raises(ValueError, match=message):
        ask(*words.split())


def test_a_microbatch_far_beyond_the_others_is_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("0F0 0F99999999999 0B0 0B99999999999\n")
    with pytest.raises(ValueError, match="microbatch 99999999999 among 2 forwards"):
        ask("--table", str(file))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture(tmp_path, suffix):
    file = tmp_path / f"step{suffix}"
    ask(*f"--schedule zb-v -p 4 -m 8 --times {PROFILE} --plot".split(), str(file))
    picture = file.read_bytes()
    assert picture.startswith(b"\x89PNG") or (picture.startswith(b"<?xml") and b"paler: a later chunk" in picture)


def test_trace_has_one_event_for_every_action(tmp_path):
    file = tmp_path / "step.json"
    told = json.loads(ask(*"--schedule zb-h2 -p 4 -m 8 --times 1,2,3,0.5 --json --plot".split(), str(file)))
    events = json.loads(file.read_text())["traceEvents"]
    ran = [event for event in events if event["ph"] == "X"]
    for rank, actions in enumerate(told["actions"]):
        mine = [event for event in ran if event["tid"] == rank]
        assert [event["name"] for event in mine] == actions
        assert all(early["ts"] + early["dur"] <= late["ts"] for early, late in pairwise(mine))
    assert max(event["ts"] + event["dur"] for event in ran) == pytest.approx(told["makespan"] * 1000)


def test_moves_of_activations_in_words_in_json_and_in_a_trace(tmp_path):
    file, sizes = tmp_path / "step.json", "--schedule 1f1b -p 8 -m 24 --pp-offload"
    told = ask(*f"{sizes} 2 --plot".split(), str(file))
    assert "peak (M_B)   2 2 2 2 2 2 2 1" in told
    assert "moves        154 of 192 chunks to the host and back, at most 2 stay on a rank" in told
    assert "moving M_B takes 1 T_F, makespan 93 at 2 M_B with moves, 93 at 8 M_B without" in told
    names = [event.get("cat") for event in json.loads(file.read_text())["traceEvents"] if event.get("tid", 0) >= 8]
    assert names.count("activations leave") == names.count("activations come back") == 154
    told = json.loads(ask(*f"{sizes} 5 --pp-offload-to peer --move-time 2 --json".split()))
    assert (told["makespan"], told["moved"], told["moved_to"]) == (105, 35, "peer")
    assert ask(*f"{sizes} 8".split()).endswith("without them no rank keeps more than 8 chunks at once\n")
    ask(*"--schedule 1f1b -p 4 -m 4 --pp-offload 2 --plot".split(), str(tmp_path / "step.svg"))
    assert b"activations leave" in (tmp_path / "step.svg").read_bytes()
    rows = json.loads(ask(*"--compare 1f1b,gis -p 4 -m 8 --pp-offload 3 --json".split()))
    assert [max(row["peak"]) for row in rows] == [3, 1.5]


def test_moves_in_a_table_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("0F0 0F1 0EVICT1 0B0 0LOAD1 0B1\n1F0 1B0 1F1 1B1\n")
    assert json.loads(ask("--table", str(file), "--json"))["moved"] == 1
    said = ask("--table", str(file))
    assert "1 of 4 chunks to the host" in said
    assert said.endswith(" M_B without\n")
    with pytest.raises(ValueError, match="moves activations by itself; leave --pp-offload out"):
        ask("--table", str(file), "--pp-offload", "2")


def test_recorded_times_are_drawn_below_the_simulated(tmp_path):
    from megatron_cp.pipeline.action import parse_action
    from megatron_cp.pipeline.simulate import Bar
    from megatron_cp.plots.timeline import draw_timeline

    simulated = [[Bar(parse_action("0F0"), 0, 1)], [Bar(parse_action("1F0"), 1, 2)]]
    recorded = [[Bar(parse_action("0F0"), 0, 1.5)], [Bar(parse_action("1F0"), 1.6, 2)]]
    events = json.loads(draw_timeline(simulated, tmp_path / "both.json", "both", recorded).read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert draw_timeline(simulated, tmp_path / "both.png", "both", recorded).stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--schedule zb-h1 -p 8 -m 24 --times 1,0,1,0", "times must be positive, got input time 0.0"),
        ("--schedule zb-h1 -p 8 -m 24 --times=-1,1,1,0", "times must be positive"),
        ("--schedule zb-h1 -p 8 -m 24 --times 1,1,1,-1", "time of a hop cannot be negative"),
        ("--schedule zb-h1 -p 8 -m 24 --times 1,1,nan,0", "times must be positive"),
        ("--schedule zb-h1 -p 8 -m 24 --times 1,1,1", "four numbers"),
        ("--schedule zb-h1 -p 8 -m 24 --times x", "--times must be numbers"),
        ("--schedule zb-h1 -p 8 -m 24 --memory 1,2", "0 <= M_W <= M_B"),
        ("--schedule zb-h1 -p 8 -m 24 --cap 7", "below the minimum 8 M_B of zb-h1"),
        ("--schedule auto -p 8 -m 24 --cap 0.5", "below the minimum 1 M_B"),
        ("--schedule auto -p 8 -m 24 --cap=-1", "--cap must be a positive number"),
        ("--schedule zb-h3 -p 8 -m 24", "did you mean"),
        ("--schedule zb-h1 -p 1 -m 24", "at least 2 ranks"),
        ("--schedule zb-h1 -p 8 -m 0", "at least one microbatch"),
        ("--schedule zb-h1 -p 8 -m 8 -v 2", "zb-h1 has v = 1, got v = 2"),
        ("--schedule zb-v -p 8 -m 8 -v 4", "zb-v has v = 2, got v = 4"),
        ("--schedule izb -p 8 -m 8 -v 0", "at least one chunk"),
        ("--schedule izb -p 4 -m 5 -v 3 --warmup 2", "the nearest m that works is 4"),
        ("--schedule izb -p 4 -m 5 --warmup 2.5", "between 1 and 2"),
        ("--schedule gis -p 4 -m 5 --warmup 2", "gis has no warm-up multiplier"),
        ("--schedule zb-v -p 4 -m 8 --placement loop", "zb-v is a rule of placement 'v'"),
        ("--schedule 1f1b -p 4 -m 8 --placement v", "1f1b is a rule of placement 'loop'"),
        ("--schedule auto -p 4 -m 8 --placement w", "unknown placement 'w'"),
        ("--schedule auto -p 4 -m 8 --objective speed", "unknown objective 'speed'"),
        ("--schedule 1f1b -p 4 -m 8 --plot step.txt", "a timeline must be a .png"),
        ("--compare all -p 4 -m 8 --plot step.png", "--plot draws one schedule"),
        ("--compare all -p 4 -m 8 --plot step.gif", "a timeline must be a .png"),
        ("--schedule 1f1b --compare all -p 4 -m 8", "give one of"),
        ("--schedule 1f1b -p 4", "-p and of microbatches -m"),
        ("--schedule 1f1b -p 4 -m 8 --pp-offload 1", "its smallest limit is 2"),
        ("--schedule 1f1b -p 4 -m 8 --pp-offload 2 --pp-offload-to peer", "its smallest limit is 3"),
        ("--schedule 1f1b -p 4 -m 8 --pp-offload 2 --pp-offload-to pier", "did you mean 'peer'"),
        ("--schedule 1f1b -p 4 -m 8 --pp-offload 2 --move-time=-1", "the time of a move cannot be negative"),
        ("--schedule 1f1b -p 4 -m 8 --pp-offload 2 --cap 1", "below the minimum 2 M_B of 1f1b"),
        ("--schedule 1f1b -p 4 -m 8 --pp-offload-to peer", "--pp-offload-to peer is about what --pp-offload N moves"),
        ("--schedule chimera -p 5 -m 8", "need an even number of ranks, got p = 5"),
        ("--schedule dualpipe -p 4 -m 9", "half of the microbatches go down the ranks and half go up, got m = 9"),
        ("--schedule chimera -p 4 -m 8 --sync-time=-1", "the time of a sync cannot be negative"),
        ("--schedule 1f1b -p 4 -m 8 --tied-time=-1", "the time of a sum of tied embeddings cannot be negative"),
        ("--schedule auto -p 4 -m 8 --placement two-way", "unknown placement 'two-way'"),
        ("--schedule bpipe -p 4 -m 8 --pp-offload 2", "bpipe has a limit of its own, 3 chunks"),
    ],
)
def test_what_cannot_be_is_refused(words, reason):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ask(*words.split())
    assert reason in str(caught.value).splitlines()[0]


def test_the_simulator_needs_no_torch():
    code = (
        "import sys, megatron_cp.pipeline.build, megatron_cp.cli.simulate, megatron_cp.plots.timeline;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'megatron', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_slices_of_a_sequence():
    told = json.loads(ask(*"--schedule zb-h1 -p 8 -m 24 --slices 8 --json".split()))
    assert told["makespan"] == pytest.approx(72.875)
    assert told["peak"] == [1.875] * 8
    assert told["slices"] == pytest.approx([1 / 8] * 8)
    told = ask(*"--schedule 1f1b -p 8 -m 24 --slices 4 --attention 0.5".split())
    assert "v = 1, placement loop, slices = 4" in told
    assert "slices       0.376 0.250 0.201 0.173   of a sequence" in told
    assert "bubble       0.0832" in told
    told = ask(*"--schedule 1f1b -p 8 -m 24 --slices 4 --attention 0.5 --slices-by length".split())
    assert "slices       0.250 0.250 0.250 0.250" in told


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--slices 0", "--slices is a number from 1 up, got 0"),
        ("--attention 0.5", "--attention 0.5 is about slices; give --slices too"),
        ("--slices-by length", "--slices-by length is about slices; give --slices too"),
        ("--slices 2 --slices-by weight", "unknown --slices-by 'weight'"),
        ("--slices 2 --attention 1.5", "lies between 0 and 1, got 1.5"),
        ("--slices 2 --attention 0.5 --times 1,1,1,0", "more than T_I = 1; give T_I of at least that"),
    ],
)
def test_slices_that_cannot_be(words, reason):
    with pytest.raises(ValueError, match=reason):
        ask(*f"--schedule 1f1b -p 4 -m 6 {words}".split())


def test_head_on_one_rank_and_over_all_of_them(tmp_path):
    sizes, file = "--schedule 1f1b -p 4 -m 24 --head 0.3", tmp_path / "step.json"
    assert "makespan     102.6000" in ask(*sizes.split())
    told = ask(*f"{sizes} --vocab-parallel 1 --plot".split(), str(file))
    assert "peak (M_B)   5 4 3 2" in told
    assert "LM head      0.1500 S, 0.0750 T on every rank   1 barrier in a microbatch" in told
    names = [event.get("cat") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("logits of a rank's vocabulary") == names.count("their weight gradients") == 4 * 24
    told = json.loads(ask(*f"{sizes} --pp-vocab-parallel 2 --json".split()))
    assert (told["barriers"], round(told["makespan"], 6), told["peak"]) == (2, 88.4, [6, 5, 4, 3])
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(map(" ".join, told["actions"])))
    assert json.loads(ask("--table", str(mine), "--head", "0.3", "--json"))["makespan"] == told["makespan"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule 1f1b -p 4 -m 8 --vocab-parallel 0", "number of barriers in a microbatch, 1 or 2, got 0"),
        ("--schedule chimera -p 4 -m 8 --vocab-parallel 1", "chimera has no place for a vocabulary over all ranks"),
        ("--table mine --vocab-parallel 1", "a --table has its own S and T; leave out --vocab-parallel"),
        ("--schedule 1f1b -p 4 -m 8 --head -1", "the time of the LM head cannot be negative, got -1"),
        ("--schedule 1f1b -p 4 -m 8 --head nan", "the time of the LM head cannot be negative, got nan"),
    ],
)
def test_heads_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ask(*words.split())
