"""What other files must know of an algorithm is in its entry: none of them names it."""

import ast
import re
from collections.abc import Iterator

import pytest

from megatron_cp.context import ALGORITHMS, BACKENDS, Backend, Capabilities
from megatron_cp.context.attend import plan
from megatron_cp.context.checks import able, check_heads, check_mask
from megatron_cp.context.layouts import LAYOUTS
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from megatron_cp.grid import Grid
from tests.imports import FILES, name_of, tree

NAMING = (
    # the entries, the algorithms themselves, and the layouts, two of which are called as the algorithm that needs them
    *("context/__init__.py", "context/algorithms/", "context/layouts.py"),
    # an engine of tensor parallelism is called ring too
    *("tensor/__init__.py", "tensor/ring.py"),
    # tables of what to use in place of other projects' flags and keys
    *("megatron/arguments/foreign_flags.py", "recipe/foreign/"),
)
NAMES = "|".join(sorted(map(re.escape, ALGORITHMS), key=len, reverse=True))
# 'name' in quotes, or after a word that asks for a backend
IN_TEXT = re.compile(rf"['`]({NAMES})['`]|(?:backend|--cp-comm-type|or use) ({NAMES})\b")


def docstrings(root: ast.AST) -> set[int]:
    """The ids of all docstrings' nodes."""
    bodies = (node.body for node in ast.walk(root) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def named(root: ast.AST) -> Iterator[str]:
    """Texts of code that name an algorithm; docstrings may."""
    ignored = docstrings(root)
    for node in ast.walk(root):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in ignored else None
        if isinstance(text, str) and (text in ALGORITHMS or IN_TEXT.search(text)):
            yield f"line {node.lineno}: {text}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_other_file_names_an_algorithm(path) -> None:
    assert name_of(path).startswith(NAMING) or not list(named(tree(path)))


@pytest.mark.parametrize(
    "code", ['x = "usp"', '''f"use backend 'ring' for {x}"''', 'help = "with --cp-comm-type striped"']
)
def test_a_name_is_noticed(code: str) -> None:
    assert list(named(ast.parse(code)))


def entry(**capabilities) -> Backend:
    return Backend(
        name="new", load=BACKENDS.get("ring").load, paper="", what="", capabilities=Capabilities(**capabilities)
    )


@pytest.mark.parametrize(("mask", "kind"), [(FULL, "full"), (CAUSAL, "causal"), (Mask(3, 0), "window")])
def test_a_mask_that_an_algorithm_cannot_do_is_refused(mask: Mask, kind: str) -> None:
    check_mask(entry(masks=frozenset({kind})), mask)
    with pytest.raises(ValueError, match=f"got a {kind} mask; use backend 'zigzag' or"):
        check_mask(entry(masks=frozenset({"full", "causal", "window"} - {kind})), mask)


@pytest.mark.parametrize(
    ("heads", "grid", "axis", "ranks"),
    [("none", None, "", 1), ("all", None, "", 8), ("axis", Grid(4, 2), "inner", 4), ("axis", Grid(4, 2), "outer", 2)],
)
def test_ranks_that_share_heads_need_one_each(heads: str, grid: Grid | None, axis: str, ranks: int) -> None:
    check_heads(entry(heads=heads), ranks, 8, grid, axis)
    if ranks > 1:
        with pytest.raises(ValueError, match=f"{ranks} ranks cannot share {ranks - 1} query heads"):
            check_heads(entry(heads=heads), ranks - 1, 8, grid, axis)


def test_a_refusal_names_the_backends_that_can() -> None:
    assert able(lambda entry: entry.capabilities.bias) == "'rsa'"
    assert able(lambda entry: entry.needs_grid, str) == "usp or double-ring"
    with pytest.raises(ValueError, match="use backend 'usp' or leave it out"):
        plan("ring", placement="context-first")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_entry_asks_for_a_layout_that_exists_and_says_what_it_sends(name: str) -> None:
    found = BACKENDS.get(name)
    assert found.layout in (None, *LAYOUTS)
    assert found.traffic is not None
    assert found.sends == str(found.traffic)
