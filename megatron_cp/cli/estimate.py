"""`megatron-cp estimate`: predict a recipe's training step on a cluster, before a GPU hour is spent."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp import config, runlog
from megatron_cp.cli.importing import load
from megatron_cp.cli.options import ExpertLoads, Skew
from megatron_cp.cli.plan_experts import recorded
from megatron_cp.context import AUTO, DEFAULT
from megatron_cp.planner.of_recipe import cluster_for
from megatron_cp.planner.parallel import warnings
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

if TYPE_CHECKING:
    from megatron_cp.context.choose import Record
    from megatron_cp.planner.estimate import Estimate
    from megatron_cp.planner.fit import LeftOut
    from megatron_cp.planner.model import Transformer
    from megatron_cp.planner.parallel import Parallel
    from megatron_cp.planner.published import PublishedRun
    from megatron_cp.planner.work import RankConfig

# more than the recipes' warm-up, which Megatron wants shorter than the run
MEASURED_STEPS = 14
WARM_UP = 2

GPU_FIGURES = {"tokens_per_s_per_gpu": "tokens/s", "samples_per_s_per_gpu": "samples/s", "tflops_per_gpu": "TFLOP/s"}


def estimate(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
    ] = None,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--flag VALUE…]", help="Flags of Megatron and torchrun that win over the recipe's."),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A cluster of configs/clusters/, or a file; by default the recipe's own.")
    ] = None,
    published: Annotated[
        bool, typer.Option(help="Published runs beside their estimates, instead of a recipe.")
    ] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option(help="With --published: each run by rates fitted without it, and runs that no rate was set to."),
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Another recipe, whose estimate stands beside this one.")
    ] = None,
    skew: Skew = 0.0,
    expert_loads: ExpertLoads = None,
    measure: Annotated[
        bool,
        typer.Option(help=f"Train {MEASURED_STEPS} steps on this machine and put them beside the estimate."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate a recipe's time per step, MFU, memory by kind and traffic by link, and name what bounds it."""
    from megatron_cp.context.trace.record import record

    if leave_one_out and not published:
        raise ValueError("--leave-one-out fits the rates to published runs; give --published too")
    if published:
        _published(record, leave_one_out, as_json)
        return
    if name is None:
        raise ValueError("give a recipe, or --published")
    run = load(name, Unset(config.environment()), flags or [])
    found, left_out = estimate_recipe(run, cluster, skew, expert_loads), unmodelled(run)
    other_run = recipe.load(against, Unset(config.environment())) if against else None
    other, other_left_out = (
        (estimate_recipe(other_run, cluster, skew, expert_loads), unmodelled(other_run)) if other_run else (None, [])
    )
    taken = _train(name, flags or []) if measure else None
    if as_json:
        more: dict[str, object] = {} if taken is None else {"measured": taken._asdict()}
        more |= {} if other is None else {"against": {**_as_json(other), "not_in_the_estimate": other_left_out}}
        typer.echo(json.dumps({**_as_json(found), "not_in_the_estimate": left_out, **more}, indent=2))
        return
    _show(found)
    if other is not None:
        _show_beside(found, other)
    if left_out:
        typer.echo(f"not in the estimate: {', '.join(left_out)}")
    if other_left_out:
        typer.echo(f"not in the estimate of {against}: {', '.join(other_left_out)}")
    if taken is not None:
        _compare(found, taken)


def _show_beside(found: "Estimate", other: "Estimate") -> None:
    """Print both estimates in one table, with the change from the other one to this one."""
    from megatron_cp.planner.estimate import IN_WORDS
    from megatron_cp.planner.plans import label

    for title, one in (("this", found), ("against", other)):
        typer.echo(
            f"{title}: {one.model.name} on {one.parallel.world} ranks of {one.cluster.name}: {label(one.parallel)}"
        )
    table = _table("beside each other", ("", "this", "against", "change"))
    rows = {
        "s per step": [one.seconds for one in (found, other)],
        "tokens/s per rank": [one.tokens_per_s_per_gpu for one in (found, other)],
        "MFU, %": [100 * one.mfu for one in (found, other)],
        "GB of the fullest rank": [one.worst_memory.total / 1e9 for one in (found, other)],
        **{f"{what}, s": [getattr(one.parts, part) for one in (found, other)] for part, what in IN_WORDS.items()},
    }
    for title, (here, there) in rows.items():
        table.add_row(title, _figure(here), _figure(there), f"{here / there - 1:+.1%}" if there else "")
    # wide enough that no row of the table is broken
    Console(width=max(100, Console().width), highlight=False).print(table)


