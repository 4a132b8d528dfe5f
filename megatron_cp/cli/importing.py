"""`megatron-cp import`: make a recipe from a command line, a script or another system's config.

A command or a script may also stand where a recipe may.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_cp import config
from megatron_cp.recipe import recipe
from megatron_cp.recipe.from_command import as_yaml, imported, is_command, whole
from megatron_cp.recipe.recipe import Recipe

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="COMMAND…|SCRIPT [ARGUMENT…]|CONFIG [KEY=VALUE…] [--flag VALUE…]",
        help="A command such as torchrun … pretrain_gpt.py …, in quotes or not, or a bash script that starts one; or a "
        "config: DeepSpeed's .json, Colossal-AI's .py, NeMo's or Megatron-Bridge's .yaml, or their overrides a.b=c, "
        "with flags of Megatron and torchrun that win over it.",
    ),
]


def import_command(
    words: Words,
    write: Annotated[Path | None, typer.Option(help="Write the recipe to this file instead of printing it.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A model of `megatron-cp list models` that the recipe extends."),
    ] = None,
) -> None:
    """Make a recipe from what starts training today: a command, a bash script, or another system's config.

    Megatron's flags are taken unchanged; keys of other systems are mapped, approximated, refused or ignored, each named
    on stderr and at the top of the recipe with the reason. Nothing of a script or config is run: launchers are
    recorded, other commands are left out and named, and so are flags that Megatron does not have.
    """
    from megatron_cp.megatron.arguments.known_flags import kept_parser
    from megatron_cp.megatron.arguments.recipe_flags import problems

    if write and write.exists():
        raise ValueError(f"{write} exists; name another file or remove it")
    made = imported(words, config.environment(), model)
    source = words[0] if len(words) == 1 else shlex.join(words)
    text = as_yaml(made, source if "\n" not in source else source.split("\n")[0].rstrip("\\ ") + " …")
    flags = {flag: setting for flag, setting in made.recipe.model_args.items() if setting.given}
    for line in (*made.told, *problems(flags, kept_parser())):
        typer.echo(f"megatron-cp: {line}", err=True)
    if write is None:
        typer.echo(text, nl=False)
        return
    write.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {write}; check it with: megatron-cp validate {shlex.quote(str(write))} --cluster NAME", err=True)


def load(name: str, variables: Mapping[str, str], flags: Sequence[str] = ()) -> Recipe:
    """Return the recipe called `name` with `flags` on top, or the one of the command or script that they are.

    What the recipe of a command does not have is told on stderr.
    """
    if not is_command(name):
        return recipe.load(name, variables, flags)
    made = imported([name, *flags], config.environment())
    for line in made.told:
        typer.echo(f"megatron-cp: {line}", err=True)
    return whole(made, variables)
