"""`megatron-cp data balance`: compare the layouts of packed documents on streams of a corpus."""

import json
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.lengths import lengths_of
from megatron_cp.cli.options import WholeSequence
from megatron_cp.units import is_whole

DRAWN = 10_000
"""Documents of the mix that is drawn where none are given."""


class Row(NamedTuple):
    """One layout on a number of ranks, over several streams.

    work:     unmasked pairs of the rank with most, over the mean of the ranks, each summed over the streams
    worst:    the same of the stream where it is largest
    received: tokens whose keys come from other ranks, as a share of the stream: mean over ranks and streams
    largest:  the same of the rank with most, as a mean over the streams
    pieces:   stretches of a rank's queries inside one document, in the mean
    """

    ranks: int
    layout: str
    work: float
    worst: float
    received: float
    largest: float
    pieces: float


def balance(
    seq: WholeSequence,
    ranks: Annotated[str, typer.Option(metavar="RANKS", help="Context-parallel ranks, one or more: 8,32,64.")],
    documents: Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX|FILE",
            help="A .bin/.idx pair, or a text file with the tokens of each document; by default "
            f"{DRAWN:,} documents are drawn: most are short, most tokens are in the long ones.",
        ),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams of --seq tokens, spread over the documents.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list instead of a table.")] = False,
) -> None:
    """Compare the layouts of packed documents: work of the ranks, keys that they receive, kernel calls.

    Documents follow each other and are cut into streams of --seq tokens, as Megatron does.
    """
    from megatron_cp.corpus.mixes import streams as cut_streams

    counts = _counts(ranks)
    ends = cut_streams(lengths_or_mix(documents, seq), seq, streams)
    if not ends:
        raise ValueError(f"the documents hold less than --seq {seq} tokens; take a shorter sequence")
    rows = list(_rows(ends, counts))
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    table = Table(
        title=f"{len(ends)} streams of {seq:,} tokens, {sum(map(len, ends)) / len(ends) - 1:.0f} documents each"
    )
    for column in ("ranks", "layout", "work max/mean", "worst stream", "K,V received / S", "most", "pieces"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for row in rows:
        figures = f"{row.work:.3f}", f"{row.worst:.3f}", f"{row.received:.2f}", f"{row.largest:.2f}"
        table.add_row(str(row.ranks), row.layout, *figures, f"{row.pieces:.0f}")
    Console().print(table)


def _rows(streams: list[list[int]], counts: list[int]) -> Iterator[Row]:
    from megatron_cp.context.document_layouts import DOCUMENT_LAYOUTS, loads
    from megatron_cp.context.documents import documents
    from megatron_cp.context.masks import CAUSAL

    packed = [documents(ends) for ends in streams]
    for ranks in counts:
        for name in DOCUMENT_LAYOUTS:
            found = [loads(each.planned(name, ranks), each.mask(CAUSAL)) for each in packed]
            most = [max(load.pairs for load in each) for each in found]
            mean = [sum(load.pairs for load in each) / ranks for each in found]
            share = 1 / (len(packed) * packed[0].tokens)
            yield Row(
                ranks=ranks,
                layout=name,
                work=sum(most) / sum(mean),
                worst=max(a / b for a, b in zip(most, mean, strict=True)),
                received=sum(load.received for each in found for load in each) / ranks * share,
                largest=sum(max(load.received for load in each) for each in found) * share,
                pieces=sum(load.pieces for each in found for load in each) / (ranks * len(packed)),
            )


def _counts(ranks: str) -> list[int]:
    parts = [part.strip() for part in ranks.split(",")]
    if not all(is_whole(part) and int(part) for part in parts):
        raise ValueError(f"--ranks takes whole numbers of 1 or more, as 8,32,64, got {ranks!r}")
    return [int(part) for part in parts]


def lengths_or_mix(given: str | None, longest: int) -> list[int]:
    """Return the tokens of each document, of a mix where none are given; raises ValueError for what holds none."""
    from megatron_cp.corpus.mixes import long_tail

    return long_tail(DRAWN, longest) if given is None else lengths_of(given)
