"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cp.units import count


def tokens(text: str | int) -> int:
    """Return the count that `text` means, such as 128K, for an option of tokens; a default is a number already."""
    if isinstance(text, int):
        return text
    try:
        return count(text, "a number of tokens")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def several_lengths(text: str) -> Any:
    """Return an option of one or several counts of tokens, with this help."""
    return typer.Option("--seq", "--seq-length", parser=tokens, metavar="COUNT", help=text)


def several_backends(text: str) -> Any:
    """Return an option of one or several backends, with this help."""
    return typer.Option("--backend", "--cp-comm-type", help=text)


Heads = Annotated[int, typer.Option("--heads", "--num-attention-heads", min=1, help="Query heads.")]
KvHeads = Annotated[
    int | None,
    typer.Option("--kv-heads", "--num-query-groups", min=1, help="KV heads; by default as many as query heads."),
]
HeadDim = Annotated[int, typer.Option("--head-dim", "--kv-channels", min=1, help="Dim of one head.")]
Skew = Annotated[float, typer.Option(min=0, help="Exponent of Zipf's law for the loads of experts; 0 for equal loads.")]
ExpertLoads = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR",
        help="Take the loads of experts that a run has logged last, of its most uneven layer, in the place of --skew.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", "--micro-batch-size", min=1, help="Sequences.")]
Causal = Annotated[bool, typer.Option(help="Causal mask, or none.")]
ContextRanks = Annotated[int, typer.Option("--ranks", "--context-parallel-size", min=1, help="Context-parallel ranks.")]
WholeSequence = Annotated[
    int,
    typer.Option(
        "--seq", "--seq-length", parser=tokens, metavar="COUNT", help="Tokens of the whole sequence, such as 128K."
    ),
]
