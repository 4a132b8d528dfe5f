"""The patches are the hooks' table, fit the installed tree, come off again, and do what the hooks do."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cp.megatron import patches
from megatron_cp.megatron.hooks import HOOKS
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.megatron.test_entry_points import environment
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "patches" / "core_v0.19"
SCRIPT = ROOT / "scripts" / "patch_megatron.sh"
# one run through every call site
FLAGS = tiny(
    "--pipeline-model-parallel-size 2 --pp-schedule zb-h1 --cp-kernel torch --mtp-num-layers 1 --train-iters 2 "
    "--recompute-granularity selective --cp-keep-attention --cp-loss-chunks 2"
)


def installed() -> Path:
    import megatron.core

    return Path(megatron.core.__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A complete copy: of a partial one Python takes the missing modules from the installed package, without a word."""
    shutil.copytree(
        installed() / "megatron", tmp_path / "tree" / "megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "tree"


def patch_megatron(what: str, tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), what, str(tree)], capture_output=True, text=True, check=False)


def differing(tree: Path) -> set[str]:
    found = set()
    for path in tree.rglob("*.py"):
        name = path.relative_to(tree).as_posix()
        if not filecmp.cmp(path, installed() / name, shallow=False):
            found.add(name)
    return found


def made() -> list[tuple[str, str]]:
    return patches.series()


def test_patches_are_those_of_the_table_of_hooks() -> None:
    (series,) = run_ranks(1, made)
    assert (FOLDER / "series").read_text().split() == [name for name, _ in series]
    assert {path.name: path.read_text() for path in FOLDER.glob("*.patch")} == dict(series), (
        "run: python -m megatron_cp.megatron.patches patches/core_v0.19"
    )


@pytest.mark.slow
def test_a_patched_tree_trains_as_the_hooks_do_and_comes_back(tree: Path) -> None:
    assert patch_megatron("--check", tree).stdout.startswith("clean: none of the")
    assert patch_megatron("--revert", tree).returncode == 0
    assert differing(tree) == set()
    for _ in range(2):
        assert patch_megatron("--apply", tree).stdout.startswith("applied: ")
    assert patch_megatron("--check", tree).stdout.startswith("applied: ")
    found = trained_in(tree)
    assert found["tree"] == str(tree)
    assert set(found["hooks"]) == {hook.name for hook in HOOKS if not hook.name.startswith(patches.REPAIRS)}
    assert found["losses"] == run_ranks(2, pretrain_losses, FLAGS)[0]
    assert patch_megatron("--revert", tree).stdout.startswith("clean: ")
    assert differing(tree) == set()


def trained_in(tree: Path) -> dict[str, Any]:
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    command = [*torchrun, "-m", "tests.megatron.patched_run", *FLAGS]
    values = environment() | {"PYTHONPATH": f"{tree}:{ROOT}"}
    done = subprocess.run(command, env=values, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"tree"'))
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_tree_that_does_not_fit_is_left_alone(tree: Path) -> None:
    changed = tree / "megatron" / "core" / "datasets" / "utils.py"
    changed.write_text(changed.read_text().replace("def compile_helpers():", "def compile_helpers(verbose):"))
    done = patch_megatron("--apply", tree)
    assert done.returncode == 1
    assert "the series does not fit" in done.stderr
    assert differing(tree) == {"megatron/core/datasets/utils.py"}


def test_a_tree_that_git_cannot_write_is_not_called_patched(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "git").write_text('#!/bin/sh\ncase "$*" in *--check*) exec "$GIT" "$@" ;; *) exit 3 ;; esac\n')
    (tmp_path / "git").chmod(0o755)
    environment = {**os.environ, "GIT": str(shutil.which("git")), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "--apply", str(tree)], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, b"")


@pytest.mark.parametrize("arguments", [["--apply"], ["--install", "."], []])
def test_usage(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(("usage: ", "patch_megatron: "))
