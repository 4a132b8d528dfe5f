"""Check the flags of a recipe against Megatron's own parser and our flags."""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_cp.errors import Refused, refuse_together
from megatron_cp.megatron.arguments.foreign_flags import instead_of
from megatron_cp.megatron.arguments.known_flags import kept_parser
from megatron_cp.recipe.command import complete, flag_words, runs_through_us
from megatron_cp.recipe.recipe import TORCHRUN_FLAGS, Recipe, Setting
from megatron_cp.registry import suggest

# --flag and --no-flag take no value
BARE = 0


def check(
    settings: Mapping[str, Setting], known: argparse.ArgumentParser | None = None, others: Iterable[str] = ()
) -> None:
    """Raise ValueError, one line for each flag that Megatron does not have or whose value it would not take.

    others: flags of the command, which may be what is meant by an unknown one
    """
    found = list(problems(settings, known or kept_parser(), others))
    if found:
        raise Refused("\n".join(found))


def check_run(recipe: Recipe, known: argparse.ArgumentParser | None = None, others: Iterable[str] = ()) -> None:
    """Check a run before any rank starts; raises ValueError with the rule and a way out for what ranks would refuse.

    The flags themselves are checked first, with `others` as in `check`. Runs without our attention are left to
    Megatron's own checks.
    """
    known = known or kept_parser()
    check(recipe.model_args, known, others)
    words = flag_words(complete(recipe).model_args)
    from megatron_cp.megatron.arguments import batches, context, pipeline
    from megatron_cp.megatron.arguments.command_line import SPEC, wants_layers
    from megatron_cp.megatron.machine.facts import installed
    from megatron_cp.megatron.run import has_our_layers

    args = known.parse_args(words)
    through_us = runs_through_us(recipe)
    if args.spec is None and through_us and wants_layers(words, installed("transformer_engine")):
        # filled in as the launcher does before its own check
        args.spec, args.create_attention_mask_in_dataloader = list(SPEC), False
    try:
        refuse_together(
            lambda: context.check(args) if has_our_layers(args) else None,
            lambda: pipeline.check_flags(args) if through_us else None,
            lambda: batches.check_plan(args) if through_us else None,
            lambda: pipeline.check_chunks(args),
        )
    except Refused as error:
        raise Refused(with_places(str(error), recipe)) from None


def with_places(text: str, recipe: Recipe) -> str:
    """Append the places of the flags that the line names: as a flag, as Megatron's argument, or by a quoted value."""
    if any(setting.place in text for setting in recipe.model_args.values()):
        return text
    words = set(re.findall(r"--[a-z0-9-]+|[a-z0-9]+(?:_[a-z0-9]+)+|'[^']*'", text))
    places = [
        f"{setting.place} {flag} {setting.text}".rstrip()
        for flag, setting in recipe.model_args.items()
        if words & {flag, flag[2:].replace("-", "_"), *map(repr, setting.values)}
    ]
    return f"{text} ({'; '.join(places)})" if places else text


def problems(
    settings: Mapping[str, Setting], known: argparse.ArgumentParser, others: Iterable[str] = ()
) -> Iterator[str]:
    """Yield one line for each wrong flag, beginning with its place in the recipe; `others` as in `check`."""
    actions = known._option_string_actions
    candidates = (*others, *actions, *TORCHRUN_FLAGS)
    for flag, setting in settings.items():
        if flag not in actions:
            yield f"{setting.place}: unknown flag {flag!r}{instead_of(flag, candidates)}"
        elif text := _problem(actions[flag], setting.values):
            yield f"{setting.place}: {flag} {text}"


def _problem(action: argparse.Action, values: tuple[str, ...]) -> str:
    if action.nargs == BARE:
        return f"takes no value, got {_shown(values)}; write true, or false to take it back" if values else ""
    if not values and action.nargs != "*":
        return "needs a value"
    several = action.nargs in ("*", "+")
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        return f"takes {action.nargs} values, got {len(values)}; write a list"
    if action.nargs is None and len(values) != 1:
        return f"takes one value, got {len(values)}: {_shown(values)}"
    if len(values) > 1 and (flags := [value for value in values if value.startswith("-")]):
        return f"takes no value that begins with a dash among several, got {flags[0]!r}"
    if several and len(values) == 1 and len(values[0].split()) > 1:
        return f"takes several values, got the one text {values[0]!r}; write a list: [{', '.join(values[0].split())}]"
    return next((text for value in values if (text := _wrong(action, value))), "")


def _wrong(action: argparse.Action, text: str) -> str:
    convert: Any = action.type or str
    # a choice is a text, a number, or a member of an enumeration that is looked up by name
    names = [str(getattr(choice, "name", choice)) for choice in action.choices or ()]
    one_of = f"takes one of {', '.join(names)}, got {text!r}{suggest(text, names)}"
    try:
        value = convert(text)
    except (TypeError, ValueError, LookupError, argparse.ArgumentTypeError, AssertionError) as error:
        if names:
            return one_of
        # int and float have a name to show; for Megatron's own types only the error text helps
        named = isinstance(convert, type)
        return f"takes {_article(convert.__name__)}, got {text!r}" if named else f"cannot take {text!r}: {error}"
    return one_of if action.choices is not None and value not in action.choices else ""


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _shown(values: tuple[str, ...]) -> str:
    return " ".join(repr(value) for value in values)
