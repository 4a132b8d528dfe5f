"""The README and the pages of docs/, and what is written in them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}

_BLOCK = re.compile(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code: `kind` is its language, empty for one that is indented."""

    page: str
    kind: str
    text: str


def blocks() -> Iterator[Block]:
    """Every block of code of every page."""
    for page, text in TEXT.items():
        yield from (Block(page, kind, body) for _, kind, body in _BLOCK.findall(text))
        indented = re.findall(r"(?:^    .*\n)+", prose(text), re.MULTILINE)
        yield from (Block(page, "", re.sub(r"^    ", "", body, flags=re.MULTILINE)) for body in indented)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", text)


def shell_lines() -> Iterator[tuple[str, str]]:
    """Page and line of every command that a reader may type, without prompt, comment and line breaks."""
    for page, kind, text in blocks():
        if kind not in ("", "console"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#\s.*", "", line.removeprefix("$ "))
            if re.match(r"(\$ |bash |megatron-cp |pip |python |sbatch |source |torchrun |export )", line):
                yield page, " ".join(command.split())


def inline_code() -> Iterator[tuple[str, str]]:
    """Page and text of everything between backticks in running text and tables."""
    for page, text in TEXT.items():
        flowing = re.sub(r"^    .*$", "", prose(text), flags=re.MULTILINE)
        yield from ((page, " ".join(code.split())) for code in re.findall(r"`([^`]+)`", flowing))


def anchors(text: str) -> set[str]:
    """The names by which the headings of a page are linked."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
