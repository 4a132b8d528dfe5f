"""Read YAML files; an error is one line with the file and, where it is known, the line."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError

from megatron_cp.errors import Refused


def parse[T](file: Path, load: Callable[[str], T]) -> T:
    """Return what `load`, a method of ruamel's YAML, makes of the file's text.

    Raises Refused for a file that cannot be read or is not YAML.
    """
    try:
        with warnings.catch_warnings():
            # YAML 1.2, section 3.2.2.2: an alias stands for the last node with its anchor
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            return load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{shown(file)}: {error.strerror}") from None
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = _plain(" ".join(str(error.problem or error.context).split()))
        raise Refused(f"{shown(file)}{line}: not YAML: {problem}") from None
    except RecursionError:
        raise Refused(f"{shown(file)}: nested too deeply") from None
    # int() takes numbers of some thousand digits
    except (YAMLError, ValueError) as error:
        raise Refused(f"{shown(file)}: not YAML: {' '.join(str(error).split())}") from None


# the parser's names of what it looks for
_PLAIN = {
    "document start": "the end of the file",
    "block mapping start": "a key with a value",
    "block sequence start": "a list",
    "block entry": "an item of a list",
    "block end": "the end of the part indented like this",
    "scalar": "a text",
    "stream end": "the end of the file",
}


_SENTENCES = {
    "could not find expected ':'": "a line is no 'key: value' and continues nothing above it",
    "mapping values are not allowed here": "a key stands below a text, or a text with ': ' in it needs quotes",
}


def _plain(problem: str) -> str:
    text = re.sub(
        r"\(?'?<([a-z ]+)>'?,?\)?",
        lambda found: _PLAIN.get(found[1], f"'{found[1]}'"),
        _SENTENCES.get(problem, problem),
    )
    return text.replace(", but found", ", found")


def shown(file: Path) -> str:
    """Return the path as a user in the current folder would write it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
