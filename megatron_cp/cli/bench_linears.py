"""`megatron-cp bench linears`: the engines of tensor-parallel linears against each other on this machine."""

import json
import statistics
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.tensor import COLLECTIVE, PANELS, RING
from megatron_cp.tensor.place import GridSize


def linears(
    ranks: Annotated[int, typer.Option(min=2, help="Processes, each on its own core or GPU.")] = 2,
    weights: Annotated[int, typer.Option(min=1, help="Of them, how many gather weights; the others tokens.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of the group.")] = 4096,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 1024,
    ffn: Annotated[int | None, typer.Option(min=1, help="Width of the MLP; by default 4 hidden sizes.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each engine, in turns.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Time forward and backward of one layer's linears: collectives and the ring in turns, results compared first.

    With --weights also weights in panels. The ratio to the collectives is that of the medians, with its smallest and
    largest value of one round. Computing is the process's own time: on a shared processor it is less than the round's.
    """
    from megatron_cp.bench.linears import LinearBench, measure_linears

    width = ffn or 4 * hidden
    if ranks % weights or any(size % ranks for size in (seq, hidden, width)):
        raise ValueError(
            f"--ranks {ranks} must be a multiple of --weights and divide --seq, --hidden and --ffn, got {weights}, "
            f"{seq}, {hidden} and {width}; change one of them"
        )
    bench = LinearBench(seq, hidden, width, rounds)
    engines = (COLLECTIVE, RING, *([PANELS] if weights > 1 else []))
    found = measure_linears(ranks, GridSize(ranks // weights, weights), engines, bench)
    if as_json:
        shown = [
            {
                **each._asdict(),
                "median": each.median,
                "of_collective": each.median / found[0].median,
                "of_collective_in_rounds": each.over(found[0]),
            }
            for each in found
        ]
        typer.echo(json.dumps(shown, indent=2))
        return
    table = Table(title=f"linears of a layer, {ranks} ranks, T = {seq}, h = {hidden}, forward and backward")
    for column in ("engine", "median ms", "fastest", "slowest", "computing ms", "of collective", "in rounds"):
        table.add_column(column, justify="right")
    for each in found:
        ratios = each.over(found[0])
        seconds = (each.median, *each.spread, statistics.median(each.computing))
        cells = [f"{one * 1e3:.1f}" for one in seconds]
        of_medians = f"{each.median / found[0].median:.3f}"
        table.add_row(each.engine, *cells, of_medians, f"{min(ratios):.3f} to {max(ratios):.3f}")
    Console().print(table)
