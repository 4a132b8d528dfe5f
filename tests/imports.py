"""Who imports whom in the package, read from the code: imports at any depth, in functions and for type checkers too."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_cp"
FILES = sorted(PACKAGE.rglob("*.py"))
ADAPTERS = "megatron"

Graph = Mapping[str, frozenset[str]]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(root: ast.AST) -> Iterator[str]:
    """Full names of everything that a file imports, at any depth."""
    for node in ast.walk(root):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> Graph:
    """The files that each file imports."""
    known = {module_of(path): name_of(path) for path in FILES}

    def target(name: str) -> str | None:
        # a name that is no module is one in the module before the dot
        return known.get(name) or known.get(name.rpartition(".")[0])

    return {
        name_of(path): frozenset(found for name in imported(tree(path)) if (found := target(name))) - {name_of(path)}
        for path in FILES
    }


def room(name: str, inside: str = "") -> str:
    """The folder or file directly below the package, or below one of its folders, in which a file lies."""
    below = name.removeprefix(f"{inside}/") if inside else name
    return f"{inside}/{below.split('/')[0]}" if inside else below.split("/")[0]


def rooms(graph: Graph, inside: str = "") -> Graph:
    """The same imports between rooms; `inside` a folder those between its own rooms."""
    found: dict[str, set[str]] = {}
    for name, targets in graph.items():
        if name.startswith(f"{inside}/" if inside else ""):
            mine = found.setdefault(room(name, inside), set())
            mine |= {room(target, inside) for target in targets if target.startswith(f"{inside}/" if inside else "")}
    return {name: frozenset(targets - {name}) for name, targets in found.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), frozenset()) - seen
            seen |= new
            waiting += new
        return seen

    below = {name: reached(name) for name in graph}
    found = {tuple(sorted({name, *(other for other in below[name] if name in below.get(other, ()))})) for name in graph}
    return [list(group) for group in sorted(found) if len(group) > 1]


def levels(graph: Graph) -> dict[str, int]:
    """The longest chain of imports below each name, itself included; the graph has no circles."""

    @cache
    def level(name: str) -> int:
        return 1 + max((level(target) for target in graph.get(name, ())), default=0)

    return {name: level(name) for name in graph}


def arrows_up(graph: Graph, order: Iterable[str]) -> list[tuple[str, str]]:
    """Imports of something that stands later in the order, or in no place of it."""
    place = {name: index for index, line in enumerate(order) for name in line.split()}
    return sorted(
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if name not in place or target not in place or place[target] >= place[name]
    )


def loads_by_string(root: ast.AST) -> Iterator[str]:
    """Calls that import a module by its name as a text, but those of a library that is written out."""
    for node in ast.walk(root):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func).rpartition(".")[2]
        literal = bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
        text = str(node.args[0].value) if literal else ""  # type: ignore[attr-defined]
        if function in ("import_module", "__import__") and (not literal or text.partition(".")[0] == PACKAGE.name):
            yield f"line {node.lineno}: {ast.unparse(node)}"
