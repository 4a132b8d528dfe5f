"""`megatron-cp bench`: check results, then time implementations side by side in one run."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.bench_batches import batches
from megatron_cp.cli.bench_documents import documents
from megatron_cp.cli.bench_experts import experts
from megatron_cp.cli.bench_host import host
from megatron_cp.cli.bench_kernels import kernels
from megatron_cp.cli.bench_linears import linears
from megatron_cp.cli.bench_links import links
from megatron_cp.cli.bench_pipeline import pipeline
from megatron_cp.cli.options import Batch, Causal, HeadDim, Heads, KvHeads, several_backends, several_lengths
from megatron_cp.cli.train import FLAGS_AFTER_RECIPE
from megatron_cp.context import BACKENDS
from megatron_cp.kernels import AUTO, KERNELS
from megatron_cp.registry import unknown

if TYPE_CHECKING:
    from megatron_cp.bench.comparison import AttentionShape, BackendResult, Comparison, Implementation
    from megatron_cp.bench.context import BackendReport

app = typer.Typer(
    no_args_is_help=True, help="Check results, then time implementations side by side in one run on this machine."
)
app.command(context_settings=FLAGS_AFTER_RECIPE)(batches)
app.command()(documents)
app.command()(experts)
app.command()(host)
app.command()(kernels)
app.command()(linears)
app.command()(links)
app.command()(pipeline)


@app.command("context")
def context(
    backend: Annotated[
        list[str] | None,
        several_backends("Backend, or all, which is the default; may be repeated."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 2,
    seq: Annotated[
        list[int] | None,
        several_lengths("Tokens of the whole sequence, such as 16K; may be repeated. By default 4096 and 16384."),
    ] = None,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    batch: Batch = 1,
    causal: Causal = True,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    kernel: Annotated[
        str, typer.Option("--kernel", "--cp-kernel", help=f"One of {', '.join((AUTO, *KERNELS.names))}.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which every candidate is timed once.")] = 7,
    native: Annotated[
        bool, typer.Option(help="Give each backend tokens in its own layout, instead of in Megatron's zigzag.")
    ] = False,
    peers: Annotated[bool, typer.Option(help="Time ring-flash-attn and yunchang too, all in native layouts.")] = False,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict", help="Simulate each backend's trace too, with its kernel calls timed in the same rounds."
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw bars into this .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Time backends beside one kernel call over the whole sequence, made by all ranks at once in the same run.

    Without --backend, or with --backend all, Megatron's own attention and torch's context_parallel are timed too.
    """
    from megatron_cp.bench.comparison import DTYPES, AttentionShape
    from megatron_cp.bench.context import Selection, bench
    from megatron_cp.plots.bench import draw_bench
    from megatron_cp.plots.timeline import PICTURES

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if plot and plot.suffix not in PICTURES:
        raise ValueError(f"--plot takes a file that ends in one of: {', '.join(PICTURES)}; got {plot.name!r}")
    all_backends = not backend or "all" in backend
    names = BACKENDS.names if all_backends else [BACKENDS.get(name).name for name in backend or []]
    shapes = [
        AttentionShape(
            tokens,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            batch=batch,
            causal=causal,
            dtype=dtype,
        )
        for tokens in seq or [4096, 16384]
    ]
    selection = Selection(tuple(names), native or peers, UPSTREAM if all_backends else {}, peers, predict)
    report = bench(selection, ranks, shapes, rounds, kernel)
    title = _title(report, shapes[0], ranks)
    if plot:
        draw_bench(report.judged, plot, title)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
        for line in _remarks(report, ranks):
            typer.echo(line, err=True)
    else:
        _show(report, title, ranks)


def _megatron_attention(comparison: "Comparison", name: str) -> "Implementation":
    from megatron_cp.megatron.bench.attention import enter

    return enter(comparison, name)


def _torch_attention(comparison: "Comparison", name: str) -> "Implementation":
    from megatron_cp.bench.torch_cp import enter

    return enter(comparison, name)


UPSTREAM = {"Megatron DotProductAttention": _megatron_attention, "torch context_parallel": _torch_attention}
"""Attention that a user would have without this package; imported where it is measured."""


def wide_console() -> Console:
    """Return a console that is wide enough for our tables where the output is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _title(report: "BackendReport", shape: "AttentionShape", ranks: int) -> str:
    sizes = f"h={shape.heads} g={shape.kv_heads} d={shape.head_dim} {shape.dtype}"
    return f"{ranks} ranks, {sizes}, {'causal' if shape.causal else 'full'}, kernel {report.kernel}"


def _show(report: "BackendReport", title: str, ranks: int) -> None:
    console, predicted = wide_console(), any(row.predicted for row in report.rows)
    table = Table(title=title)
    for column in ("backend", "S", "fwd s", "bwd s", "of ideal", "sent MiB", "peak MiB", "error"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for column in ("predicted", "measured / predicted") if predicted else ():
        table.add_column(column, justify="right")
    for row in report.judged:
        table.add_row(*_cells(row), *(_forecast(row) if predicted else ()))
    console.print(table)
    for line in (*_pairs(report), *_remarks(report, ranks)):
        console.print(line, highlight=False, markup=False)


def _cells(row: "BackendResult") -> list[str]:
    seconds = [_or_dash(value, ".4f") for value in (row.forward, row.backward)]
    share = _or_dash(row.share_of_ideal, ".3f")
    sizes = [_or_dash(row.sent, ".2f", 2**20), _or_dash(row.peak, ".1f", 2**20)]
    name = f"{row.backend} ({row.took.split(';')[0]})" if row.took else row.backend
    return [name, str(row.seq), *seconds, share, *sizes, _or_dash(row.max_error, ".1e")]


def _or_dash(value: float | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def _forecast(row: "BackendResult") -> list[str]:
    """Return the predicted seconds of both passes, and the measured ones over them."""
    if not row.predicted or row.forward is None or row.backward is None:
        return ["-", "-"]
    forward, backward = row.predicted
    both = (row.forward + row.backward) / (forward + backward)
    ratios = f"{row.forward / forward:.3f} + {row.backward / backward:.3f} = {both:.3f}"
    return [f"{forward:.4f} + {backward:.4f}", ratios]


def _pairs(report: "BackendReport") -> Iterator[str]:
    for pair in report.pairs:
        wins = f"faster in {pair.forward.wins} and {pair.backward.wins} of {pair.rounds} rounds"
        yield (
            f"{pair.ours} beside {pair.theirs}, S={pair.seq}: {wins}, "
            f"median of their time over ours {pair.forward} forward, {pair.backward} backward"
        )


def _remarks(report: "BackendReport", ranks: int) -> Iterator[str]:
    """Yield lines below the table: wrong results, refusals, the choice of `auto`, and why times are not trusted."""
    for row in report.rows:
        if row.problem or row.took:
            yield f"{row.backend}, S={row.seq}: {row.problem or row.took}"
    if report.quiet:
        return
    if ranks > report.cores:
        yield f"{ranks} ranks share {report.cores} cores: only exactness, bytes sent and peak count here."
    else:
        yield (
            f"No verdict: a rank got only {report.core_share:.0%} of its core while it only computed; "
            "stop other programs on this machine."
        )
