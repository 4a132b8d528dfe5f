"""Errors whose text is one line for the user."""

import linecache
import traceback


class BadArguments(ValueError):
    """The command line asks for something that Megatron or we refuse; the text is one line."""


def one_line(error: BaseException) -> str:
    """The error's text in one line; of an assertion without text, the line that asserts."""
    text = " ".join(str(error).split())
    if text or error.__traceback__ is None:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron requires: {linecache.getline(frame.filename, frame.lineno or 0).strip()}"
