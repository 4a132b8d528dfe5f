"""`megatron-cp trace --tp-comm-type`: prove the linears of a layer on ranks, cost them on a cluster and draw them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.context.trace.events import Pass, Problem, Trace
from megatron_cp.context.trace.simulate import SimulatedPass, simulate
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.tensor import AUTO, COLLECTIVE, CUBE, MEGATRONS, SCHEMES
from megatron_cp.tensor.cost import LayerLinears, Placing, cheapest
from megatron_cp.tensor.place import check_engine, cube_side, engine_of, grid_of

EXACT = 1e-12


class AskedLinears(NamedTuple):
    """The linears of a layer and how --tp-comm-type, --tp-grid and --tp-engine place them."""

    layer: LayerLinears
    ranks: int
    scheme: str
    grid: str | None
    engine: str


def layer_of(seq: int, heads: int, kv_heads: int, head_dim: int, ffn: int | None) -> LayerLinears:
    """Return the linears of a gated layer whose hidden size is that of its query heads; `ffn` is 4 times it."""
    hidden = heads * head_dim
    second = ffn or 4 * hidden
    return LayerLinears(seq, hidden, (heads + 2 * kv_heads) * head_dim, hidden, 2 * second, second)


def trace_linears(asked: AskedLinears, cluster: Cluster, files: Sequence[Path], as_json: bool) -> None:
    """Prove, cost and print the linears of one layer; raises ValueError for what cannot be placed."""
    from megatron_cp.planner.linear_trace import prove_linears, record_linears

    placing, chosen = _placing(asked, cluster)
    _check_sizes(asked.layer, asked.ranks)
    trace, error = record_linears(asked.layer, placing, cluster.dtype), prove_linears(placing)
    # products at the rate of the largest one, where attention's stands in the description
    side = cube_side(placing.size.tokens) if placing.scheme == CUBE else 0
    narrowest = min(min(size.inputs, size.outputs) for size in asked.layer.linears)
    narrowest /= side or placing.size.tokens * placing.panels
    rows = asked.layer.tokens / (side or placing.size.weights * placing.pieces)
    rate = cluster.gemm(cluster.dtype).rate(min(narrowest, rows))
    hardware = replace(cluster, flops_forward=rate, flops_backward=rate)
    passes = {"forward": trace.forward, "backward": trace.backward}
    runs = {name: simulate(run, hardware) for name, run in passes.items()}
    sent = (asked.layer.sent_on_cube(side, split=False),) if side else asked.layer.sent(placing.size, split=False)
    formula = sum(sent)
    for file in files:
        _draw(asked, placing, passes, runs, cluster, file)
        typer.echo(f"picture: {file}", err=True)
    if as_json:
        typer.echo(json.dumps(_as_json(placing, error, formula, passes, runs, chosen), indent=2))
    else:
        _show(placing, error, formula, passes, runs, rate, chosen)
    if error > EXACT:
        raise typer.Exit(1)


def _placing(asked: AskedLinears, cluster: Cluster) -> tuple[Placing, str]:
    scheme, grid = SCHEMES.get(asked.scheme), asked.grid.split() if asked.grid else None
    if scheme.name == AUTO or grid == [AUTO]:
        engine = engine_of(asked.engine)
        found = cheapest(
            asked.layer, asked.ranks, cluster, cluster.dtype, split=False, scheme=scheme.name, engine=engine
        )
        return found.placing, found.why
    engine = COLLECTIVE if scheme.name == MEGATRONS else engine_of(asked.engine)
    size = grid_of(scheme, asked.ranks, grid)
    check_engine(engine, scheme, size)
    return Placing(scheme.name, size, engine), ""


def _check_sizes(layer: LayerLinears, ranks: int) -> None:
    for what, size in (("--seq", layer.tokens), ("heads x head dim", layer.query), ("--ffn", layer.second)):
        if size % ranks:
            raise Refused(f"{what} must be divisible by --ranks {ranks}, got {size:g}; change one of the two")


def _draw(
    asked: AskedLinears,
    placing: Placing,
    passes: Mapping[str, Pass],
    runs: Mapping[str, SimulatedPass],
    cluster: Cluster,
    file: Path,
) -> None:
    from megatron_cp.plots.trace import draw, write_events

    # the pictures of context parallelism, of a problem that has its ranks and tokens
    problem = Problem(f"linears {placing}", asked.ranks, round(asked.layer.tokens), dtype=cluster.dtype)
    trace = Trace(problem, passes["forward"], passes["backward"], [])
    if file.suffix == ".json":
        write_events(trace, runs, file)
    else:
        title = f"linears of a layer, {placing}, {asked.ranks} ranks, T = {asked.layer.tokens:g}"
        draw(trace, runs, file, cluster.name, title)


def _sizes(placing: Placing) -> list[int]:
    return [cube_side(placing.size.tokens)] * 3 if placing.scheme == CUBE else list(placing.size)


def _as_json(
    placing: Placing,
    error: float,
    formula: float,
    passes: Mapping[str, Pass],
    runs: Mapping[str, SimulatedPass],
    chosen: str,
) -> dict[str, Any]:
    each = {
        name: {"sent": run.sent, "peak": run.peak, "time": runs[name].time, "traffic": run.traffic}
        for name, run in passes.items()
    }
    head = {"scheme": placing.scheme, "grid": _sizes(placing), "engine": placing.engine, "auto": chosen}
    return {**head, "error": error, "formula_elements": formula, **each}


def _show(
    placing: Placing,
    error: float,
    formula: float,
    passes: Mapping[str, Pass],
    runs: Mapping[str, SimulatedPass],
    rate: float,
    chosen: str,
) -> None:
    from megatron_cp.planner.linear_trace import products_seconds

    console = Console()
    if chosen:
        console.print(f"auto: {chosen}", highlight=False)
    verdict = "proved: " if error <= EXACT else "NOT EXACT: "
    sizes = " x ".join(map(str, _sizes(placing)))
    console.print(f"{verdict}largest relative error {error:.1e} in float64 on {sizes}", highlight=False)
    for name, run in passes.items():
        alone = products_seconds(run, rate)
        table = Table(
            title=f"{placing}, engine {placing.engine}, {name}: {runs[name].time * 1e3:.3f} ms, "
            f"{alone / runs[name].time:.0%} of it the products"
        )
        for column in ("rank", "sent MiB", "peak MiB", "waits"):
            table.add_column(column, justify="right")
        for rank, (sent, peak) in enumerate(zip(run.sent, run.peak, strict=True)):
            waits = 1 - runs[name].busy(rank) / runs[name].time
            table.add_row(str(rank), f"{sent / 2**20:.1f}", f"{peak / 2**20:.1f}", f"{waits:.0%}")
        console.print(table)
    console.print(f"the formula's elements of both passes, per rank: {formula:.6g}", highlight=False)
