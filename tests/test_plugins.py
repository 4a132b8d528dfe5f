"""Installed packages add algorithms, schedules and kernels; a broken entry is named where it is asked for."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cp.cli.examine import _plugins
from megatron_cp.comm import in_process
from megatron_cp.context import BACKENDS
from megatron_cp.kernels import KERNELS
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build
from megatron_cp.registry import Registry
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense
from tests.context.test_modes import gradients
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
GROUPS: dict[Registry[Any], str] = {
    BACKENDS: "megatron_cp.backends",
    SCHEDULES: "megatron_cp.schedules",
    KERNELS: "megatron_cp.kernels",
}
MODULE = """
from dataclasses import replace
from megatron_cp.context import BACKENDS, Backend, TrafficFormula
from megatron_cp.kernels import KERNELS
from megatron_cp.pipeline import SCHEDULES
import kv_gather as loop

gather = Backend(
    name="kv-gather", load=lambda: loop, paper="", what="all keys at once", traffic=TrafficFormula(full="2(p-1)U"),
    layout="contiguous", aliases=("kvg",),
)
again = replace(BACKENDS.get("zigzag"), name="zigzag-again", aliases=())
twice = replace(BACKENDS.get("zigzag"), name="ring")
dense = replace(KERNELS.get("reference"), name="dense-too", aliases=())
number = 3
"""
ENTRIES = """
[megatron_cp.backends]
kv-gather = my_plugin:gather
zigzag-again = my_plugin:again
ring = my_plugin:twice
other-name = my_plugin:again
number = my_plugin:number
missing = my_plugin_that_is_missing:gather
[megatron_cp.schedules]
two-and-two = my_schedule:RULE
[megatron_cp.kernels]
dense-too = my_plugin:dense
"""
FAULTS = {
    "other-name": "my_plugin:again is called 'zigzag-again'; give the entry point the same name",
    "number": "my_plugin:number has the type int, not megatron_cp.context.backend.Backend",
    "missing": "ModuleNotFoundError: No module named 'my_plugin_that_is_missing'",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package that has entry points."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "my_plugin.py").write_text(MODULE)
    for example in ("docs/examples/extending/kv_gather.py", "tests/examples/my_schedule.py"):
        (folder / Path(example).name).write_text((ROOT / example).read_text())
    described = folder / "my_plugin-1.5.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.5\n")
    (described / "entry_points.txt").write_text(ENTRIES)
    return folder


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registries as a process with that package finds them."""
    monkeypatch.syspath_prepend(package)
    for registry, group in GROUPS.items():
        fresh = Registry(registry.kind, registry.own, group)
        monkeypatch.setattr(registry, "__dict__", fresh.__dict__)
    yield
    for name in ("my_plugin", "my_schedule", "kv_gather"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("installed")
def test_entries_of_a_package_are_found_behind_ours() -> None:
    ours = [entry.name for entry in BACKENDS.own]
    assert BACKENDS.names == [*ours, "kv-gather", "zigzag-again"]
    assert BACKENDS.get("kvg").what == "all keys at once"
    assert SCHEDULES.names[-1] == "two-and-two"
    assert KERNELS.get("dense-too").load is KERNELS.get("reference").load
    with pytest.raises(ValueError, match="unknown context-parallel backend 'kv-gathr'; did you mean 'kv-gather'"):
        BACKENDS.get("kv-gathr")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", FAULTS)
def test_an_entry_that_cannot_be_used_is_named_where_it_is_asked_for(name: str) -> None:
    line = f"context-parallel backend {name!r} of my-plugin 1.5 cannot be used: {FAULTS[name]}"
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        BACKENDS.get(name)
    assert str(refused.value) == f"{line}; mend the package or uninstall it"
    found = {finding.subject: finding for finding in _plugins()}
    assert found[f"context-parallel backend {name}"].found == line
    assert found["pipeline schedule two-and-two"].found == "from my-plugin 1.5"


@pytest.mark.usefixtures("installed")
def test_a_taken_name_stays_ours_and_doctor_says_so() -> None:
    assert BACKENDS.get("ring") in BACKENDS.own
    (found,) = [finding for finding in _plugins() if finding.subject == "context-parallel backend ring"]
    assert (found.status, found.found.partition(": ")[2]) == ("broken", "the name 'p2p' is taken; take another one")


@pytest.mark.usefixtures("installed")
def test_they_attend_and_schedule() -> None:
    task = problem(24, 4, 2, causal=True)
    for backend in ("kv-gather", "zigzag-again"):
        assert_equals_dense(in_process(3, lambda fabric, name=backend: gradients(fabric, task, name)), task)
    assert build("two-and-two", 2, 4).name == "two-and-two"


def with_package(folder: str, call: Callable[..., Any], *args: Any) -> Any:
    """Call in a process whose server has looked at the registries before the package was there."""
    sys.path.insert(0, folder)
    for registry, group in GROUPS.items():
        vars(registry).update(vars(Registry(registry.kind, registry.own, group)))
    return call(*args)


@pytest.mark.slow
def test_megatron_trains_with_them(package: Path) -> None:
    cp, pp = "--context-parallel-size 2 --cp-comm-type kv-gather", "--pipeline-model-parallel-size 2"

    def losses(world_size: int, *flags: str) -> list[Any]:
        words = tiny("--calculate-per-token-loss --cp-kernel torch", *flags)
        ranks = run_ranks(world_size, with_package, str(package), pretrain_losses, words)
        return [step["loss"] for step in ranks[-1]]

    assert losses(4, cp, f"{pp} --pp-schedule two-and-two") == pytest.approx(losses(1), rel=1e-6)


@pytest.mark.slow
def test_the_command_line_knows_them(package: Path) -> None:
    commands = {
        "list schedules": "two-and-two",
        "trace --backend kv-gather --ranks 4 --seq 1024 --heads 4 --head-dim 64 --causal": "proved",
        "simulate --schedule two-and-two -p 2 -m 4": "two-and-two",
    }
    # one process for all of them, which imports torch once
    code = (
        "import sys; from megatron_cp.cli import app\n"
        "for words in sys.argv[1:]: app(words.split(), standalone_mode=False); print('=====')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{package}:{ROOT}", "COLUMNS": "120"}
    command = [sys.executable, "-c", code, *commands]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    *shown, rest = result.stdout.split("=====\n")
    assert not rest
    assert all(printed in text for text, printed in zip(shown, commands.values(), strict=True))
