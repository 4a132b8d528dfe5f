"""`megatron-cp data lengths`: the distribution of a corpus's document lengths, in a table and as a picture."""

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.plots.timeline import PICTURES
from megatron_cp.units import is_whole

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
WIDTH = 40
"""Characters of the longest bar."""
DRAWN = 10_000
"""Documents of a mix that are drawn where their number is not given."""
LONGEST = 1 << 20
"""Tokens to which documents of a mix are cut."""
SOURCE = (
    "A .bin/.idx pair, a text file with the tokens of each document, or a mix that is drawn: sft, web, code, books."
)


class Doubling(NamedTuple):
    """Documents of `least` up to twice as many tokens: their number, and the sum of their tokens."""

    least: int
    documents: int
    tokens: int


def lengths(
    source: Annotated[str, typer.Argument(metavar="PREFIX|FILE|MIX", help=SOURCE)],
    plot: Annotated[Path | None, typer.Option(help="Draw it as a picture: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
) -> None:
    """Show how long documents are: quantiles, and for each doubling of the length its documents and its tokens."""
    check_picture(plot)
    found = sorted(drawn_or_read(source, DRAWN))
    quantiles = {share: quantile(found, share) for share in QUANTILES}
    rows = doublings(found)
    if plot:
        from megatron_cp.plots.batches import draw_lengths

        typer.echo(f"wrote {draw_lengths(rows, plot, source)}", err=True)
    if as_json:
        figures = {f"{share:.0%}": tokens for share, tokens in quantiles.items()}
        sizes = {"documents": len(found), "tokens": sum(found), "quantiles": figures}
        typer.echo(json.dumps(sizes | {"doublings": [row._asdict() for row in rows]}, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True, width=max(110, Console().width))
    console.print(f"{len(found):,} documents, {sum(found):,} tokens, {sum(found) / len(found):,.0f} in the mean")
    console.print("  ".join(f"{share:.0%} {tokens:,}" for share, tokens in quantiles.items()))
    console.print(_table(rows))


def _table(rows: list[Doubling]) -> Table:
    documents, tokens = (sum(getattr(row, name) for row in rows) for name in ("documents", "tokens"))
    table = Table("tokens", "documents", "share", "of all tokens", "documents █, tokens ░")
    for column in table.columns[:4]:
        column.justify = "right"
    for row in rows:
        shares = row.documents / documents, row.tokens / tokens
        bars = "\n".join(mark * round(WIDTH * share) for mark, share in zip("█░", shares, strict=True))
        table.add_row(f"{row.least:,}", f"{row.documents:,}", f"{shares[0]:.1%}", f"{shares[1]:.1%}", bars)
    return table


def quantile(ordered: list[int], share: float) -> int:
    """Return the smallest length that at least this share of the documents does not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def doublings(found: list[int]) -> list[Doubling]:
    """Return the documents of each doubling of the length, from the shortest to the longest that there is."""
    levels = range(min(found).bit_length() - 1, max(found).bit_length())
    groups: dict[int, list[int]] = {level: [] for level in levels}
    for length in found:
        groups[length.bit_length() - 1].append(length)
    return [Doubling(1 << level, len(each), sum(each)) for level, each in groups.items()]


def drawn_or_read(source: str, count: int, longest: int = LONGEST) -> list[int]:
    """Return the lengths of a corpus, of a file, or of a mix, of which `count` are drawn and cut to `longest`."""
    from megatron_cp.corpus.mixes import MIXES, drawn

    if source in MIXES and not Path(source).exists() and not Path(f"{source}.idx").exists():
        return drawn(source, count, longest)
    found = lengths_of(source)
    empty = sum(length < 1 for length in found)
    if empty:
        raise ValueError(f"{source} has {empty:,} documents without tokens; leave them out")
    return found


def lengths_of(given: str) -> list[int]:
    """Return the tokens of each document of a corpus or a text file; raises ValueError for what holds none."""
    from megatron_cp.corpus.index import check_prefix, document_lengths

    if not Path(given).is_file():
        return document_lengths(given, check_prefix(given))
    words = Path(given).read_text().split()
    wrong = next((word for word in words if not is_whole(word)), None)
    if wrong is not None or not words:
        raise ValueError(f"{given} must hold the tokens of each document, got {wrong or 'nothing'}")
    return [int(word) for word in words]


def check_picture(file: Path | None) -> None:
    """Raise ValueError for a file that is no picture or has no folder."""
    if file is None:
        return
    if file.suffix not in PICTURES:
        raise ValueError(f"--plot takes a file that ends in {', '.join(PICTURES)}, got {file.name!r}")
    if not file.parent.is_dir():
        raise ValueError(f"no folder {file.parent} to write {file.name} to; make it first")
