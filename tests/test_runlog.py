"""What a run printed is read back, also across resumes."""

import json
from pathlib import Path

import pytest

from megatron_cp import runlog
from megatron_cp.plots.loss import draw_loss
from megatron_cp.runlog import Iteration

LINE = (
    " [2026-11-20 15:08:08.136387] iteration       12/     100 | consumed samples:          192 | elapsed time per "
    "iteration (ms): 2004.8 | throughput per GPU (TFLOP/s/GPU): 0.1 | learning rate: 3.000000E-04 | global batch size: "
    "   16 | lm loss: 5.698099E+00 | loss scale: 1.0 | grad norm: 14.380 | number of skipped iterations:   0 | "
)


def step(number: int, loss: float = 1.0, time: float = 100.0) -> Iteration:
    return Iteration(number, 10, {"lm loss": loss, "elapsed time per iteration (ms)": time, "global batch size": 4.0})


def test_an_iteration_line_gives_all_its_numbers() -> None:
    found = runlog.read_iteration(LINE)
    assert found is not None
    assert (found.number, found.of, found.loss) == (12, 100, 5.698099)
    assert found.fields["elapsed time per iteration (ms)"] == 2004.8
    assert found.fields["global batch size"] == 16


@pytest.mark.parametrize("line", ["", "iteration 3", "saving checkpoint at iteration      50 to runs", "lm loss: 3 | "])
def test_other_lines_are_no_iterations(line: str) -> None:
    assert runlog.read_iteration(line) is None


def test_a_loss_that_is_not_a_number_is_read_as_such() -> None:
    found = runlog.read_iteration(" iteration 1/ 2 | lm loss: nan | ")
    assert found is not None
    assert found.loss != found.loss


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (" validation loss at iteration 20 | lm loss value: 2.5E+00 | lm loss PPL: 1.2E+01 | ", "validation loss"),
        (" validation-code loss at iteration 20 | lm loss value: 2.5 | lm loss PPL: 12 | ", "validation-code loss"),
        (" validation loss at iteration 20 on test set | lm loss value: 2.5 | ", "test loss"),
        (" validation loss at iteration 20 on validation set | lm loss value: 2.5 | ", "validation loss"),
        (" validation loss at iteration 20 | other value: 2.5 | ", None),
        (LINE, None),
    ],
)
def test_a_line_of_an_evaluation_gives_its_loss(line: str, found: str | None) -> None:
    assert runlog.read_evaluation(line) == (found and (20, {found: 2.5}))
    if found:
        assert runlog.read_iteration(line) is None


def test_the_starts_of_a_run_are_read_back(tmp_path: Path) -> None:
    assert runlog.starts(tmp_path) == []
    runlog.note_start(tmp_path, {"recipe": "one"})
    runlog.note_start(tmp_path, {"recipe": "two"})
    with (tmp_path / runlog.STARTS_NAME).open("a") as file:
        file.write('[1]\n{"rec')
    assert runlog.starts(tmp_path) == [{"recipe": "one"}, {"recipe": "two"}]


def test_the_trainers_summary_is_read() -> None:
    said = {"backend": "zigzag", "cp_bytes_per_step": 12}
    assert runlog.read_summary(f"[megatron-cp] summary {json.dumps(said)}\n") == said
    assert runlog.read_summary("[megatron-cp] summary of things") is None
    assert runlog.read_summary("[1,2]") is None


def test_what_a_resumed_run_repeats_counts_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for entry in (step(1, 5.0), step(2, 4.0), step(3, 3.0), step(3, 3.5), step(4, 2.0)):
        runlog.append(log, entry)
    with log.open("a") as file:
        file.write('{"iteration": 5, "of"')
    assert [(entry.number, entry.loss) for entry in runlog.read(log)] == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.0)]


def test_a_run_without_a_log_has_no_iterations(tmp_path: Path) -> None:
    assert runlog.read(tmp_path / "log") == []


def test_the_first_iteration_does_not_count_for_the_pace() -> None:
    pace = runlog.pace([step(1, time=9000), step(2, time=100), step(3, time=300), step(4, time=200)], 512)
    assert pace == (200, pytest.approx(4 * 512 / 0.2))
    assert runlog.pace([], 512) is None


@pytest.mark.parametrize(("content", "number"), [("50", 50), ("release", None), (None, None)])
def test_the_newest_checkpoint_is_the_one_in_megatrons_tracker(
    tmp_path: Path, content: str | None, number: int | None
) -> None:
    if content is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    assert runlog.checkpoint_iteration(tmp_path) == number


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    picture = draw_loss([step(1, 5.0), step(2, 4.0)], tmp_path / "loss.png", "run")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_loss_there_is_no_picture(tmp_path: Path) -> None:
    assert draw_loss([Iteration(1, 2, {})], tmp_path / "loss.png", "run") is None
    assert not (tmp_path / "loss.png").exists()
