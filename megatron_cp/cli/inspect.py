"""`megatron-cp inspect`: describe a checkpoint, check that it is complete, list the topologies that can load it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from megatron_cp.quiet import without_import_warnings

if TYPE_CHECKING:
    from megatron_cp.megatron.checkpoint.contents import Contents


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A --save folder, or one iteration in it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Describe a checkpoint and list the topologies that can load it; exit code 1 when the one to resume is damaged."""
    without_import_warnings()
    from megatron_cp.megatron.checkpoint import contents

    if not checkpoint.is_dir():
        raise ValueError(f"no folder {checkpoint}; name a --save folder or one iteration in it")
    folders = contents.iterations(checkpoint)
    if not folders:
        raise ValueError(f"{checkpoint} holds no checkpoint: no folder iter_* or release in it")
    all_found = [contents.read(folder) for folder in folders]
    newest = contents.chosen(checkpoint) or folders[-1]
    found = next((one for one in all_found if one.folder == newest), None)
    if found is None:
        raise ValueError(f"{checkpoint} names {newest.name} as the one to resume from, which does not exist")
    if as_json:
        typer.echo(json.dumps({**_plain(found), "iterations": [_plain(one) for one in all_found]}, indent=2))
    else:
        _print(found, all_found)
    raise typer.Exit(1 if found.damage else 0)


def _plain(found: "Contents") -> dict[str, Any]:
    return {**found._asdict(), "folder": str(found.folder), "stored": found.stored._asdict()}


def _print(found: "Contents", all_found: "list[Contents]") -> None:
    console = Console(soft_wrap=True, highlight=False)
    for one in all_found:
        mark = "[red]DAMAGED[/red]" if one.damage else "whole"
        resumed = ", resumed from here" if one is found else ""
        console.print(f"{one.folder.name}  {mark}{resumed}")
        for problem in one.damage:
            console.print(f"    {escape(problem)}")
    if found.damage:
        return
    sizes = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in found.stored._asdict().items())
    console.print(f"parameters  {found.parameters:,} in {', '.join(found.dtypes)}; on disk {sizes}")
    for name, value in found.saved.items():
        if value is not None:
            console.print(f"  {name}  {value}")
    console.print("can be loaded with")
    for flag, values in found.takes.items():
        console.print(f"  {flag}  {values}")
    console.print(f"optimizer state  {found.optimizer}")
