"""`megatron-cp bench`: correctness first, then time, side by side in one run."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.bench_kernels import kernels
from megatron_cp.cli.bench_links import links
from megatron_cp.context import BACKENDS

if TYPE_CHECKING:
    from megatron_cp.bench.contest import Shape
    from megatron_cp.bench.context import Report

app = typer.Typer(no_args_is_help=True, help=__doc__)
app.command()(kernels)
app.command()(links)


@app.command("context")
def context(
    backend: Annotated[list[str] | None, typer.Option(help="Backend, or all; may be repeated.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 2,
    seq: Annotated[list[int] | None, typer.Option(help="Tokens of the whole sequence; may be repeated.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="KV heads; as many as query heads when not given.")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Dim of one head.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    causal: Annotated[bool, typer.Option(help="Causal mask, or none.")] = True,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    kernel: Annotated[str, typer.Option(help="Kernel, or auto.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="How often the contenders take turns.")] = 7,
    native: Annotated[bool, typer.Option(help="Tokens lie where each backend wants them, not in zigzag.")] = False,
    peers: Annotated[bool, typer.Option(help="Also ring-flash-attn and yunchang, all in native layouts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Time every backend against one kernel call over the whole sequence, made by all ranks at once in the same run."""
    from megatron_cp.bench.contest import DTYPES, Shape
    from megatron_cp.bench.context import Contenders, bench
    from megatron_cp.registry import suggest

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{suggest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    names = [BACKENDS.get(name).name for name in _chosen(backend)]
    shapes = [
        Shape(tokens, heads, kv_heads or heads, head_dim, batch, causal, dtype) for tokens in seq or [4096, 16384]
    ]
    report = bench(Contenders(tuple(names), native or peers, peers), ranks, shapes, rounds, kernel)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        _show(report, shapes, ranks)


def wide_console() -> Console:
    """A console that does not fold tables where there is no terminal to fit them into."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _chosen(backend: list[str] | None) -> list[str]:
    return BACKENDS.names if not backend or "all" in backend else backend


def _show(report: "Report", shapes: "list[Shape]", ranks: int) -> None:
    console, shape, quiet = wide_console(), shapes[0], report.quiet
    table = Table(
        title=f"{ranks} ranks, h={shape.heads} g={shape.kv_heads} d={shape.head_dim} {shape.dtype}, "
        f"{'causal' if shape.causal else 'full'}, kernel {report.kernel}"
    )
    for column in ("backend", "S", "fwd s", "bwd s", "of ideal", "sent MiB", "peak MiB", "error"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for row in report.rows:
        share = f"{row.share_of_ideal:.3f}" if quiet else "-"
        sizes = (f"{row.sent / 2**20:.2f}", f"{row.peak / 2**20:.1f}", f"{row.max_error:.1e}")
        if row.note:
            table.add_row(row.backend, str(row.seq), *["-"] * 5, f"{row.max_error:.1e}")
            continue
        table.add_row(row.backend, str(row.seq), f"{row.forward:.4f}", f"{row.backward:.4f}", share, *sizes)
    console.print(table)
    for row in report.rows:
        if row.note:
            console.print(f"{row.backend}, S={row.seq}: wrong, {row.note}", highlight=False)
    if not quiet:
        console.print(
            f"No verdict: a rank got only {report.core_share:.0%} of its core while it did nothing but compute; "
            "stop what else runs here, or use at most one rank per core."
        )
