"""`megatron-cp bench host`: the host time of every backend beside the kernel time that it must hide behind."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.options import Causal, HeadDim, Heads, KvHeads, WholeSequence, several_backends
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters

if TYPE_CHECKING:
    from megatron_cp.bench.host import HostPass, HostTime

COLUMNS = ("backend", "ranks", "fwd ms", "messages", "calls", "merges", "bwd ms", "messages", "calls", "merges")


def host(
    backend: Annotated[
        list[str] | None,
        several_backends("Backend; may be repeated. By default all but auto."),
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(min=1, help="Context-parallel ranks; may be repeated. By default 8 and 32.")
    ] = None,
    seq: WholeSequence = 131072,
    heads: Heads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    causal: Causal = True,
    cluster: Annotated[
        str, typer.Option(help=f"Whose kernels: {', '.join(shipped_clusters())}, or a YAML file.")
    ] = "h100-ib",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Time what Python and torch do in a layer's attention, with a fabric and a kernel that do nothing.

    One rank runs on this machine's CPU, whatever the number of ranks; sending a message costs the process group's own
    time on top. Partial results are merged as on the cluster's device, with a kernel that does nothing either.
    """
    from megatron_cp.bench.host import host_time, kernel_time, merging_on

    names = [BACKENDS.get(name).name for name in backend] if backend else ALGORITHMS
    found, described = [], load_cluster(cluster)
    for count in ranks or (8, 32):
        sizes = (count, heads, kv_heads or heads)
        merging, per_node = merging_on(described, seq, head_dim, count), described.ranks_per_node
        found += [host_time(name, *sizes, causal=causal, merging=merging, per_node=per_node) for name in names]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    for count in ranks or (8, 32):
        times = kernel_time(described, seq, heads, head_dim, count, causal=causal)
        title = (
            f"{count} ranks, host time of a layer; its kernels take {times.forward:.2f} + {times.backward:.2f} ms at "
            f"S={seq} h={heads} d={head_dim} on {described.name}"
        )
        _show(title, [row for row in found if row.ranks == count])


def _show(title: str, rows: "list[HostTime]") -> None:
    console, table = Console(width=140), Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "backend" else "right")
    for row in rows:
        table.add_row(f"{row.backend} {row.grid}".strip(), str(row.ranks), *_cells(row.forward), *_cells(row.backward))
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(f"{row.backend}: {row.problem}", highlight=False, markup=False)


def _cells(one: "HostPass | None") -> list[str]:
    return [f"{one.ms:.2f}", *map(str, one[1:])] if one else ["-"] * 4
