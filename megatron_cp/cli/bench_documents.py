"""`megatron-cp bench documents`: layouts of packed documents against each other on this machine."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.data_balance import DRAWN, lengths_or_mix
from megatron_cp.cli.options import HeadDim, Heads, KvHeads, several_backends, tokens
from megatron_cp.context import BACKENDS
from megatron_cp.context.checks import check_document_layout, takes_document_layout
from megatron_cp.context.document_layouts import AUTO, NAMES, STREAM
from megatron_cp.kernels import AUTO as AUTO_KERNEL
from megatron_cp.kernels import KERNELS
from megatron_cp.registry import unknown

BACKENDS_BY_DEFAULT = tuple(
    entry.name
    for entry in BACKENDS
    if entry.capabilities.planned and takes_document_layout(entry) and not entry.needs_grid
)
LAYOUTS_BY_DEFAULT = (STREAM, "blocks")


def documents(
    seq: Annotated[
        int, typer.Option("--seq", "--seq-length", parser=tokens, metavar="COUNT", help="Tokens of a stream.")
    ] = 16384,
    ranks: Annotated[int, typer.Option(min=2, help="Processes, each on its own core or GPU.")] = 2,
    backend: Annotated[
        list[str] | None, several_backends(f"Backend, by default {', '.join(BACKENDS_BY_DEFAULT)}; may be repeated.")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            "--cp-document-layout",
            help=f"One of {', '.join(NAMES)}, by default {' and '.join(LAYOUTS_BY_DEFAULT)}; may be repeated.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--documents",
            metavar="PREFIX|FILE",
            help="A .bin/.idx pair, or a text file with the tokens of each document; by default "
            f"{DRAWN:,} documents are drawn: most are short, most tokens are in the long ones.",
        ),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams of --seq tokens, spread over the documents.")] = 3,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    kernel: Annotated[
        str, typer.Option("--kernel", "--cp-kernel", help=f"One of {', '.join((AUTO_KERNEL, *KERNELS.names))}.")
    ] = AUTO_KERNEL,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which every candidate is timed once.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Time attention over packed documents on several layouts, with the moves of tokens there and back.

    Results are compared with those of one rank first, whose time is that of the whole stream on every rank at once.
    """
    from megatron_cp.bench.comparison import DTYPES, AttentionShape
    from megatron_cp.bench.documents import DocumentsBench, measure_layouts
    from megatron_cp.corpus.mixes import streams as cut_streams

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    names = [BACKENDS.get(name).name for name in backend or BACKENDS_BY_DEFAULT]
    layouts = list(layout or LAYOUTS_BY_DEFAULT)
    for each in layouts:
        if each not in NAMES or each == AUTO:
            raise unknown("document layout", each, [name for name in NAMES if name != AUTO])
    for name in names:
        if set(layouts) != {STREAM}:
            check_document_layout(BACKENDS.get(name), layouts[0], None)
    if seq % (2 * ranks):
        raise ValueError(
            f"--seq must be divisible by 2 * --ranks = {2 * ranks}, got {seq}; use {seq // 2 // ranks * 2 * ranks}"
        )
    ends = cut_streams(lengths_or_mix(lengths, seq), seq, streams)
    if not ends:
        raise ValueError(f"the documents hold less than --seq {seq} tokens; take a shorter sequence")
    bench = DocumentsBench(
        shape=AttentionShape(seq, heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim, dtype=dtype),
        streams=ends,
        cases=[(name, each) for name in names for each in layouts],
        kernel=kernel,
        rounds=rounds,
    )
    found = measure_layouts(ranks, bench)
    if as_json:
        typer.echo(json.dumps([each._asdict() for each in found], indent=2))
        return
    mean = sum(map(len, ends)) / len(ends) - 1
    table = Table(title=f"{len(ends)} streams of {seq:,} tokens, {mean:.0f} documents each, {ranks} ranks")
    for column in ("backend", "layout", "forward ms", "backward ms", "of the first", "work max/mean", "sent MB"):
        table.add_column(column, justify="left" if column in ("backend", "layout") else "right")
    first = found[1]
    for row in found:
        share = (row.forward + row.backward) / (first.forward + first.backward)
        times = f"{row.forward * 1e3:.1f}", f"{row.backward * 1e3:.1f}", f"{share:.3f}"
        table.add_row(row.backend, row.layout, *times, f"{row.work:.3f}", f"{row.sent / 1e6:.2f}")
    Console().print(table)
