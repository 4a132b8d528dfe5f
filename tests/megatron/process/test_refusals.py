"""The launcher shows one line for what is refused, however it was raised, and the traceback for everything else."""

import compileall
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cp.errors import CannotRun, Refused, as_refusals
from megatron_cp.megatron.process import launch
from megatron_cp.megatron.process.launch import refusals_in_one_line
from megatron_cp.registry import Registry


def plainly() -> None:
    raise Refused("rule,\n value; way out")


def in_one_line_with_its_condition() -> None:
    if True: raise Refused("rule, value; way out")  # noqa: E701 # fmt: skip


def again() -> None:
    try:
        plainly()
    except Refused:
        raise


def because_of_another_error() -> None:
    try:
        int("many")
    except ValueError as error:
        raise Refused("rule, value; way out") from error


def for_the_machine() -> None:
    raise CannotRun("rule, value; way out")


def without_source() -> None:
    exec(compile("raise Refused('rule, value; way out')", "/no/such/file.py", "exec"), {"Refused": Refused})


def of_megatron() -> None:
    with as_refusals():
        raise AssertionError("rule, value; way out")


@pytest.mark.parametrize(
    "refuse",
    [
        plainly,
        in_one_line_with_its_condition,
        again,
        because_of_another_error,
        for_the_machine,
        without_source,
        of_megatron,
    ],
)
def test_a_refusal_is_one_line_however_it_is_raised(
    refuse: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as left, refusals_in_one_line():
        refuse()
    assert left.value.code == "[megatron-cp] rank 3: rule, value; way out"


@pytest.mark.parametrize("version", ["2.7.1", "1.13.0+cpu"])
def test_the_launcher_refuses_an_old_torch_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "installed", lambda name: version)
    with pytest.raises(SystemExit) as left, launch.launched([]):
        pass
    assert str(left.value).endswith(f"needs torch 2.8 or later, got {version}; pip install 'torch>=2.8'")


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AssertionError, KeyError])
def test_other_errors_keep_their_traceback(error: type[Exception]) -> None:
    with pytest.raises(error, match="a bug"), refusals_in_one_line():
        raise error("a bug")


@pytest.mark.parametrize(("source", "told"), [(True, "assert not [1]"), (False, "line 3 of {path}")])
def test_an_assertion_without_text_is_told_by_its_line_or_its_place(source: bool, told: str, tmp_path: Path) -> None:
    path, code = tmp_path / "asserting.py", "\n\nassert not [1]\n"
    if source:
        path.write_text(code)
    with pytest.raises(Refused) as error, as_refusals():
        exec(compile(code, str(path), "exec"))
    assert str(error.value) == f"Megatron requires: {told.format(path=path)}"


def test_callers_that_expect_a_value_error_still_get_one() -> None:
    with pytest.raises(ValueError, match="unknown kernel"):
        Registry[object]("kernel", []).get("flesh")  # type: ignore[type-var]


def test_a_package_without_source_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as in an archive of compiled files: no line of source can be read
    package = tmp_path / "compiled"
    package.mkdir()
    code = "from megatron_cp.errors import Refused\ndef ask():\n    if 1: raise Refused('rule, value; way out')\n"
    (package / "asked.py").write_text(code)
    compileall.compile_dir(package, legacy=True, quiet=1)
    (package / "asked.py").unlink()
    monkeypatch.syspath_prepend(package)
    with pytest.raises(SystemExit) as left, refusals_in_one_line():
        importlib.import_module("asked").ask()
    assert left.value.code == "[megatron-cp] rank 0: rule, value; way out"
