"""The `megatron-cp` command: one file per subcommand, each parses, calls one function, prints."""

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
train.register(app)
render.register(app)
validate.register(app)
submit.register(app)
doctor.register(app)
backends.register(app)
simulate.register(app)
trace.register(app)
estimate.register(app)
plan.register(app)
calibrate.register(app)
critical_path.register(app)
inspect.register(app)
report.register(app)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command; what the user got wrong is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"megatron-cp: {error}")
