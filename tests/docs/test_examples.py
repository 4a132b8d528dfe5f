"""The example files of the pages run."""

import runpy

import pytest

from tests.docs.pages import DOCS, TEXT, blocks
from tests.ranks import run_ranks

RANKS = {"own_loop.py": 2, "on_a_grid.py": 4, "packed.py": 2, "frames.py": 2}


def run_example(path: str) -> None:
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize(("name", "ranks"), RANKS.items())
def test_example_runs_on_its_ranks(name: str, ranks: int) -> None:
    run_ranks(ranks, run_example, str(DOCS / "examples" / name))
    assert f"torchrun --nproc-per-node {ranks} docs/examples/{name}" in (DOCS / "examples" / name).read_text()


def test_every_example_is_shown_on_a_page() -> None:
    assert all(f"examples/{file.name}" in "".join(TEXT.values()) for file in (DOCS / "examples").glob("*.py"))


def test_python_in_pages_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for one in blocks():
        if one.kind == "python":
            exec(compile(one.text, one.page, "exec"), {})
            assert "print" not in one.text or capsys.readouterr().out
