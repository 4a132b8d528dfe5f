"""One name for one thing: no class name is defined twice, and none is a metaphor."""

import ast
import re
from collections import defaultdict

import pytest

from tests.imports import FILES, PACKAGE, tree

BANNED = (
    "contest dish door gift guest heat homecoming homeward homewards lap letter letters menu race rival rivals".split()
)
# a warp's lanes are what CUDA calls them
CUDA_FOLDERS = ("kernels",)


def words(name: str) -> list[str]:
    """Return the words of a snake_case or CamelCase name, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def definitions(kind: type[ast.ClassDef] | tuple[type, ...]) -> list[tuple[str, str]]:
    return [
        (node.name, f"{path.relative_to(PACKAGE)}:{node.lineno}")
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, kind)
    ]


def test_no_class_name_is_defined_twice():
    places = defaultdict(list)
    for name, place in definitions(ast.ClassDef):
        places[name].append(place)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_class_or_function_is_named_by_a_metaphor():
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    banned = {*BANNED}
    found = [
        f"{place} {name}"
        for name, place in definitions(kinds)
        if banned & set(words(name)) or ({"lane", "lanes"} & set(words(name)) and not place.startswith(CUDA_FOLDERS))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "expected"), [("_LetterBox", ["letter", "box"]), ("HTTPRace2", ["http", "race", "2"])]
)
def test_words_of_a_name(name, expected):
    assert words(name) == expected
