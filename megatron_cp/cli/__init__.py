"""The `megatron-cp` command. Each subcommand is one file that parses, calls one function and prints."""

import sys

import typer

from megatron_cp.cli import (
    backends,
    bench,
    calibrate,
    critical_path,
    data,
    doctor,
    estimate,
    inspect,
    plan,
    render,
    report,
    simulate,
    submit,
    trace,
    train,
    validate,
)

HELP = "Context-parallel attention and pipeline schedules for Megatron-LM: train, plan, prove and measure."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
# Megatron's flags go through unread: after RECIPE, or also between our own options
ANYWHERE = {"ignore_unknown_options": True, "allow_extra_args": True}
app.command("train", context_settings=train.FLAGS_AFTER_RECIPE)(train.train)
app.command("render", context_settings=train.FLAGS_AFTER_RECIPE)(render.render)
app.command("validate", context_settings=ANYWHERE)(validate.validate)
app.command("submit", context_settings=train.FLAGS_AFTER_RECIPE)(submit.submit)
app.command("doctor")(doctor.doctor)
app.command("backends")(backends.backends)
app.command("simulate")(simulate.simulate)
app.command("trace")(trace.trace)
app.command("estimate", context_settings=ANYWHERE)(estimate.estimate)
app.command("plan")(plan.plan)
app.command("calibrate")(calibrate.calibrate)
app.command("critical-path")(critical_path.show)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command; an error of the user is one line on stderr and exit code 1, without a traceback."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"megatron-cp: {error}")
