"""The run that this process is part of: its command line, Megatron's parsed arguments, and what rank 0 prints."""

import sys
from collections.abc import Sequence
from typing import Any

from megatron_cp import config


def values_of(argv: Sequence[str], flag: str) -> list[str] | None:
    """What follows the last `flag` on the command line, up to the next flag; None without the flag."""
    found: list[str] | None = None
    taking = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == flag:
            found, taking = [value] if equals else [], not equals
        elif word.startswith("--"):
            taking = False
        elif taking and found is not None:
            found.append(word)
    return found


def global_args() -> Any:
    """Megatron's parsed arguments, None in a program that has not parsed any."""
    # a program that never imported megatron.training has none, and importing it here would cost seconds
    if "megatron.training.global_vars" not in sys.modules:
        return None
    return sys.modules["megatron.training.global_vars"]._GLOBAL_ARGS


def has_our_layers(args: Any) -> bool:
    """Whether the arguments name a layer spec of ours."""
    return bool(args.spec) and args.spec[0].startswith("megatron_cp.")


def say(text: str) -> None:
    """Print our own line, once per run."""
    if config.variable("RANK", "0") == "0":
        print(f"[megatron-cp] {text}", flush=True)
