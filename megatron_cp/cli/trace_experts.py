"""`megatron-cp trace-experts`: what the ranks of a layer of experts send and compute, in their order."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.errors import Refused
from megatron_cp.experts import EXCHANGES, FASTERMOE, MEGATRONS, TOKENS, TUTEL, WEIGHTS
from megatron_cp.experts.degree import MOST_PIECES
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch, ExpertRanks, calls_of, group_of
from megatron_cp.experts.nodes import ranks_of_a_node
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster

if TYPE_CHECKING:
    from megatron_cp.context.trace.events import Pass
    from megatron_cp.experts.routed_layer import LayerSize
    from megatron_cp.planner.expert_trace import ExpertTrace, Leg

EXACT = 1e-12


def trace_experts(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")] = 8,
    experts: Annotated[int, typer.Option(min=1, help="Experts of the layer.")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Rows that a rank sends, each token as often as routed.")] = 8192,
    comm_type: Annotated[
        str, typer.Option("--moe-comm-type", help=f"One of {', '.join(EXCHANGES.names)}.")
    ] = MEGATRONS,
    ranks_per_node: Annotated[
        int | None,
        typer.Option("--moe-ranks-per-node", min=1, help="Ranks that two hops take for a node; else the cluster's."),
    ] = None,
    shared: Annotated[
        int, typer.Option("--expert-tensor-parallel-size", min=1, help="Neighbouring ranks that share each expert.")
    ] = 1,
    gather: Annotated[str, typer.Option("--moe-gather", help=f"What these gather, {TOKENS} or {WEIGHTS}.")] = TOKENS,
    pieces: Annotated[
        int, typer.Option("--moe-pieces", min=1, max=MOST_PIECES, help="Pieces that routed tokens are cut into.")
    ] = 1,
    group_ranks: Annotated[
        int | None,
        typer.Option(
            "--moe-group-ranks", min=1, help="Ranks that fastermoe sends to in one step; else a node of the cluster."
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 4096,
    ffn: Annotated[int, typer.Option(min=1, help="Width of an expert.")] = 1536,
    skew: Annotated[float, typer.Option(min=0, help="Exponent of Zipf's law; 0 for equal loads.")] = 0.0,
    rank: Annotated[int, typer.Option(min=0, help="The rank whose steps are printed.")] = 0,
    cluster: Annotated[str, typer.Option(help="A cluster of configs/clusters, or a file.")] = "dgx-h100-ib",
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of tables.")] = False,
) -> None:
    """Prove a layer of experts on its ranks at a small size, then print what a rank sends and computes, in order.

    The exchange, the pieces and the products are those of training, run without data; nothing is a formula. The router
    and the sorting of tokens are left out. Times are those of each step after the one before, as on a CPU.
    """
    from megatron_cp.experts.routed_layer import LayerSize
    from megatron_cp.planner.expert_trace import prove_experts, record_experts

    machines = load_cluster(cluster)
    if experts % ranks:
        raise Refused(f"--experts must be a multiple of --ranks {ranks}, got {experts}; change one of them")
    shape = ExpertRanks(ranks, shared)
    if rank >= shape.all:
        times = f" x --expert-tensor-parallel-size {shared}" if shared > 1 else ""
        raise Refused(f"--rank must be below --ranks {ranks}{times}, got {rank}; change one of them")
    if gather not in (TOKENS, WEIGHTS) or (gather == WEIGHTS and shared == 1) or ffn % shared:
        raise Refused(
            f"--moe-gather must be {TOKENS}, or {WEIGHTS} with --expert-tensor-parallel-size above 1, which divides "
            f"--ffn, got {gather}, {shared} and {ffn}; change one of them"
        )
    exchange = EXCHANGES.get(comm_type)
    if exchange.name == TUTEL:
        raise Refused(f"--moe-comm-type {TUTEL} is chosen for a run; name what that says, or what plan says")
    way = STOCK._replace(comm_type=exchange.name, pieces=pieces if pieces > 1 else exchange.pieces, gather=gather)
    if ranks_per_node is not None and not way.two_hops:
        raise Refused("--moe-ranks-per-node is of an exchange between nodes; add --moe-comm-type two-hop")
    if way.two_hops:
        per_node = ranks_per_node or machines.ranks_per_node
        way = way._replace(per_node=ranks_of_a_node([each * shared // per_node for each in range(ranks)]))
    if group_ranks is not None and not way.by_groups:
        raise Refused(f"--moe-group-ranks is of --moe-comm-type {FASTERMOE} without --moe-pieces; leave it out")
    if way.by_groups:
        if shared > 1:
            raise Refused(f"--moe-comm-type {FASTERMOE} in groups is of whole experts; pass --moe-pieces 2")
        way = way._replace(group=group_ranks)
        way = way._replace(group=group_of(way, shape, machines))
    size = LayerSize(experts, rows, hidden, ffn, skew)
    trace = record_experts(size, way, shape, machines.ranks_per_node, machines.dtype)
    error, passes = (
        prove_experts(size, way, shape, way.per_node),
        _passes(trace, machines, rate_of(size, way, shape, machines)),
    )
    if as_json:
        typer.echo(json.dumps(_as_json(trace, error, way, passes), indent=2))
    else:
        _show(trace, error, f"{way}, {experts} experts on {shape} ranks of {machines.name}", rank, passes)
    if error > EXACT:
        raise typer.Exit(1)


class _Played(NamedTuple):
    """A pass with its name.

    between: bytes that each rank sends to other nodes
    seconds: each step after the one before
    """

    name: str
    run: "Pass"
    between: list[int]
    seconds: float


def rate_of(size: "LayerSize", way: Dispatch, ranks: ExpertRanks, cluster: Cluster) -> float:
    """Return the rate of a product of an expert's rows in the mean, of its shard where tokens are gathered."""
    shards = 1 if way.gather == WEIGHTS else ranks.tensor
    mean = size.rows * ranks.sharing * shards / size.experts / calls_of(way, ranks, cluster)
    return cluster.gemm(cluster.dtype).rate(min(mean, size.hidden, size.ffn / shards))


