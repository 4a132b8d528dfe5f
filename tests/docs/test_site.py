"""The build of the site is strict: broken links and undocumented names fail it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS

# each builds a small site in a process of its own
pytestmark = pytest.mark.slow

SOUND = "# Page\n\n[itself](index.md)\n"
FAULTS = {
    "[a page](nowhere.md)": "nowhere.md",
    "[a heading](index.md#elsewhere)": "elsewhere",
    "[a file](../megatron_cp/absent.py)": "absent.py",
    "```{eval-rst}\n.. autofunction:: megatron_cp.context.attend.missing\n```": "missing",
    "```{eval-rst}\n.. autoclass:: undocumented.Thing\n```": "is public and has no docstring",
}


def build(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "index.md").write_text(text)
    (folder / "undocumented.py").write_text("class Thing:\n    def method(self): ...\n")
    words = ["--builder", "html", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "--conf-dir", str(DOCS)]
    command = [sys.executable, "-m", "sphinx", *words, str(folder), str(folder / "out")]
    environment = {"PYTHONPATH": f"{folder}:{DOCS.parent}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_sound_page_builds(tmp_path: Path) -> None:
    built = build(tmp_path, SOUND)
    assert built.returncode == 0, built.stderr


def test_every_fault_of_a_page_is_named_and_fails_the_build(tmp_path: Path) -> None:
    built = build(tmp_path, "\n\n".join([SOUND, *FAULTS, ""]))
    assert built.returncode != 0
    for fault, named in FAULTS.items():
        assert any("WARNING" in line and named in line for line in built.stderr.splitlines()), (fault, built.stderr)
