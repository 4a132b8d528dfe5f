"""`megatron-cp bench experts`: products of a rank's experts, or exchanges of several ranks, on this machine."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.errors import Refused
from megatron_cp.experts import FASTERMOE, TWO_HOP
from megatron_cp.experts.degree import check_pieces
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch
from megatron_cp.experts.groups import check_group
from megatron_cp.experts.nodes import ranks_of_a_node
from megatron_cp.registry import unknown
from megatron_cp.units import count

if TYPE_CHECKING:
    from megatron_cp.experts.routed_layer import LayerSize


def experts(
    experts: Annotated[int, typer.Option(min=1, help="Experts of a rank; with --ranks, of all ranks.")] = 64,
    rows: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens that a rank's experts see, each as often as routed; with --ranks, that it sends."
        ),
    ] = 4096,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 256,
    ffn: Annotated[int, typer.Option(min=1, help="Width of an expert.")] = 256,
    skew: Annotated[float, typer.Option(min=0, help="Exponent of Zipf's law; 0 for equal loads.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each product or exchange, in turns.")] = 9,
    ranks: Annotated[
        int,
        typer.Option(min=1, help="Processes that share the experts, each on its own core or GPU: time exchanges."),
    ] = 1,
    ranks_per_node: Annotated[
        int | None,
        typer.Option("--moe-ranks-per-node", min=1, help="With --ranks, also exchange in two hops, nodes so large."),
    ] = None,
    pieces: Annotated[
        str,
        typer.Option("--moe-pieces", help="With --ranks, numbers of pieces beside whole microbatches, with commas."),
    ] = "",
    groups: Annotated[
        str,
        typer.Option(
            "--moe-group-ranks", help="With --ranks, sizes of groups of ranks to send to in turn, with commas."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
) -> None:
    """Time a rank's gated experts, forward and backward: each product in turns with experts one by one.

    Results are compared first. Experts have loads by Zipf's law, the busiest first. With --ranks above 1 it is a layer
    of experts that the ranks share: two hops, pieces and groups of ranks in turns with one exchange, in float32.
    """
    if ranks > 1:
        from megatron_cp.experts.routed_layer import LayerSize

        size = LayerSize(experts, rows, hidden, ffn, skew)
        _exchanges(ranks, size, ways_of(ranks, experts, ranks_per_node, pieces, groups), rounds, as_json)
        return
    if ranks_per_node or pieces or groups:
        raise Refused(
            "--moe-ranks-per-node, --moe-pieces and --moe-group-ranks are of an exchange, got --ranks 1; pass --ranks 2"
        )
    import torch

    from megatron_cp.bench.experts import CLOSE, ExpertBench, measure

    if dtype not in CLOSE:
        raise unknown("dtype", dtype, CLOSE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, choice = measure(ExpertBench(experts, rows, hidden, ffn, skew, dtype, rounds), device)
    if as_json:
        times = [{**each._asdict(), "median": each.median} for each in found]
        typer.echo(json.dumps({"auto": choice.name, "why": choice.why, "times": times}, indent=2))
        return
    title = f"{experts} experts, {rows} rows, h = {hidden}, f = {ffn}, Zipf {skew:g}, {dtype} on {device}"
    table = Table(title=f"{title}, forward and backward")
    for column in ("product", "median ms", "fastest", "slowest", f"of {found[0].product}"):
        table.add_column(column, justify="right")
    for each in found:
        cells = [f"{seconds * 1e3:.1f}" for seconds in (each.median, *each.spread)]
        table.add_row(each.product, *cells, f"{each.median / found[0].median:.3f}")
    console = Console()
    console.print(table)
    console.print(f"--moe-grouped-product auto takes {choice}", highlight=False, markup=False)


def ways_of(ranks: int, experts: int, per_node: int | None, pieces: str, groups: str = "") -> list[Dispatch]:
    """Return one exchange, that in two hops where nodes are given, both in pieces, and those with groups of ranks.

    Raises ValueError for unequal nodes or groups.
    """
    if experts % ranks:
        raise Refused(f"--experts must be a multiple of --ranks {ranks}, got {experts}; change one of them")
    found = [STOCK]
    if per_node is not None:
        found.append(STOCK._replace(comm_type=TWO_HOP, per_node=ranks_of_a_node([r // per_node for r in range(ranks)])))
    numbers = [check_pieces(count(each, "--moe-pieces")) for each in pieces.replace(",", " ").split()]
    sizes = dict.fromkeys(count(each, "--moe-group-ranks") for each in groups.replace(",", " ").split())
    for size in sizes:
        check_group(size, ranks)
    cut = [way._replace(pieces=number) for number in dict.fromkeys(numbers) if number > 1 for way in found]
    return [*found, *cut, *(STOCK._replace(comm_type=FASTERMOE, group=size) for size in sizes)]


def _exchanges(ranks: int, size: "LayerSize", ways: list[Dispatch], rounds: int, as_json: bool) -> None:
    from megatron_cp.bench.exchanges import measure_exchanges

    found = measure_exchanges(ranks, size, ways, rounds)
    if as_json:
        times = [
            {**each._asdict(), "median": each.median, "of_alltoall_in_rounds": each.over(found[0])} for each in found
        ]
        typer.echo(json.dumps(times, indent=2))
        return
    title = f"a layer of {size.experts} experts on {ranks} ranks, {size.rows} rows of each, h = {size.hidden}"
    table = Table(title=f"{title}, f = {size.ffn}, Zipf {size.skew:g}, float32, forward and backward")
    for column in ("exchange", "median ms", "fastest", "slowest", f"of {found[0].engine}", "in rounds"):
        table.add_column(column, justify="right")
    for each in found:
        ratios = each.over(found[0])
        cells = [f"{seconds * 1e3:.1f}" for seconds in (each.median, *each.spread)]
        table.add_row(
            each.engine, *cells, f"{each.median / found[0].median:.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"
        )
    Console().print(table)
