"""The `megatron-cp` command. Each subcommand is one file that parses, calls one function and prints."""

import sys
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Annotated

import typer

from megatron_cp import __version__
from megatron_cp.cli import (
    backends,
    bench,
    calibrate,
    critical_path,
    data,
    doctor,
    estimate,
    importing,
    inspect,
    listing,
    plan,
    plan_batches,
    plan_experts,
    render,
    report,
    simulate,
    submit,
    trace,
    trace_experts,
    train,
    validate,
)

HELP = "Context-parallel attention and pipeline schedules for Megatron-LM: train, plan, prove and measure."

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Megatron's flags go through unread: after RECIPE, or also between our own options
ANYWHERE = {"ignore_unknown_options": True, "allow_extra_args": True}
app.command("train", context_settings=train.FLAGS_AFTER_RECIPE)(train.train)
app.command("import", context_settings=train.FLAGS_AFTER_RECIPE)(importing.import_command)
app.command("render", context_settings=train.FLAGS_AFTER_RECIPE)(render.render)
app.command("validate", context_settings=ANYWHERE)(validate.validate)
app.command("submit", context_settings=train.FLAGS_AFTER_RECIPE)(submit.submit)
app.command("doctor")(doctor.doctor)
app.command("backends")(backends.backends)
app.command("list")(listing.show)
app.command("simulate")(simulate.simulate)
app.command("trace")(trace.trace)
app.command("trace-experts")(trace_experts.trace_experts)
app.command("estimate", context_settings=ANYWHERE)(estimate.estimate)
app.command("plan")(plan.plan)
app.command("plan-batches")(plan_batches.plan_batches)
app.command("plan-experts")(plan_experts.plan_experts)
app.command("calibrate")(calibrate.calibrate)
app.command("critical-path")(critical_path.show)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def _print_version(asked: bool) -> None:
    """Print this version and those of what it stands on, without importing them."""
    if not asked:
        return
    found = [f"Python {python_version()}"]
    for package in ("torch", "megatron-core", "transformer-engine", "flash-attn"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    typer.echo(f"megatron-cp {__version__} ({', '.join(found)})")
    raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the versions and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command; an error of the user is one line on stderr and exit code 1, without a traceback."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"megatron-cp: {error}")
