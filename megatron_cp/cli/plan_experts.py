"""`megatron-cp plan-experts`: the load of ranks before and after copies of busy experts, by each policy."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.errors import Refused
from megatron_cp.experts import PLACEMENTS
from megatron_cp.experts.load import zipf
from megatron_cp.hardware.cluster_file import load_cluster

BEFORE = "none"


def plan_experts(
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer.")] = 64,
    ranks: Annotated[
        int, typer.Option("--ranks", "--expert-model-parallel-size", min=1, help="Ranks that share them.")
    ] = 8,
    spare: Annotated[int, typer.Option(min=0, help="Slots of a rank beside its own experts.")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="Tokens of all ranks, each as often as routed.")] = 131072,
    skew: Annotated[float, typer.Option(min=0, help="Exponent of Zipf's law; 0 for equal loads.")] = 1.2,
    seed: Annotated[
        int | None, typer.Option(help="Which experts are the busy ones; by default the first, all on the first ranks.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Take the loads that a run has logged last, of the layer "
            "with the busiest expert, in the place of --experts, --rows, --skew and --seed.",
        ),
    ] = None,
    neighbours: Annotated[
        int,
        typer.Option("--expert-tensor-parallel-size", min=1, help="With --run, ranks that share each expert there."),
    ] = 1,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 4096,
    ffn: Annotated[int, typer.Option(min=1, help="Width of an expert.")] = 1536,
    cluster: Annotated[str, typer.Option(help="A cluster of configs/clusters, or a file.")] = "dgx-h100",
    policy: Annotated[str, typer.Option(help=f"With commas; all by default: {', '.join(PLACEMENTS.names)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
) -> None:
    """Place copies of busy experts by each policy, and print the load of the ranks before and after.

    Loads follow Zipf's law or are a run's, and tokens of all ranks choose alike. Nothing is run; times are a layer's,
    forward and backward, from the rates of the cluster.
    """
    from megatron_cp.experts.slot_costs import copy_bytes, slot_costs
    from megatron_cp.experts.slots import SlotPlan, Slots, load_of

    if run is not None:
        loads, law = recorded(run, ranks, neighbours)
        experts, rows = len(loads), sum(loads)
    elif experts % ranks:
        raise Refused(f"--experts must be a multiple of --ranks {ranks}, got {experts}; change one of them")
    else:
        loads, law = _drawn(experts, rows, skew, seed), f"Zipf {skew:g}"
    names = [PLACEMENTS.get(name).name for name in policy.replace(",", " ").split()] or PLACEMENTS.names
    counts = [[each / ranks for each in loads] for _ in range(ranks)]
    costs = slot_costs(hidden, ffn, ranks, load_cluster(cluster))
    empty = SlotPlan.empty(Slots(experts, ranks, spare))
    plans = {BEFORE: empty} | {name: PLACEMENTS.get(name).load()(empty, counts, costs) for name in names}
    found: list[dict[str, Any]] = []
    for name, plan in plans.items():
        load = load_of(plan, counts)
        lent = max(*load.lends, *load.hosts) * copy_bytes(hidden, ffn)
        found.append(
            {
                "policy": name,
                "copies": plan.copies,
                "uneven": load.uneven,
                "sent_rows": sum(load.leaving),
                "lent_bytes": lent,
                "seconds": load.seconds(costs),
                "digest": plan.digest,
                "hosted": [list(hosted) for hosted in plan.hosted],
            }
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    title = f"{experts} experts on {ranks} ranks of {cluster} with {spare} spare slots each, {rows:,} rows"
    table = Table("policy", title=f"{title}, {law}, h = {hidden}, f = {ffn}", title_justify="left")
    for column in ("copies", "busiest / mean", "rows sent", "most MB of copies", "ms"):
        table.add_column(column, justify="right")
    for row in found:
        cells = (f"{row['copies']}", f"{row['uneven']:.2f}", f"{row['sent_rows']:,.0f}")
        table.add_row(row["policy"], *cells, f"{row['lent_bytes'] / 1e6:.0f}", f"{row['seconds'] * 1e3:.3g}")
    Console().print(table)


def _drawn(experts: int, rows: int, skew: float, seed: int | None) -> Sequence[int]:
    """Return loads by Zipf's law, busiest first, or shuffled."""
    loads = zipf(experts, rows, skew)
    if seed is not None:
        random.Random(seed).shuffle(loads)
    return loads


def recorded(run: Path, ranks: int, neighbours: int) -> tuple[Sequence[int], str]:
    """Return the loads of the layer whose busiest expert has most of its tokens, and the layer.

    ranks, neighbours: of the run, that share the experts of a layer, and each of them
    """
    from megatron_cp.report import expert_loads

    found = {layer: loads for layer, loads in expert_loads(run, ranks, neighbours).items() if sum(loads)}
    if not found:
        raise Refused(f"{run} has no load of experts above 0; name another run")
    layer = max(found, key=lambda layer: max(found[layer]) * len(found[layer]) / sum(found[layer]))
    return found[layer], layer
