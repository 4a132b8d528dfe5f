"""An algorithm is one file and one entry: the example of docs/extending is added to a copy, nothing else is edited.

The laws of the suite iterate over the registry, so they are run on the copy as they are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples" / "extending"
REGISTRY = Path("megatron_cp", "context", "__init__.py")
LOADERS_END = 'AUTO = "auto"\n'
ENTRIES_END = "        Backend(\n            name=AUTO,\n"
# every pair of the mask equals dense attention, is recorded, proved and counted as the entry says
LAWS = ("test_backends.py", "trace/test_record.py", "trace/test_proof.py", "test_traffic.py")
CASES = "kv-gather and p3"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with one more file and one more entry."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("megatron_cp", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(EXAMPLES / "kv_gather.py", folder / "megatron_cp/context/algorithms")
    loader, listed = (EXAMPLES / "kv_gather_entry.py").read_text().split("# and the entry in the list\n")
    entry = listed.partition("        ...,\n")[2].partition("    ],\n")[0]
    text = (folder / REGISTRY).read_text()
    assert text.count(LOADERS_END) == text.count(ENTRIES_END) == 1
    text = text.replace(LOADERS_END, loader + LOADERS_END)
    (folder / REGISTRY).write_text(text.replace(ENTRIES_END, entry + ENTRIES_END))
    return folder


def run(folder: Path, *words: str) -> str:
    """What a command of the extended project prints."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_example_keeps_the_laws(extended: Path) -> None:
    files = [f"tests/context/{law}" for law in LAWS]
    printed = run(extended, "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", CASES)
    assert all(f"{file}::" in printed for file in files)


def test_the_example_is_listed(extended: Path) -> None:
    rows = run(extended, "megatron_cp", "backends", "--markdown").splitlines()
    assert [row for row in rows if row.startswith("| `kv-gather` |  | every rank gathers K and V at once | 2(p-1)U |")]


def test_nothing_but_the_registry_was_edited(extended: Path) -> None:
    changed = {
        path.relative_to(extended)
        for path in (extended / "megatron_cp").rglob("*.py")
        if not (ROOT / path.relative_to(extended)).exists()
        or path.read_text() != (ROOT / path.relative_to(extended)).read_text()
    }
    assert changed == {REGISTRY, Path("megatron_cp/context/algorithms/kv_gather.py")}
