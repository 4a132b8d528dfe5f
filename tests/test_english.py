"""Docstrings begin with a verb or a plain noun phrase; texts have none of the phrases that a native reader rejects."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import FILES, name_of, tree

OPENINGS = re.compile(r"(What|Whether|Of|The same)\b")
PHRASES = re.compile(r"\b(for ever|nobody|everybody|for want of|belongs? into)\b", re.IGNORECASE)


def docstrings(root: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of all docstrings: of the module, classes, functions, and below assignments."""
    for node in ast.walk(root):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of all strings, parts of f-strings too, and of all comments on lines of their own."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("#"):
            yield number, line.strip()


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{name_of(path)}:{line}: {text.splitlines()[0]}"
        for path in FILES
        for line, text in docstrings(tree(path))
        if OPENINGS.match(text)
    ]
    assert not found, "\n".join(found)


def test_texts_and_comments_are_plain() -> None:
    found = [
        f"{name_of(path)}:{line}: {text[:80]}" for path in FILES for line, text in texts(path) if PHRASES.search(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["What a rank does.", "Whether it fits.", "Of a rank.", "The same of a layer."])
def test_banned_openings_are_found(text: str) -> None:
    assert OPENINGS.match(text)
    assert not OPENINGS.match(f"Offer {text}")
