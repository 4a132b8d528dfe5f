"""A table in a file is a schedule: simulated, checked and trained by --pp-schedule table:FILE."""

import re
from pathlib import Path

import pytest

from megatron_cp.pipeline import SCHEDULES, on_v
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.offload import Offload
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks


def written(folder: Path, text: str) -> str:
    file = folder / "mine.txt"
    file.write_text(text)
    return f"table:{file}"


def refusal(name: str, p: int, m: int, v: int | None = None) -> str:
    with pytest.raises(ValueError, match=re.escape("mine.txt")) as refused:
        build(name, p, m, v)
    return str(refused.value).partition("mine.txt")[2]


@pytest.mark.parametrize(("name", "p", "m", "v"), [("1f1b", 2, 4, 1), ("izb", 2, 4, 2), ("zb-v", 3, 6, 2)])
def test_the_table_of_a_rule_is_read_back(tmp_path: Path, name: str, p: int, m: int, v: int) -> None:
    schedule, rule = build(name, p, m, v), SCHEDULES.get(name)
    file = written(tmp_path, schedule.text())
    read = build(file, p, m)
    assert (read.placement, read.micros, read.table) == (schedule.placement, m, schedule.table)
    assert SCHEDULES.get(file).split == rule.split
    assert on_v(file) == on_v(name)


def test_a_table_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    for m in (2, 4):
        file = written(tmp_path, build("1f1b", 2, m).text())
        Path(file.partition(":")[2]).touch()
        assert build(file, 2, m).micros == m


def test_activations_move_under_a_limit(tmp_path: Path) -> None:
    file = written(tmp_path, build("dapple-b", 2, 6).text())
    assert build(file, 2, 6, moves=Offload(2, "host")).table == build("dapple-b", 2, 6, moves=Offload(2, "host")).table


def test_other_sizes_and_other_tables_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, build("1f1b", 2, 4).text())
    has = " is a table for p = 2, m = 4, v = 1, got"
    assert refusal(file, 2, 8).startswith(f"{has} p = 2, m = 8, v = 1")
    assert refusal(file, 4, 4).startswith(f"{has} p = 4, m = 4, v = 1")
    assert refusal(file, 2, 4, 2).startswith(" has v = 1, got v = 2; leave it out or take ")
    assert (
        refusal(written(tmp_path, ""), 2, 4)
        == ": mine has no action; write a line of actions for each rank, such as 0F0 0B0"
    )
    assert refusal(written(tmp_path, "0F0 0X0"), 1, 1).startswith(":")
    assert "number the microbatches 0, 1, 2" in refusal(written(tmp_path, "0F0 0B0 0F7 0B7\n1F0 1B0 1F7 1B7"), 2, 8)
    assert "place them around the ranks" in refusal(written(tmp_path, "1F0 1B0\n0F0 0B0"), 2, 1)
    moving = build("1f1b", 4, 8, moves=Offload(2, "host")).text()
    assert refusal(written(tmp_path, moving), 4, 8) == " moves activations by itself; leave the moves to --pp-offload"
    Path(file.partition(":")[2]).write_bytes(b"\xff\xfe")
    assert refusal(file, 2, 4) == " cannot be read: it is no text"
    Path(file.partition(":")[2]).unlink()
    assert refusal(file, 2, 4) == " cannot be read: No such file or directory"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "v"), [("zb-h1", 1), ("zb-v", 2)])
def test_megatron_trains_by_a_table(tmp_path: Path, name: str, v: int) -> None:
    def losses(schedule: str) -> list[float]:
        flags = f"--num-layers 4 --pipeline-model-parallel-size 2 --global-batch-size 8 --pp-schedule {schedule}"
        ranks = run_ranks(2, pretrain_losses, tiny(flags))
        return [(step["loss"], step["grad_norm"]) for step in ranks[-1]]

    assert losses(written(tmp_path, build(name, 2, 4, v).text())) == losses(name)


@pytest.mark.slow
def test_a_table_of_other_sizes_ends_the_run_in_one_line(tmp_path: Path) -> None:
    file = written(tmp_path, build("1f1b", 2, 8).text())
    flags = f"--pipeline-model-parallel-size 2 --global-batch-size 8 --pp-schedule {file}"
    with pytest.raises(Exception, match="is a table for p = 2, m = 8, v = 1, got p = 2, m = 4, v = 1"):
        run_ranks(2, pretrain_losses, tiny(flags))


def test_pairs_of_a_table_may_run_at_the_same_time(tmp_path: Path) -> None:
    paired, alone = (build("dualpipe-v", 2, 5, overlapped=overlapped) for overlapped in (True, False))
    assert build(written(tmp_path, paired.text()), 2, 5, 2, overlapped=True).table == paired.table
    (other := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="overlaps no forward with a backward; take dualpipe-v, dualpipe"):
        build(written(other, alone.text()), 2, 5, 2, overlapped=True)


def test_pairs_of_a_table_leave_no_place_for_a_vocabulary_over_all_ranks(tmp_path: Path) -> None:
    file = written(tmp_path, build("dualpipe-v", 2, 5, overlapped=True).text())
    with pytest.raises(ValueError, match=r"mine\.txt has pairs of F and B, beside which S and T .* have no place"):
        build(file, 2, 5, 2, barriers=1)