def _passes(trace: "ExpertTrace", cluster: Cluster, rate: float) -> list[_Played]:
    from megatron_cp.context.trace.simulate import simulate

    hardware = replace(cluster, flops_forward=rate, flops_backward=rate)
    return [
        _Played(name, run, run.sent_between(cluster.ranks_per_node), simulate(run, hardware).time)
        for name, run in (("forward", trace.forward), ("backward", trace.backward))
    ]


def _as_json(trace: "ExpertTrace", error: float, way: Dispatch, passes: list[_Played]) -> dict[str, Any]:
    shown = {
        each.name: {
            "seconds": each.seconds,
            "sent": each.run.sent,
            "between": each.between,
            "peak": each.run.peak,
            "ranks": [[_plain(leg) for leg in of_rank[at]] for of_rank in trace.legs],
        }
        for at, each in enumerate(passes)
    }
    return {"exchange": str(way), "ranks_per_node": way.per_node, "group_ranks": way.group, "error": error, **shown}


def _plain(leg: "Leg") -> dict[str, Any]:
    return {
        "step": leg.what,
        "piece": leg.piece,
        **{
            name: {"messages": messages, "bytes": size}
            for name, (messages, size) in (("inside", leg.inside), ("between", leg.between))
        },
        "flops": leg.flops,
    }


def _show(trace: "ExpertTrace", error: float, title: str, rank: int, passes: list[_Played]) -> None:
    console = Console()
    verdict = "proved: " if error <= EXACT else "NOT EXACT: "
    console.print(f"{verdict}largest relative error {error:.1e} in float64", highlight=False)
    for at, each in enumerate(passes):
        table = Table(title=f"{each.name} of rank {rank}: {title}", title_justify="left")
        for column in ("step", "messages in the node", "MB", "to other nodes", "MB", "GFLOP"):
            table.add_column(column, justify="right")
        for leg in trace.legs[rank][at]:
            levels = [(str(messages), f"{sent / 1e6:.3f}") for messages, sent in (leg.inside, leg.between)]
            table.add_row(f"{leg.what} {leg.piece}", *levels[0], *levels[1], f"{leg.flops / 1e9:.3f}")
        console.print(table)
        console.print(
            f"a rank sends at most {max(each.run.sent) / 1e6:.3f} MB, {max(each.between) / 1e6:.3f} MB to other nodes, "
            f"and has at most {max(each.run.peak) / 1e6:.3f} MB more than its own tensors; {each.seconds * 1e3:.3f} "
            "ms, each step after the one before",
            highlight=False,
            soft_wrap=True,
        )
