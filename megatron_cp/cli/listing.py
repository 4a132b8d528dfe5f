"""`megatron-cp list`: name what a flag or a command can be given, with one line for each."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.batches import ALGORITHMS
from megatron_cp.config import configs_folder
from megatron_cp.context import BACKENDS
from megatron_cp.experts import EXCHANGES, PLACEMENTS, PRODUCTS, ROUTERS
from megatron_cp.kernels import KERNELS
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.registry import unknown
from megatron_cp.replicas import OUTERS, QUANTISATIONS
from megatron_cp.tensor import ENGINES, GEMMS, SCHEMES


class Listed(NamedTuple):
    """A name and what it stands for."""

    name: str
    what: str


def _files(folder: str) -> Callable[[], Iterator[Listed]]:
    def described() -> Iterator[Listed]:
        for file in sorted((configs_folder() / folder).glob("*.yaml")):
            yield Listed(file.stem, _first_sentence(file))

    return described


def _first_sentence(file: Path) -> str:
    """Return the first sentence of the comment with which a file begins."""
    words: list[str] = []
    for line in file.read_text().splitlines():
        if not line.startswith("# "):
            break
        for word in line[2:].split():
            words.append(word)
            if word.endswith("."):
                return " ".join(words)
    return " ".join(words)


KINDS: dict[str, Callable[[], Iterator[Listed]]] = {
    "recipes": _files("recipes"),
    "models": _files("models"),
    "clusters": _files("clusters"),
    "backends": lambda: (Listed(entry.name, entry.what) for entry in BACKENDS),
    "schedules": lambda: (Listed(entry.name, entry.what) for entry in SCHEDULES),
    "schemes": lambda: (Listed(entry.name, entry.what) for entry in SCHEMES),
    "engines": lambda: (Listed(entry.name, f"{entry.what}; needs {entry.needs}") for entry in ENGINES),
    "products": lambda: (Listed(entry.name, f"{entry.what}; needs {entry.needs}") for entry in GEMMS),
    "experts": lambda: (Listed(entry.name, f"{entry.what}; needs {entry.needs}") for entry in PRODUCTS),
    "exchanges": lambda: (Listed(entry.name, entry.what) for entry in EXCHANGES),
    "routers": lambda: (Listed(entry.name, entry.what) for entry in ROUTERS),
    "placements": lambda: (Listed(entry.name, entry.what) for entry in PLACEMENTS),
    "outer-optimizers": lambda: (Listed(entry.name, entry.what) for entry in OUTERS),
    "quantisations": lambda: (Listed(entry.name, entry.what) for entry in QUANTISATIONS),
    "batch-algorithms": lambda: (Listed(entry.name, f"{entry.what}; degrees: {entry.degrees}") for entry in ALGORITHMS),
    "kernels": lambda: (Listed(entry.name, f"{entry.summary}; needs {entry.needs}") for entry in KERNELS),
}
FOR = {
    "recipes": "train, render, submit, validate and estimate",
    "models": "plan --model, and `extends` of a recipe",
    "clusters": "--cluster, and CLUSTER of a recipe",
    "backends": "--cp-comm-type, and trace --backend",
    "schedules": "--pp-schedule, and simulate --schedule",
    "schemes": "--tp-comm-type",
    "engines": "--tp-engine",
    "products": "--tp-gemm",
    "experts": "--moe-grouped-product",
    "exchanges": "--moe-comm-type",
    "routers": "--moe-router",
    "placements": "--moe-placement, and plan-experts --policy",
    "outer-optimizers": "--local-sgd-outer",
    "quantisations": "--zero-quantized-gradients",
    "batch-algorithms": "plan-batches --algorithm",
    "kernels": "--cp-kernel",
}


def show(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.", metavar="KIND")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List what can be named, such as recipes, models, clusters, backends, schedules, batch algorithms and kernels."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    found = list(KINDS[kind]())
    if as_json:
        typer.echo(json.dumps([entry._asdict() for entry in found], indent=2))
        return
    table = Table("name", "what it is", title=f"{kind}, for {FOR[kind]}", title_justify="left")
    for entry in found:
        table.add_row(*entry)
    Console().print(table)
