"""Options that several commands share."""

from typing import Annotated

import typer

Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="KV heads; by default as many as query heads.")]
HeadDim = Annotated[int, typer.Option(min=1, help="Dim of one head.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Causal = Annotated[bool, typer.Option(help="Causal mask, or none.")]
ContextRanks = Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")]
WholeSequence = Annotated[int, typer.Option(min=1, help="Tokens of the whole sequence.")]
