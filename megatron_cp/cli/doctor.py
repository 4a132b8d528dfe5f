"""`megatron-cp doctor`: what works here, what does not, and what to do about it."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

MARKS = {"ok": "[green]ok[/green]      ", "optional": "[yellow]optional[/yellow]", "broken": "[red]BROKEN[/red]  "}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False) -> None:
    """Report versions, devices, hooks and one parity step of every backend; exit code 1 when something is broken."""
    from megatron_cp.doctor import examine

    console, findings = Console(soft_wrap=True, highlight=False), []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            console.print(f"{MARKS[finding.status]} {escape(f'{finding.subject}: {finding.found}')}")
            if finding.remedy:
                console.print(f"         -> {escape(finding.remedy)}")
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    broken = sum(finding.status == "broken" for finding in findings)
    if broken and not as_json:
        console.print(f"{broken} of {len(findings)} findings are broken")
    raise typer.Exit(1 if broken else 0)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(doctor)
