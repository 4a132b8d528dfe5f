"""Exceptions whose text is one line for the user: the launcher prints that line instead of a traceback."""

import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Refused(ValueError):
    """A request that cannot be met; the text gives the rule, the value and a way out."""


class CannotRun(RuntimeError):
    """A fault of the machine, the installation or the script, not of the request; the text says what to change."""


def shown(value: object) -> str:
    """Return a value as a message quotes it, in one line of 60 characters at most."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(error: BaseException) -> str:
    """Return the error's text in one line; for an assertion without text, the source line that asserts."""
    text = " ".join(str(error).split())
    if text or error.__traceback__ is None:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"line {frame.lineno} of {frame.filename}"
    return f"Megatron requires: {linecache.getline(frame.filename, frame.lineno or 0).strip() or place}"


def refuse_together(*checks: Callable[[], object]) -> None:
    """Run independent checks, and raise Refused with the texts of all that fail, in one line."""
    texts: list[str] = []
    for check in checks:
        try:
            check()
        except Refused as error:
            texts.append(str(error))
    if texts:
        raise Refused("; also: ".join(dict.fromkeys(texts)))


@contextmanager
def as_refusals() -> Iterator[None]:
    """Raise Refused for a ValueError or an assertion of Megatron's own checks inside the context."""
    try:
        yield
    except Refused:
        raise
    except (ValueError, AssertionError) as error:
        raise Refused(one_line(error)) from error
