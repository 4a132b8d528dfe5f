"""The check of a device writes one table whatever its steps do, and on a CPU it shows the rows that a GPU would."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The script's modules of steps and table, which its forked processes find on the path as it is here."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu_check import steps, table

    return SimpleNamespace(Step=steps.Step, LeftOut=steps.LeftOut, run=steps.run, Row=table.Row, Table=table.Table)


def good(device: str) -> Iterator[Any]:
    from gpu_check.table import Row

    yield Row("first", {"ms": 1.25, "calls": 3}, "ok")
    yield Row("on", {"": device})


def wrong(device: str) -> Iterator[Any]:
    from gpu_check.table import Row

    yield Row("before", {"": "kept"})
    raise ValueError("no such thing\nand a second line")


def without_package(device: str) -> Iterator[Any]:
    raise ModuleNotFoundError("No module named 'megatron'", name="megatron")


def left_out(device: str) -> Iterator[Any]:
    from gpu_check.steps import LeftOut

    raise LeftOut("needs a CUDA GPU: queues")


def dying(device: str) -> Iterator[Any]:
    os._exit(7)


def hanging(device: str) -> Iterator[Any]:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)
    yield


def variable(device: str) -> Iterator[Any]:
    from gpu_check.table import Row

    yield Row("CUDA_DEVICE_MAX_CONNECTIONS", {"": os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]})


def test_no_step_stops_the_next_and_every_row_is_kept(check: SimpleNamespace, tmp_path: Path) -> None:
    def step(rows: Callable[[str], Iterator[Any]], seconds: float = 60) -> Any:
        environment = (("CUDA_DEVICE_MAX_CONNECTIONS", "1"),) if rows is variable else ()
        return check.Step(rows.__name__, rows, seconds, environment)

    functions = [wrong, without_package, left_out, dying, variable, good]
    table = check.Table(tmp_path / "out", "a device; torch 0")
    check.run([step(hanging, 0.5), *map(step, functions)], "none", table, 120)
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    found = [(name, row.case, row.verdict, row.figures) for name, row in table.rows if row.case != "time"]
    assert found == [
        ("hanging", "", "failed", {"": "stopped after 0 s"}),
        ("wrong", "before", "", {"": "kept"}),
        ("wrong", "", "failed", {"": "ValueError: no such thing"}),
        ("without_package", "", "left out", {"": "needs the package megatron"}),
        ("left_out", "", "left out", {"": "needs a CUDA GPU: queues"}),
        ("dying", "", "failed", {"": "the process died, exit code 7"}),
        ("variable", "CUDA_DEVICE_MAX_CONNECTIONS", "", {"": "1"}),
        ("good", "first", "ok", {"ms": 1.25, "calls": 3}),
        ("good", "on", "", {"": "none"}),
    ]
    assert text.splitlines()[:3] == ["# a device; torch 0", "", "| step | case | found |"]
    assert "| good | first | ok, ms 1.25, calls 3 |" in text.splitlines()
    written = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert written["title"] == "a device; torch 0"
    assert [(row["step"], row["case"]) for row in written["rows"]] == [(name, row.case) for name, row in table.rows]
    assert table.broken == ["hanging: ", "wrong: ", "dying: "]


def test_steps_for_which_no_time_is_left_are_named(check: SimpleNamespace, tmp_path: Path) -> None:
    table = check.Table(tmp_path, "a device")
    check.run([check.Step("good", good, 60)], "cpu", table, 0)
    assert [row.figures for _, row in table.rows] == [{"": "no time was left"}]


def run_check(*words: str, out: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), sys.executable, *words, "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, cwd=out.parent
    )
    return done, json.loads((out / "gpu_check.json").read_text())


def test_on_a_cpu_small_sizes_fill_the_table(tmp_path: Path) -> None:
    done, found = run_check("queue, one", "merges", "dropout", out=tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch" in found["title"]
    steps = {row["step"]: row for row in found["rows"]}
    assert list(steps) == ["queue, one", "merges", "dropout"]
    verdicts = {row["case"]: row["verdict"] for row in found["rows"] if row["step"] in ("merges", "dropout")}
    assert {verdict for case, verdict in verdicts.items() if case != "time"} == {"ok"}
    (row,) = (row for row in found["rows"] if row["step"] == "queue, one" and row["case"] != "time")
    assert (row["verdict"], row["figures"]) == ("left out", {"": "needs a CUDA GPU: queues of launches"})


BARE = """
import sys

MISSING = "beartype einops matplotlib megatron psutil pydantic rich transformer_engine typer zstandard".split()


class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Without())
"""


@pytest.mark.slow
def test_on_a_bare_machine_what_needs_more_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    done, found = run_check(out=tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = {row["step"]: row["figures"][""] for row in found["rows"] if row["verdict"] == "left out"}
    del reasons["versions"]
    on_a_gpu = {step: reasons.pop(step).partition(":")[0] for step in ("queue, one", "queue, eight", "communicators")}
    assert set(on_a_gpu.values()) == {"needs a CUDA GPU"}
    assert reasons == dict.fromkeys(("quickstart", "model", "TE", "models", "combined"), "needs the package megatron")
    checked = {row["step"] for row in found["rows"] if row["verdict"] == "ok"}
    assert checked == {
        *("kernels", "merges", "stream-k", "experts", "dropout", "backends", "chunks", "pipeline", "offload"),
        "state files",
    }


def test_models_are_left_out_by_the_name_of_what_is_missing(
    check: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import models

    def found(*missing: str) -> set[tuple[str, str]]:
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name in missing else name)
        # without a GPU there is nothing to run
        return {(row.verdict, row.figures[""]) for row in models.rows(models.MODELS[1:], "cpu")}

    assert found("megatron") == {("left out", "needs the package megatron")}
    assert ("left out", "needs the package deep_ep") in found("deep_ep")
    assert found() == {("left out", "needs a CUDA GPU: kernels of these layers")}


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), sys.executable, "speed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "no step speed; steps: versions, kernels," in done.stderr
