"""Links, names and generated parts of the pages are what the repository has."""

import re

import pytest

from docs import generate
from tests.docs.pages import DOCS, PAGES, ROOT, TEXT, anchors, blocks, prose
from tests.imports import files
from tests.test_layers import ORDER

README_LINES = 200
LINKS = sorted(
    {
        (page, target)
        for page, text in TEXT.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text))
        if not target.startswith("https://")
    }
)
NAMED = sorted(
    {
        (page, path)
        for page, text in TEXT.items()
        for path in re.findall(r"(?<![\w./-])(?:scripts|configs|megatron_cp|docs|tests|patches)/[\w./-]*\w", text)
    }
)
MADE = ("docs/_build",)
"""Folders that a command makes."""


def test_the_readme_is_short() -> None:
    assert len(TEXT["README.md"].splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page) -> None:
    text = page.read_text()
    assert generate.refreshed(text) == text, "run: bash scripts/docs.sh --write"


def test_a_stale_part_is_noticed() -> None:
    page = "<!-- generated: glossary -->\n| term |\n<!-- end -->\n"
    assert generate.refreshed(page) != page


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    found = (ROOT / page).parent / path if path else ROOT / page
    assert found.exists()
    if anchor:
        assert anchor in anchors(found.read_text())


@pytest.mark.parametrize(("page", "path"), NAMED)
def test_files_that_a_page_names_exist(page: str, path: str) -> None:
    assert (ROOT / path).exists() or path.startswith(MADE)


def test_every_page_is_part_of_the_site_and_of_no_other_place() -> None:
    listed = re.findall(r"^(\w+)$", "".join(one.text for one in blocks() if one.page == "docs/index.md"), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_every_folder_is_explained() -> None:
    folders = prose(TEXT["docs/architecture.md"].split("## Folders")[1])
    rooms = {room for line in ORDER for room in line.split() if not room.endswith(".py")}
    assert rooms <= set(re.findall(r"`(\w+)`", folders.split("Three levels")[0]))


WALKS = generate.data("walks")


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk["name"])
def test_a_walk_follows_the_imports(walk) -> None:
    graph, before = files(), []
    for step in walk["steps"]:
        file = step["file"]
        assert file in graph, f"no file {file}"
        imported = any(file in graph[earlier] for earlier in before)
        assert not before or imported or "through" in step, f"no file before {file} imports it: say how it is reached"
        assert (file in before) == ("again" in step), f"{file} is entered again, or for the first time"
        before.append(file)


def test_glossary_has_every_term_once() -> None:
    terms = [entry["term"] for entry in generate.data("glossary")]
    assert len(terms) == len(set(terms))
    assert all(entry["means"].endswith((".", ")")) for entry in generate.data("glossary"))
