"""`megatron-cp doctor`: report what works on this machine, what does not, and how to repair it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from megatron_cp.findings import Finding
from megatron_cp.quiet import without_import_warnings

MARKS = {"ok": "[green]ok[/green]      ", "optional": "[yellow]optional[/yellow]", "broken": "[red]BROKEN[/red]  "}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    node: Annotated[bool, typer.Option("--node", help="Check only what a node of a job needs; takes seconds.")] = False,
    gpus: Annotated[
        int, typer.Option("--gpus", "--gpus-per-node", help="With --node: the GPUs that must be usable.")
    ] = 0,
    free_gb: Annotated[float, typer.Option(help="With --node: the GB that must be free in the folder.")] = 0,
    master_addr: Annotated[str, typer.Option(help="With --node: the address of the first node.")] = "",
    report: Annotated[Path | None, typer.Option(help="With --node: a shared folder to leave a report in.")] = None,
    reports: Annotated[Path | None, typer.Option(help="Read the reports of NODE… and name those to avoid.")] = None,
    nodes: Annotated[list[str] | None, typer.Argument(metavar="[NODE…]", help="With --reports: all nodes.")] = None,
) -> None:
    """Report versions, devices, hooks and one parity step of every backend; exit code 1 when something is broken."""
    if reports is not None:
        _judge(reports, nodes or [])
    elif node:
        from megatron_cp.slurm import preflight

        folder = report or Path()
        found = preflight.examine(preflight.Wanted(gpus, int(free_gb * 1e9), folder, master_addr))
        if report is not None:
            preflight.write(found, report)
        _show(found.findings, as_json)
    else:
        without_import_warnings()
        from megatron_cp.cli.examine import examine

        _show(examine(_tell), as_json)


def _tell(doing: str) -> None:
    typer.echo(f"[megatron-cp] {doing}", err=True)


def _show(findings: Iterable[Finding], as_json: bool) -> None:
    console, seen = Console(soft_wrap=True, highlight=False), []
    for finding in findings:
        seen.append(finding)
        if not as_json:
            console.print(f"{MARKS[finding.status]} {escape(f'{finding.subject}: {finding.found}')}")
            if finding.remedy:
                console.print(f"         -> {escape(finding.remedy)}")
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in seen], indent=2))
    broken = sum(finding.status == "broken" for finding in seen)
    if broken and not as_json:
        console.print(f"{broken} of {len(seen)} findings are broken")
    raise typer.Exit(1 if broken else 0)


def _judge(folder: Path, nodes: list[str]) -> None:
    from megatron_cp.slurm import preflight

    bad = preflight.verdict(preflight.read(folder, nodes), nodes)
    for node, reasons in bad.items():
        for reason in reasons:
            print(f"[megatron-cp] node {node}: {reason}")
    if bad:
        print(f"[megatron-cp] {len(bad)} of {len(nodes)} nodes failed; without them: --exclude={','.join(bad)}")
    raise typer.Exit(1 if bad else 0)
