"""Links, names and generated parts of the pages are what the repository has."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from docs import generate
from megatron_cp.context.task import Task
from tests.docs.pages import DOCS, PAGES, ROOT, TEXT, anchors, blocks, inline_code, prose
from tests.imports import FILES, files, module_of
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
FOREIGN = ("DeviceMesh", "NamedTuple", "None", "Protocol", "ValueError")
"""Names of Python's and torch's own."""
MADE = ("docs/_build",)
"""Folders that a command makes."""


def test_the_readme_is_short() -> None:
    assert len(TEXT["README.md"].splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page) -> None:
    text = page.read_text()
    assert generate.refreshed(text, but=generate.SLOW) == text, "run: bash scripts/docs.sh --write"


@pytest.mark.slow
@pytest.mark.xdist_group("published mixes")
@pytest.mark.parametrize("name", generate.SLOW)
def test_slow_parts_are_current_and_stale_ones_noticed(name: str) -> None:
    (text,) = (found[0] for page in PAGES for found in generate.PART.finditer(page.read_text()) if found[1] == name)
    assert generate.refreshed(text) == text, "run: bash scripts/docs.sh --write"
    stale = re.sub(r"\d\.\d\d", "9.99", text)
    assert stale != text
    assert generate.refreshed(stale) == text


def test_generated_pictures_are_current() -> None:
    assert not generate.stale_pictures(), "run: bash scripts/docs.sh --write"


def test_a_stale_picture_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = generate.slices_of_a_million_tokens()
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr(generate, "pictures", lambda: {"steps.png": steps})
    assert generate.stale_pictures()
    steps.draw(tmp_path / "steps.png", {"Description": steps.digest})
    assert not generate.stale_pictures()
    monkeypatch.setattr(generate, "pictures", lambda: {"steps.png": steps._replace(figures="others")})
    assert generate.stale_pictures()


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


SOURCE = "".join(path.read_text() for path in FILES)


@pytest.mark.parametrize(
    ("page", "code"),
    sorted({(page, code) for page, code in inline_code() if re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)*", code)}),
)
def test_classes_that_a_page_names_are_defined(page: str, code: str) -> None:
    assert re.search(rf"^class {code.split('.')[0]}\b", SOURCE, re.MULTILINE) or code in FOREIGN


@pytest.mark.parametrize(
    ("page", "name"),
    sorted({(page, name) for page, text in TEXT.items() for name in re.findall(r"megatron_cp(?:\.\w+)+", text)}),
)
def test_dotted_names_in_a_page_are_found(page: str, name: str) -> None:
    module, known = name, {module_of(path): path for path in FILES}
    while module not in known:
        module = module.rpartition(".")[0]
    inside = name.removeprefix(module).split(".")[1:2]
    # a group of entry points is no module
    assert f'"{name}"' in SOURCE or all(re.search(rf"\b{one}\b", known[module].read_text()) for one in inside)


def test_the_fields_of_a_task_are_its_own() -> None:
    named = set(re.findall(r"`task\.(\w+)", TEXT["docs/extending.md"]))
    assert named <= {*dir(Task), *(field.name for field in fields(Task))}


WALKS = generate.data("walks")


@pytest.mark.parametrize("step", [step for walk in WALKS for step in walk["steps"]], ids=lambda step: step["file"])
def test_what_a_walk_names_is_in_the_file(step) -> None:
    text = (ROOT / "megatron_cp" / step["file"]).read_text()
    assert all(name.rpartition(".")[2] in text for name in re.findall(r"`([A-Za-z]\w+(?:\.\w+)*)`", step["does"]))


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