class Taken(NamedTuple):
    """Measured steps of training: the median step, and the largest memory of a process."""

    step_seconds: float
    memory_bytes: float


def _train(name: str, flags: Sequence[str]) -> Taken:
    """Train a recipe from the start; raises RuntimeError with its last line when that fails."""
    with TemporaryDirectory() as folder:
        steps = ["--train-iters", str(MEASURED_STEPS), "--save", folder]
        words = [sys.executable, "-m", "megatron_cp", "train", name, *flags, *steps]
        ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        history = runlog.read(Path(folder, runlog.LOG_NAME))
    lines = ran.stdout.splitlines()
    if ran.returncode or len(history) < 2:
        raise RuntimeError(f"training {name} failed: {lines[-1] if lines else 'it printed nothing'}")
    summary: dict[str, Any] = {}
    for line in lines:
        summary |= runlog.read_summary(line) or {}
    steps_ms = [step.fields["elapsed time per iteration (ms)"] for step in history[WARM_UP:]]
    return Taken(median(steps_ms) / 1e3, summary["peak_rss_bytes"])


def _compare(found: "Estimate", taken: Taken) -> None:
    table = _table("beside what it took", ("", "estimated", "measured", "error"))
    for title, estimated, measured in (
        ("s per step", found.seconds, taken.step_seconds),
        ("GB of a process", found.worst_memory.total / 1e9, taken.memory_bytes / 1e9),
    ):
        table.add_row(title, f"{estimated:.4g}", f"{measured:.4g}", f"{estimated / measured - 1:+.1%}")
    Console().print(table)


def estimate_recipe(
    run: recipe.Recipe, cluster: str | None = None, skew: float = 0.0, loads: Path | None = None
) -> "Estimate":
    """Return the estimate of a recipe's step; raises ValueError where neither it nor `cluster` names a cluster.

    skew:  exponent of Zipf's law for the loads of experts
    loads: folder of a run that has logged them
    """
    from megatron_cp.context.trace.record import record
    from megatron_cp.planner.estimate import estimate as of_step
    from megatron_cp.planner.model import model_of
    from megatron_cp.planner.of_recipe import parallel_of
    from megatron_cp.planner.work import RankConfig

    model, machines, seq = model_of(run), cluster_for(run, cluster), run.required("--seq-length")
    parallel = parallel_of(run, model.layers)
    model = loaded_experts(model, skew, loads, parallel.ep, parallel.expert_tp)
    parallel = _settled(RankConfig(model=model, parallel=parallel, cluster=machines, seq=seq))
    return of_step(model, parallel, machines, seq, record)


def loaded_experts(model: "Transformer", skew: float, run: Path | None, ranks: int, neighbours: int) -> "Transformer":
    """Return the model with experts loaded by Zipf's law or as a run has logged them; ValueError for both at once.

    ranks, neighbours: of the run, that share the experts of a layer, and each of them
    """
    if run is None:
        return replace(model, routing=model.routing._replace(skew=skew))
    if skew:
        raise ValueError(f"--skew {skew:g} and --expert-loads both load the experts; give one of the two")
    loads, _ = recorded(run, ranks, neighbours)
    shares = tuple(load / sum(loads) for load in loads)
    return replace(model, routing=model.routing._replace(loads=shares))


