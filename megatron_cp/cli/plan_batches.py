"""`megatron-cp plan-batches`: groups of ranks for the documents of a step, against context parallelism of one size."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.batches import ALGORITHMS
from megatron_cp.cli.lengths import SOURCE, check_picture, drawn_or_read
from megatron_cp.cli.plan import model_source
from megatron_cp.context import DEFAULT
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.parallel import RECOMPUTE, Parallel
from megatron_cp.planner.plan_request import HEADROOM
from megatron_cp.recipe import recipe
from megatron_cp.units import count

if TYPE_CHECKING:
    from megatron_cp.batches.group_rates import GroupRequest
    from megatron_cp.batches.problem import BatchProblem
    from megatron_cp.batches.steps import PlannedSteps

BASELINES = ("static", "homogeneous")
DOCUMENTS = 512


def plan_batches(
    source: Annotated[str | None, typer.Argument(metavar="PREFIX|FILE|MIX", help=SOURCE)] = None,
    ranks: Annotated[str, typer.Option(help="GPUs in all.")] = "",
    model: Annotated[str, typer.Option(help="A model of configs/models, such as llama3.1-8b, or a recipe file.")] = "",
    cluster: Annotated[str, typer.Option(help="A cluster of configs/clusters, or a file.")] = "",
    algorithm: Annotated[
        str, typer.Option(help=f"Beside the baselines, with commas; all by default: {', '.join(ALGORITHMS.names)}.")
    ] = "",
    documents: Annotated[
        str, typer.Option("--global-batch-size", help="Documents of a step, in the order of the corpus.")
    ] = str(DOCUMENTS),
    steps: Annotated[int, typer.Option(min=1, help="Steps to plan, one after the other.")] = 1,
    seq: Annotated[
        str | None, typer.Option("--seq-length", help="Cut longer documents to so many tokens, such as 320K.")
    ] = None,
    tokens_per_rank: Annotated[
        str | None,
        typer.Option("--cp-tokens-per-rank", help="Most tokens of a rank in a slot; by default what memory holds."),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", min=1, help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", min=1, help="Pipeline stages.")] = 1,
    schedule: Annotated[str, typer.Option("--pp-schedule", help="Pipeline schedule.")] = "1f1b",
    backend: Annotated[str, typer.Option("--cp-comm-type", help="Context parallelism inside a group.")] = DEFAULT,
    recompute: Annotated[str, typer.Option(help=f"Recomputation: {', '.join(RECOMPUTE)}.")] = "none",
    headroom: Annotated[float, typer.Option(min=0, max=0.99, help="Share of a GPU's memory to leave free.")] = HEADROOM,
    published: Annotated[
        bool, typer.Option(help="Mixes of published lengths on some models, beside the claims of papers.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the first step's plans: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
) -> None:
    """Divide the data-parallel ranks into groups for every microbatch, and compare the steps with one CP size for all.

    Times come from the same traces and rates as `estimate`. Every plan is checked, and is at or above the lower bound.
    """
    from megatron_cp.batches.group_rates import batch_problem
    from megatron_cp.batches.steps import plan_steps

    if published:
        _show_published(as_json)
        return
    if not (source and ranks and model and cluster):
        raise ValueError("give documents, --ranks, --model and --cluster, or --published")
    check_picture(plot)
    names = [ALGORITHMS.get(name).name for name in algorithm.replace(",", " ").split()] or ALGORITHMS.names
    entries = [entry for entry in ALGORITHMS if entry.name in {*BASELINES, *names}]
    request = _request(ranks, model, cluster, tp, pp, schedule, backend, recompute, headroom)
    capacity = count(tokens_per_rank, "--cp-tokens-per-rank") if tokens_per_rank else None
    whole, longest = count(documents, "--global-batch-size"), count(seq, "--seq-length") if seq else None
    lengths = drawn_or_read(source, whole * steps)[: whole * steps]
    cut = sum(length > longest for length in lengths) if longest else 0
    lengths = [min(length, longest or length) for length in lengths]
    problem = batch_problem(request, tuple(lengths), capacity)
    batches = [range(start, min(start + whole, len(lengths))) for start in range(0, len(lengths), whole)]
    found = [plan_steps(entry, problem, batches) for entry in entries]
    if plot:
        from megatron_cp.plots.batches import draw_plans

        title = (
            f"{len(batches[0])} documents of {source}, {request.model.name} on {ranks} ranks of {request.cluster.name}"
        )
        typer.echo(f"wrote {draw_plans([each.plans[0] for each in found], plot, title)}", err=True)
    if as_json:
        typer.echo(json.dumps(_as_json(problem, found, cut), indent=2))
    else:
        _show(
            request, problem, found, f"{cut:,} documents were cut to {longest:,} tokens (--seq-length)" if cut else ""
        )


def _request(
    ranks: str,
    model: str,
    cluster: str,
    tp: int,
    pp: int,
    schedule: str,
    backend: str,
    recompute: str,
    headroom: float,
) -> "GroupRequest":
    from megatron_cp.batches.group_rates import GroupRequest
    from megatron_cp.context.trace.record import record
    from megatron_cp.context.trace.stretch import stretching
    from megatron_cp.planner.model import model_of

    gpus = count(ranks, "--ranks")
    if gpus % (tp * pp):
        raise Refused(f"--ranks {gpus} must be a multiple of --tp {tp} x --pp {pp}; change one of them")
    parallel = Parallel(
        tp=tp,
        pp=pp,
        dp=gpus // (tp * pp),
        sp=tp > 1,
        global_batch=gpus // (tp * pp),
        schedule=schedule if pp > 1 else None,
        backend=backend,
        recompute=recompute,
        precision="bfloat16",
    )
    described = model_of(recipe.load(model_source(model), {}))
    return GroupRequest(described, parallel, load_cluster(cluster), stretching(record), headroom)


def _show(request: "GroupRequest", problem: "BatchProblem", found: "list[PlannedSteps]", cut: str) -> None:
    parallel, steps = request.parallel, len(found[0].plans)
    console = Console(highlight=False, soft_wrap=True, width=max(120, Console().width))
    console.print(
        f"{request.model.name} on {parallel.world} ranks of {request.cluster.name}, TP {parallel.tp}, "
        f"PP {parallel.pp}: {len(problem.lengths):,} documents, {problem.tokens:,} tokens, "
        f"the longest {max(problem.lengths):,}\n"
        f"{problem.ranks} ranks form groups, each of them holds {problem.capacity:,} tokens of a microbatch"
    )
    table = Table("plan", "s/step", "tokens/s/GPU", "static / plan", "homogeneous / plan", "over the bound", "slots")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_column("groups: degree x number")
    seconds = {each.algorithm: each.seconds for each in found}
    for each in found:
        table.add_row(
            each.algorithm,
            f"{each.seconds / steps:.4g}",
            f"{problem.tokens / each.seconds / parallel.world:,.0f}",
            *(f"{seconds[name] / each.seconds:.2f}" for name in BASELINES),
            f"{each.seconds / each.bound - 1:.1%}",
            f"{sum(len(plan.slots) for plan in each.plans) / steps:.4g}",
            "  ".join(f"{degree} x {number}" for degree, number in sorted(each.degrees.items())),
        )
    console.print(table)
    console.print(
        f"lower bound {found[0].bound / steps:.4g} s/step; {problem.after:.3g} s of each step follow its slots"
    )
    if cut:
        console.print(cut)


def _show_published(as_json: bool) -> None:
    from megatron_cp.batches.published_mixes import CLAIMS, DOCUMENTS, holds, mix_rows
    from megatron_cp.context.trace.record import record
    from megatron_cp.context.trace.stretch import stretching

    rows = list(mix_rows(stretching(record)))
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    names = [name for name in ALGORITHMS.names if name != "static"]
    table = Table("mix", "model", "cluster", "static, s", *(f"{name}" for name in names), "lower bound, s")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        ratios = [f"{row.seconds['static'] / row.seconds[name]:.2f}" for name in names]
        static = f"{row.seconds['static']:.4g}"
        table.add_row(row.mix, row.model, f"{row.ranks} x {row.cluster}", static, *ratios, f"{row.bound:.4g}")
    console = Console(highlight=False, soft_wrap=True, width=max(140, Console().width))
    console.print(f"steps of {DOCUMENTS} documents; below a name: static over it")
    console.print(table)
    for claim in CLAIMS:
        kind = "in the mean" if claim.mean else "at most"
        console.print(
            f"{claim.algorithm}: {claim.ratio:.2f} claimed {kind} ({claim.words}; {claim.source}); "
            f"{holds(claim, rows)} here"
        )


def _as_json(problem: "BatchProblem", found: "list[PlannedSteps]", cut: int) -> dict[str, object]:
    return {
        "documents": len(problem.lengths),
        "tokens": problem.tokens,
        "cut": cut,
        "ranks": problem.ranks,
        "tokens_per_rank": problem.capacity,
        "plans": [
            {
                "algorithm": each.algorithm,
                "seconds": each.seconds,
                "bound": each.bound,
                "degrees": dict(sorted(each.degrees.items())),
                "steps": [
                    {
                        "digest": plan.digest,
                        "seconds": plan.seconds,
                        "slots": [
                            [
                                {"first": group.first, "degree": group.degree, "documents": documents}
                                for group in slot
                                if (documents := [step[at] for at in group.documents])
                            ]
                            for slot in plan.slots
                        ],
                    }
                    for step, plan in zip(each.documents, each.plans, strict=True)
                ],
            }
            for each in found
        ],
    }
