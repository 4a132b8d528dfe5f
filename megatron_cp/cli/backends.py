"""`megatron-cp backends`: list the context-parallel algorithms."""

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.context import BACKENDS

COLUMNS = ("--cp-comm-type", "also", "what it does", "sends per rank, forward", "source")


def rows() -> Iterator[tuple[str, ...]]:
    """Yield the cells of COLUMNS for each backend."""
    for entry in BACKENDS:
        yield entry.name, ", ".join(entry.aliases), entry.what, entry.sends, entry.paper


def markdown() -> str:
    """Return the table in Markdown."""
    lines = [COLUMNS, tuple("-" * 3 for _ in COLUMNS), *((f"`{name}`", *rest) for name, *rest in rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def backends(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """List the context-parallel algorithms. U: elements of one of K or V on a rank, s b g d; Uq = s b h d."""
    if as_markdown:
        typer.echo(markdown())
        return
    table = Table()
    for column in COLUMNS:
        table.add_column(column)
    for row in rows():
        table.add_row(*row)
    Console().print(table)
