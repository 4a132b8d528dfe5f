"""`megatron-cp bench kernels`: check and time attention kernels on one device."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.options import Batch, Causal, HeadDim, Heads, KvHeads, several_lengths
from megatron_cp.registry import unknown

if TYPE_CHECKING:
    from megatron_cp.bench.kernels import KernelReport, KernelResult


def kernels(
    kernel: Annotated[
        list[str] | None, typer.Option(help="Kernel; may be repeated. By default all that can run.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seq: Annotated[
        list[int] | None,
        several_lengths(
            "Tokens of the sequence; may be repeated. By default 1024 to 4096 on a CPU, 8192 to 131072 on a GPU."
        ),
    ] = None,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    batch: Batch = 1,
    causal: Causal = True,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls, of which the fastest counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of a table.")] = False,
) -> None:
    """Check each kernel against the reference, then time its forward and backward pass."""
    from megatron_cp.bench.comparison import DTYPES, AttentionShape
    from megatron_cp.bench.kernels import bench

    for what, value, known in (("dtype", dtype, [*DTYPES]), ("device", device, ["cpu", "cuda"])):
        if value not in known:
            raise unknown(what, value, known)
    if heads % (kv_heads or heads):
        raise ValueError(f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}")
    lengths = seq or ([8192, 16384, 32768, 65536, 131072] if device == "cuda" else [1024, 2048, 4096])
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
        for tokens in lengths
    ]
    report = bench(kernel or [], shapes, device, rounds)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
        return
    mask = "causal, counted as half" if causal else "full"
    _show(report, f"b={batch} h={heads} g={kv_heads or heads} d={head_dim} {dtype}, {mask}; {report.device}")


def _show(report: "KernelReport", title: str) -> None:
    from megatron_cp.kernels.measured import MEASURED

    console, table = Console(), Table(title=title)
    for column in ("kernel", "S", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "error"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in report.rows:
        table.add_row(row.kernel, str(row.seq), *_cells(row))
    console.print(table)
    orders = Table(title="measured orders, which auto goes by")
    for column in ("compute capability", "kernels", "op of torch", "source"):
        orders.add_column(column)
    for entry in MEASURED:
        orders.add_row(".".join(map(str, entry.capability)), ", ".join(entry.order), entry.op, entry.source)
    console.print(orders)
    for line in (report.auto, *report.choices):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(row: "KernelResult") -> list[str]:
    if row.skipped:
        return [f"skipped: {row.skipped}"]
    numbers = (row.forward_ms, row.forward_tflops, row.backward_ms, row.backward_tflops)
    return [*(f"{number:,.3f}" for number in numbers if number is not None), f"{row.error:.1e}"]
