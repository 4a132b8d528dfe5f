"""`megatron-cp render`: print the commands, or the SLURM script, of a recipe."""

from typing import Annotated

import typer

from megatron_cp.cli.submit import print_script
from megatron_cp.cli.train import Flags, RecipeName, load_checked
from megatron_cp.recipe.command import command, complete, corpus_command


def render(
    name: RecipeName,
    flags: Flags = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print the script for sbatch instead.")] = False,
) -> None:
    """Print the exact commands of a recipe, ready to be pasted into a shell."""
    if slurm or "--slurm" in (flags or []):
        print_script([name, *(flags or [])])
        return
    run = load_checked(name, flags or [])
    if run.builds_corpus:
        print(corpus_command(run))
    print(command(complete(run)))
