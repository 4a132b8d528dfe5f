"""Run a command of `megatron-cp` in this process; whatever ends it must be one line of our own."""

import traceback
import warnings
from pathlib import Path

from typer.testing import CliRunner

import megatron_cp
from megatron_cp.cli import app

PACKAGE = Path(megatron_cp.__file__).parent


def asked(*words: str) -> tuple[int, str]:
    """Exit code, and what was printed or the line that `main` would print; fails on what would be a traceback."""
    with warnings.catch_warnings():
        # Megatron says so when it is imported first
        for said in (
            "Transformer Engine and Apex are not installed",
            "The following imports from `dynamic_context.py`",
        ):
            warnings.filterwarnings("ignore", message=said)
        warnings.filterwarnings("ignore", module=r"megatron\.")
        done = CliRunner().invoke(app, [*words])
    error = done.exception
    if error is None or isinstance(error, SystemExit):
        assert "Traceback" not in done.output
        return done.exit_code, done.output
    assert_said_by_us(error)
    return done.exit_code, str(error)


def assert_said_by_us(error: BaseException) -> None:
    """Fail unless the error is one line that our code has raised, or the system's word on a file."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
    assert isinstance(error, (ValueError, RuntimeError, OSError)), where
    assert str(error).strip(), where
    assert "\n" not in str(error).strip() or type(error).__name__ == "BadSchedule", where
    if not isinstance(error, OSError):
        assert PACKAGE in Path(frame.filename).parents, where
        assert (frame.line or "").startswith("raise"), where
