"""Configuration of the documentation site; `bash scripts/docs.sh` builds it strictly and without network access."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from generate import options  # noqa: E402

project = "megatron-cp"
author = "The megatron-cp authors"
project_copyright = f"2026, {author}"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = "megatron-cp"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
# flags keep their two dashes outside code too
smartquotes = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

nitpicky = True
# types in signatures: those of other packages, of which no inventory is fetched, and those that are not public
nitpick_ignore_regex = [
    ("py:.*", r"(torch|dist|jaxtyping|collections|contextlib|datetime|pathlib|types|typing)\b.*"),
    ("py:.*", r"Tensor|Float|ProcessGroup|Path|Self|S|T|list\[.*|[a-z] [a-z ]+"),
    ("py:class", r"megatron_cp\..*"),
]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}

PARAMETER = re.compile(r"(\w[\w., ]*):\s+(\S.*)")
logger = logging.getLogger(__name__)


def explain_parameters(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the lists `name: text` of our docstrings into definition lists, and report a name without a docstring."""
    if not "".join(lines).strip():
        if what in ("module", "class", "function", "method", "property"):
            logger.warning("%s %s is public and has no docstring", what, name)
        return
    shown: list[str] = []
    inside = False
    for line in lines:
        found = PARAMETER.fullmatch(line)
        starts = found is not None and (not shown or not shown[-1] or inside)
        if starts and found:
            shown += [f"``{found[1]}``", f"  {found[2]}"]
        elif inside and line and not line.startswith(" "):
            shown += ["", line]
        else:
            shown.append(f"  {line.strip()}" if inside and line else line)
        inside = starts or (inside and line.startswith(" "))
    lines[:] = shown


def setup(app: Sphinx) -> None:
    # read from the commands themselves, so it is no file of the repository
    (DOCS / "_generated").mkdir(exist_ok=True)
    (DOCS / "_generated/options.md").write_text(options())
    app.connect("autodoc-process-docstring", explain_parameters)