def _settled(rank: "RankConfig") -> "Parallel":
    """Return the run with the backend that `auto` stands for on the cluster, as it is chosen in training."""
    from megatron_cp.context.auto import decide
    from megatron_cp.planner.work import problem_of

    parallel = rank.parallel
    if parallel.backend != AUTO:
        return parallel
    if parallel.cp == 1:
        return replace(parallel, backend=DEFAULT)
    best = decide(problem_of(rank), rank.cluster.every(parallel.tp)).problem
    return replace(parallel, backend=best.backend, grid=best.grid, placement=best.placement)


def _as_json(found: "Estimate") -> dict[str, object]:
    return {
        "cluster": found.cluster.name,
        "gpus": found.parallel.world,
        "step_seconds": found.seconds,
        "tokens_per_second_per_gpu": found.tokens_per_s_per_gpu,
        "tflops_per_gpu": found.flops_per_gpu() / 1e12,
        "mfu": found.mfu,
        "bound_by": found.bound_by,
        "parts_seconds": found.parts._asdict(),
        "memory_bytes": found.worst_memory._asdict(),
        "fits": found.fits,
        "warnings": warnings(found.parallel, found.cluster),
        "traffic_bytes": {level: getattr(found.traffic, level)._asdict() for level in ("inside", "between")},
        **({"experts": _experts(found)} if found.model.experts else {}),
    }


def _experts(found: "Estimate") -> dict[str, object]:
    from megatron_cp.planner.dispatch import routed_share
    from megatron_cp.planner.placements import placements

    weighed = found.model.routing.uneven or found.parallel.expert_copies.asked
    copies = [one.as_json() for one in placements(found)] if weighed and found.parallel.ep > 1 else []
    shares = routed_share(found.rank)._asdict()
    return {"dispatch": str(found.rank.dispatch), **shares, **({"placements": copies} if copies else {})}


def _show(found: "Estimate") -> None:
    from megatron_cp.planner.estimate import IN_WORDS

    parallel, console = found.parallel, Console()
    algorithm = f" ({parallel.backend})" if parallel.cp > 1 else ""
    console.print(
        f"{found.model.name} on {parallel.world} ranks of {found.cluster.name}: TP {parallel.tp}, PP {parallel.pp} x "
        f"{parallel.vp}, CP {parallel.cp}{algorithm}, DP {parallel.dp}; {parallel.global_batch} sequences of "
        f"{found.seq} tokens\n"
        f"{found.seconds:.4g} s per step, {found.tokens_per_s_per_gpu:,.0f} tokens/s per rank, "
        f"{found.flops_per_gpu() / 1e12:.4g} TFLOP/s per rank, MFU {found.mfu:.1%}; "
        f"most of it goes into {found.bound_by}",
        highlight=False,
        soft_wrap=True,
    )
    time = _table("a step's time", ("", "seconds", "share"))
    for part, seconds in found.parts._asdict().items():
        time.add_row(IN_WORDS[part], f"{seconds:.4g}", f"{seconds / found.seconds:.1%}")
    console.print(time, _memory(found), _traffic(found))
    if found.model.experts:
        _show_experts(found, console)
    if found.parallel.state_dir is not None:
        console.print(_files(found), highlight=False, soft_wrap=True)
    for warning in warnings(found.parallel, found.cluster):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    if not found.fits:
        console.print(f"does not fit: a rank has {(found.cluster.memory_bytes or 0) / 1e9:,.0f} GB", highlight=False)


def _show_experts(found: "Estimate", console: Console) -> None:
    from megatron_cp.planner.dispatch import dispatch_line
    from megatron_cp.planner.placements import placement_why

    lines = [dispatch_line(found.rank)]
    if found.model.routing.uneven or found.parallel.expert_copies.asked:
        lines.append(placement_why(found))
    for line in filter(None, lines):
        console.print(line, highlight=False, soft_wrap=True)


