"""Read assignments of a Python config file by its syntax tree, without running any of it."""

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.recipe.foreign.keys import Computed

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def assignments(file: Path) -> dict[str, Any]:
    """Return the names that a file assigns at its top, with their values.

    Literals, `dict(…)`, sums and products, and names assigned above are read; a bare name or attribute, such as
    AMP_TYPE.NAIVE, is its own text; everything else is `Computed`. Raises Refused for a file that is no Python.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise Refused(
            f"{file}{f':{line}' if line else ''}: cannot read this as Python; give the flags instead"
        ) from None
    found: dict[str, Any] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets: list[ast.expr] = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = _value(node.value, found)
        found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    try:
        return _read(node, known)
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError):
        return Computed(ast.unparse(node))


def _read(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return a value; raises ValueError for what would have to run."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return ast.unparse(node)
    if isinstance(node, ast.Dict):
        keys = [key if key is None else ast.literal_eval(key) for key in node.keys]
        if None in keys:
            raise ValueError("a dict inside a dict")
        return {str(key): _value(each, known) for key, each in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        if any(word.arg is None for word in node.keywords):
            raise ValueError("words from another dict")
        return {str(word.arg): _value(word.value, known) for word in node.keywords}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each, known) for each in node.elts]
    if isinstance(node, ast.Subscript):
        return _read(node.value, known)[ast.literal_eval(node.slice)]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        both = [_read(side, known) for side in (node.left, node.right)]
        if not all(isinstance(side, int | float) for side in both):
            raise ValueError("no numbers")
        return _OPERATORS[type(node.op)](*both)
    return ast.literal_eval(node)
