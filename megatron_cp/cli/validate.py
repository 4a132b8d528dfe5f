"""`megatron-cp validate`: run Megatron's checks of a recipe and our own on a machine without the cluster's GPUs."""

from typing import Annotated

import typer

from megatron_cp import config
from megatron_cp.cli.importing import load
from megatron_cp.cli.train import Flags, RecipeName
from megatron_cp.recipe.command import processes
from megatron_cp.recipe.file import Unset

ClusterName = Annotated[
    str | None,
    typer.Option("--cluster", metavar="NAME|FILE", help="Validate for this cluster instead of the recipe's CLUSTER."),
]


def validate(name: RecipeName, flags: Flags = None, cluster: ClusterName = None) -> None:
    """Check a recipe as its ranks will: Megatron's parser, its arguments and its model config, then our own rules.

    No GPU is needed or used. A recipe that is refused ends with one line and exit code 1.
    """
    variables = Unset(config.environment())
    run = load(name, variables, flags or [])
    from megatron_cp.megatron.arguments.recipe_flags import check_run

    # what needs no import of Megatron first
    check_run(run)
    from megatron_cp.megatron.arguments import validate

    checked = validate.run_of(run, cluster)
    assumed = validate.validate(checked)
    print(f"{run.name}: valid for {processes(run):,} processes on {checked.cluster.name}")
    for text in (*assumed, *(f"variable {name}, which is not set here" for name in variables.names)):
        print(f"  assumed: {text}")