def _files(found: "Estimate") -> str:
    """Say what the optimizer's state in files takes, and from which tokens on it is next to nothing."""
    from megatron_cp.planner.tiers import FREE, on_disk_seconds, tiers

    parallel = found.parallel
    size = parallel.disk_bytes * found.model.parameters / (parallel.world / parallel.instances)
    seconds = on_disk_seconds(found.cluster, size)
    free = tiers(found.model, found.cluster, found.seq, parallel.precision, parallel.disk_bytes).disk or 0.0
    return (
        f"the optimizer's state is in files: {size / 1e9:.3g} GB a rank, read and written in {seconds:.3g} s where the "
        f"node has no memory for them; that is {FREE:.0%} of the computing from {free:,.0f} tokens a step on, here are "
        f"{parallel.global_batch * found.seq:,}"
    )


def _memory(found: "Estimate") -> Table:
    table = _table("memory of the fullest rank", ("", "GB"))
    for kind, size in found.worst_memory._asdict().items():
        table.add_row(kind, f"{size / 1e9:,.2f}")
    table.add_row("all", f"{found.worst_memory.total / 1e9:,.2f}", style="bold")
    return table


def _traffic(found: "Estimate") -> Table:
    table = _table("sent by a rank in a step, GB", ("", "inside the node", "between nodes"))
    inside, between = found.traffic
    for kind, size in inside._asdict().items():
        table.add_row(kind, f"{size / 1e9:,.3f}", f"{getattr(between, kind) / 1e9:,.3f}")
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """Return a table whose title is the head of its first column, which holds names."""
    table = Table(title)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _figure(value: float) -> str:
    """Return the value with four digits, or with all digits before the point, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _published(record: "Record", leave_one_out: bool, as_json: bool) -> None:
    from megatron_cp.planner.fit import fit, left_out
    from megatron_cp.planner.published import published

    if leave_one_out:
        found = fit(record)
        _show_published(found.runs, as_json, left_out(found, record))
    else:
        _show_published(published(record), as_json)


def _show_published(rows: "Sequence[PublishedRun]", as_json: bool, without: "LeftOut | None" = None) -> None:
    from megatron_cp.planner.published import summary

    sizes = summary([row.error for row in rows])
    more = {} if without is None else without.errors
    if as_json:
        listed = [
            _published_row(row) | {name: errors[at] for name, errors in more.items()} for at, row in enumerate(rows)
        ]
        blind = {} if without is None else {"blind": [_published_row(row) for row in without.blind]}
        typer.echo(json.dumps({"rows": listed, **sizes._asdict(), **blind}, indent=2))
        return
    # wide enough that no row of the table is broken
    console = Console(width=max(120, Console().width), highlight=False)
    console.print(_published_table("per GPU", rows, more))
    console.print(f"{len(rows)} runs, error {sizes.median:.1%} in the median, {sizes.worst:.1%} at worst")
    if without is not None:
        console.print(_published_table("that no rate was set to", without.blind, {}))
        console.print("\n".join(_fit_lines(without)), soft_wrap=True)


def _published_row(row: "PublishedRun") -> dict[str, object]:
    return {name: getattr(row, name) for name in ("name", "source", "unit", "reported", "predicted", "error")}


def _published_table(title: str, rows: "Sequence[PublishedRun]", more: "Mapping[str, Sequence[float]]") -> Table:
    table = _table(title, ("", "reported", "predicted", "error", *more))
    for at, row in enumerate(rows):
        unit = GPU_FIGURES.get(row.unit, "MFU")
        errors = (row.error, *(column[at] for column in more.values()))
        figures = (f"{_figure(row.reported)} {unit}", _figure(row.predicted))
        table.add_row(row.name, *figures, *(f"{error:+.1%}" for error in errors))
    return table


def _fit_lines(without: "LeftOut") -> Iterator[str]:
    from megatron_cp.planner.fit import RATES
    from megatron_cp.planner.published import summary

    yield f"{len(RATES)} rates are fitted: {'; '.join(rate.name for rate in RATES)}"
    errors = without.errors | {"that no rate was set to": [row.error for row in without.blind]}
    for name, each in errors.items():
        sizes = summary(each)
        yield f"runs {name}: {sizes.median:.1%} in the median, {sizes.worst:.1%} at worst"
