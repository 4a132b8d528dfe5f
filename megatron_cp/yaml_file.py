"""Read YAML files; an error is one line with the file and, where it is known, the line."""

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
        problem = " ".join(str(error.problem or error.context).split())
        raise Refused(f"{shown(file)}{line}: not YAML: {problem}") from None
    except RecursionError:
        raise Refused(f"{shown(file)}: nested too deeply") from None
    # int() takes numbers of some thousand digits
    except (YAMLError, ValueError) as error:
        raise Refused(f"{shown(file)}: not YAML: {' '.join(str(error).split())}") from None


def shown(file: Path) -> str:
    """Return the path as a user in the current folder would write it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
