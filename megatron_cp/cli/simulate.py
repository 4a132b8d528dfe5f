"""`megatron-cp simulate`: predict the cost of a pipeline schedule before a GPU is spent on it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from megatron_cp.pipeline import SCHEDULES, table_file
from megatron_cp.pipeline.bounds import bound_of
from megatron_cp.pipeline.build import build, check_caps, place, price_of_moves
from megatron_cp.pipeline.costs import LARGEST, Costs, uniform
from megatron_cp.pipeline.offload import Offload, described, limit_of, offload
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.placement import ONE_PIPE, Placement
from megatron_cp.pipeline.schedule import HOST, BadSchedule, Schedule
from megatron_cp.pipeline.simulate import OBJECTIVES, SimulatedStep
from megatron_cp.pipeline.simulate import simulate as play
from megatron_cp.pipeline.slices import SliceShare, flash_shares, flash_times, fractions, shares
from megatron_cp.pipeline.steady import free_step
from megatron_cp.pipeline.vocabulary import BARRIERS, with_head
from megatron_cp.plots.timeline import check_suffix
from megatron_cp.registry import unknown

MOST_RANKS, MOST_PASSES = 512, 200_000
BY_COST, BY_LENGTH = "cost", "length"
LENDERS = {rule.name for rule in SCHEDULES if rule.lends}
PAIRED = [rule.name for rule in SCHEDULES if rule.overlaps]
DELAYS = {rule.name: rule.delay for rule in SCHEDULES if rule.delay}


@dataclass(frozen=True, kw_only=True)
class SimulationRequest:
    """Sizes, times and limits that apply to every schedule to simulate."""

    p: int | None
    m: int | None
    v: int | None
    times: tuple[float, ...]
    memory: tuple[float, ...]
    cap: float | None
    objective: str
    warmup: float | None
    moves: Offload | None
    move: float | None
    sync: float
    tied: float
    slices: int
    slices_by: str
    attention: float
    head: float
    barriers: int
    hidden: float | None

    def costs(self, placement: Placement, split: bool = False) -> Costs:
        """Return the same times and memory for every stage of a placement; `split`: of backwards in I and W."""
        move = self.times[0] if self.move is None else self.move
        costs = uniform(placement, self.times, self.memory, move=move, slices=self.shares(split))
        costs = replace(costs, sync=self.sync, tied=self.tied, hidden=self.hidden or 0.0)
        return with_head(costs, self.head * self.times[0], placement.ranks, self.barriers, placement.pipes)

    def shares(self, split: bool) -> tuple[SliceShare, ...]:
        """Return the parts of a sequence's costs that its slices have."""
        if self.slices < 2:
            return ()
        attention = flash_shares(self.attention, self.times)
        if self.slices_by == BY_LENGTH:
            return shares([1 / self.slices] * self.slices, attention)
        return shares(fractions(self.slices, attention, self.times, split), attention)

    def caps(self, placement: Placement) -> list[float] | None:
        """Return the memory limit of each rank, None without one."""
        return None if self.cap is None else [self.cap] * placement.ranks

    def bound(self, run: SimulatedStep) -> float:
        """Return a lower bound of the makespan."""
        return bound_of(run.schedule, run.costs, self.caps(run.schedule.placement))


def simulate(
    p: Annotated[int | None, typer.Option("-p", "--pipeline-model-parallel-size", help="Pipeline ranks.")] = None,
    m: Annotated[int | None, typer.Option("-m", help="Microbatches of a step.")] = None,
    v: Annotated[
        int | None,
        typer.Option(
            "-v",
            "--num-virtual-stages-per-pipeline-rank",
            help="Chunks per rank; by default what the schedule implies.",
        ),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", "--pp-schedule", help=f"One of {', '.join(SCHEDULES.names)}.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Schedules side by side: names with commas, or all.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="File with your own schedule: per rank a line of 2F0 2I0 2W0 …")
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(
            help="T_F,T_I,T_W of a rank's layers for one microbatch, and T_comm of one hop; any one unit. "
            "[default: 1,1,1,0; with --attention A: 1,1+1.5A,1-A,0]"
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="M_B,M_W of a microbatch: kept from F to I, and the part of it kept until W.")
    ] = "1,1",
    cap: Annotated[
        float | None, typer.Option("--cap", "--pp-memory-limit", help="Most memory of a rank, in M_B.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Warm-up multiplier of izb, 1 to 2.")] = None,
    placement: Annotated[
        str | None, typer.Option("--placement", "--pp-placement", help="Placement for auto: loop or v.")
    ] = None,
    objective: Annotated[str, typer.Option(help=f"Objective of auto: {' or '.join(OBJECTIVES)}.")] = "makespan",
    pp_offload: Annotated[
        str | None,
        typer.Option(
            help="Most chunks whose activations a rank keeps, those needed last move away and back; "
            "auto: the most that fit under --cap."
        ),
    ] = None,
    pp_offload_to: Annotated[
        str | None,
        typer.Option(help="Where --pp-offload moves them: host, or peer, which is rank p-1-r. [default: host]"),
    ] = None,
    move_time: Annotated[
        float | None, typer.Option(help="Time of moving M_B one way, in the unit of --times. [default: T_F]")
    ] = None,
    sync_time: Annotated[
        float,
        typer.Option(
            help="Time of adding up the gradients of a stage that two ranks hold a copy of, in the unit of --times."
        ),
    ] = 0.0,
    tied_time: Annotated[
        float,
        typer.Option(
            help="Time in which the ranks of the first and the last stage add up the gradients of a tied embedding at "
            "the end of a step, in the unit of --times."
        ),
    ] = 0.0,
    slices: Annotated[
        int, typer.Option(help="Parts of every sequence that go through the pipeline one after the other.")
    ] = 1,
    slices_by: Annotated[str, typer.Option(help="Slices of equal cost or of equal length: cost or length.")] = BY_COST,
    attention: Annotated[
        float, typer.Option(help="With --slices, the part of T_F that is causal attention of a whole sequence.")
    ] = 0.0,
    head: Annotated[
        float,
        typer.Option(
            help="Time of the LM head's forward, in T_F; its backward takes twice that. It is on the last rank."
        ),
    ] = 0.0,
    vocab_parallel: Annotated[
        int | None,
        typer.Option(
            "--vocab-parallel",
            "--pp-vocab-parallel",
            help="The LM head over all ranks, which wait for each other 1 or 2 times in every microbatch.",
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            help="Forwards run beside backwards where the schedule has pairs of them ("
            + ", ".join(PAIRED)
            + "): the part of the shorter half that the longer one hides, 0 to 1. [default: one after the other]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the step: .png, .svg, .pdf, or .json for Perfetto.")] = None,
) -> None:
    """Simulate a pipeline schedule: makespan, bubble and peak memory, from the times of one microbatch."""
    if sum(choice is not None for choice in (schedule, compare, table)) != 1:
        raise ValueError("give one of --schedule NAME, --compare all and --table FILE")
    asked = SimulationRequest(
        p=p,
        m=m,
        v=v,
        times=_numbers("times", times) if times else _usual_times(attention),
        memory=_numbers("memory", memory),
        cap=cap,
        objective=objective,
        warmup=warmup,
        moves=_moves(pp_offload, pp_offload_to),
        move=move_time,
        sync=sync_time,
        tied=tied_time,
        slices=slices,
        slices_by=slices_by,
        attention=attention,
        head=head,
        barriers=vocab_parallel or 0,
        hidden=overlap,
    )
    if overlap is not None and not 0 <= overlap <= 1:
        raise ValueError(f"--overlap is the hidden part of a pair's shorter half, 0 to 1, got {overlap:g}")
    if vocab_parallel is not None and vocab_parallel not in BARRIERS:
        raise ValueError(f"--vocab-parallel is the number of barriers in a microbatch, 1 or 2, got {vocab_parallel}")
    if vocab_parallel and table:
        raise ValueError("a --table has its own S and T; leave out --vocab-parallel")
    _check_slices(asked, table)
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if cap is not None and not cap > 0:
        raise ValueError(f"--cap must be a positive number of M_B, got {cap:g}")
    sizes = {"-p": p, "-m": m, "-v": v, "--warmup": warmup, "--placement": placement}
    if table and any(value is not None for value in sizes.values()):
        given = ", ".join(option for option, value in sizes.items() if value is not None)
        raise ValueError(f"a --table has its own sizes; leave out {given}")
    if plot:
        check_suffix(plot)
    if compare is not None:
        if plot:
            raise ValueError("--plot draws one schedule; give --schedule instead of --compare")
        _compare(compare, asked, as_json)
        return
    run = _load(table, asked) if table else _run(schedule or "", asked, warmup, placement)
    if as_json:
        typer.echo(json.dumps(_as_json(run)))
    else:
        _show(run, asked)
    if plot:
        _plot(run, plot)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--{option} must be numbers separated by commas, got {text!r}") from None
    if any(abs(number) > LARGEST for number in numbers):
        raise ValueError(f"--{option} must be numbers of at most {LARGEST:g}, got {text!r}; take a larger unit")
    return numbers


def _usual_times(attention: float) -> tuple[float, ...]:
    return (*flash_times(attention), 0.0) if 0 < attention <= 1 else (1.0, 1.0, 1.0, 0.0)


def _check_slices(asked: SimulationRequest, table: Path | None) -> None:
    if asked.slices < 1:
        raise ValueError(f"--slices is a number from 1 up, got {asked.slices}")
    if asked.slices_by not in (BY_COST, BY_LENGTH):
        raise unknown("--slices-by", asked.slices_by, (BY_COST, BY_LENGTH))
    if asked.slices == 1 and (asked.attention or asked.slices_by != BY_COST):
        given = f"--attention {asked.attention:g}" if asked.attention else f"--slices-by {asked.slices_by}"
        raise ValueError(f"{given} is about slices; give --slices too")
    if asked.slices > 1 and table:
        raise ValueError("a --table has its own microbatches; leave out --slices")


def _moves(text: str | None, to: str | None) -> Offload | None:
    if text is not None:
        return Offload(limit_of(text), to or HOST)
    if to is not None:
        raise ValueError(f"--pp-offload-to {to} is about what --pp-offload N moves; give it too")
    return None


def _check_size(p: int, m: int, v: int) -> None:
    """Raise ValueError for a step that would take minutes to simulate."""
    if p > MOST_RANKS or p * m * v > MOST_PASSES:
        raise ValueError(
            f"a step of at most {MOST_RANKS} ranks and {MOST_PASSES:,} passes, p x m x v, is simulated, got p = {p:,}, "
            f"m = {m:,}, v = {v:,}; take fewer"
        )


def _run(
    name: str, asked: SimulationRequest, warmup: float | None = None, placement: str | None = None
) -> SimulatedStep:
    if asked.p is None or asked.m is None:
        raise ValueError("give the number of ranks -p and of microbatches -m")
    _check_size(asked.p, max(1, asked.m) * asked.slices, max(1, asked.v or 1))
    rule = SCHEDULES.get(name)
    where = place(rule, asked.p, asked.v, placement)
    costs = asked.costs(where, rule.split)
    schedule = build(
        name,
        asked.p,
        asked.m,
        asked.v,
        warmup=warmup,
        overlapped=asked.hidden is not None,
        placement=placement,
        costs=costs,
        caps=asked.caps(where),
        objective=asked.objective,
        moves=asked.moves,
        slices=asked.slices,
        barriers=asked.barriers,
    )
    return play(schedule, costs)


def _load(file: Path, asked: SimulationRequest) -> SimulatedStep:
    read = table_file.read(file)
    schedule = check(read)
    if asked.moves:
        if read.to is not None:
            raise ValueError(f"{file} moves activations by itself; leave --pp-offload out")
        schedule = check(offload(schedule, asked.moves))
    costs = replace(asked, barriers=schedule.barriers).costs(schedule.placement)
    caps = asked.caps(schedule.placement)
    if caps:
        check_caps(schedule, costs, caps)
    return play(schedule, costs)


def _as_json(run: SimulatedStep) -> dict[str, object]:
    moves = {"moved": run.moved, "moved_to": run.schedule.to} if run.moved else {}
    parts = {"slices": [share.kept for share in run.costs.slices]} if run.costs.slices else {}
    shared = {"barriers": run.schedule.barriers} if run.schedule.barriers else {}
    versions = versions_of(run.schedule)
    kept: dict[str, object] = (
        {"versions": versions, "free_step": free_step(run.schedule, run.costs)} if versions else {}
    )
    pipes = run.schedule.placement.pipes
    kept |= {"pairs": pairs, "hidden": run.costs.hidden} if (pairs := run.schedule.pairs) else {}
    kept |= {"copies": pipes} if pipes > 1 else {}
    return {
        "makespan": run.makespan,
        "bubble": run.bubble,
        "span_bubble": run.span_bubble,
        "peak": list(run.peak),
        **moves,
        **parts,
        **shared,
        **kept,
        "actions": [[str(action) for action in actions] for actions in run.schedule.table],
    }


def _show(run: SimulatedStep, asked: SimulationRequest) -> None:
    placement, bound = run.schedule.placement, asked.bound(run)
    sliced = f", slices = {run.schedule.slices}" if run.schedule.slices > 1 else ""
    typer.echo(
        f"{run.schedule.name}: p = {placement.ranks}, m = {run.schedule.sequences}, v = {placement.chunks}, "
        f"placement {placement.name}{sliced}\n"
        f"makespan     {run.makespan:.4f}\n"
        f"bubble       {run.bubble:.4f}   idle share of the makespan\n"
        f"span bubble  {run.span_bubble:.4f}   of the longest rank's span\n"
        f"lower bound  {bound:.4f}   bubble {_least(run, bound):.4f}; gap {run.makespan / bound - 1:.2%}\n"
        f"transfers    {run.transfers}\n"
        f"peak (M_B)   {' '.join(f'{peak:g}' for peak in run.peak)}"
    )
    if placement.pipes > 1:
        typer.echo(f"copies       {placement.pipes} of the model; the makespan ends when their gradients are added up")
    if versions := versions_of(run.schedule):
        typer.echo(f"versions     {' '.join(map(str, versions))}   of the weights, per rank")
        typer.echo(
            f"free step    {free_step(run.schedule, run.costs):.4f}   where no rank waits for another one's update"
        )
    if run.costs.slices:
        typer.echo(f"slices       {' '.join(f'{share.kept:.3f}' for share in run.costs.slices)}   of a sequence")
    if run.schedule.barriers:
        typer.echo(f"LM head      {run.costs.head[0]:.4f} S, {run.costs.head[1]:.4f} T on every rank   {_times(run)}")
    if pairs := run.schedule.pairs:
        typer.echo(f"pairs        {pairs} of F and B; {run.costs.hidden:g} of the shorter half is hidden")
    if asked.moves or run.moved or run.schedule.name in LENDERS:
        typer.echo(f"moves        {described(run.schedule)}")
    if run.moved:
        typer.echo(f"             {price_of_moves(run, asked.caps(placement))}")


def _least(run: SimulatedStep, bound: float) -> float:
    """The bubble of a step as long as the bound, which takes every forward for hidden behind a backward."""
    return max(0.0, 1 - run.work / bound)


def _times(run: SimulatedStep) -> str:
    return f"{run.schedule.barriers} {'barrier' if run.schedule.barriers == 1 else 'barriers'} in a microbatch"


def versions_of(schedule: Schedule) -> list[int]:
    """Return how many versions of its weights each rank keeps; nothing where it is one."""
    delay = DELAYS.get(schedule.name)
    return list(delay(schedule.placement.ranks, schedule.micros).versions) if delay else []


def _plot(run: SimulatedStep, file: Path) -> None:
    from megatron_cp.plots.timeline import bars, draw_timeline

    where = run.schedule.placement
    sizes = f"p = {where.ranks}, m = {run.schedule.sequences}, v = {where.chunks}"
    title = f"{run.schedule.name}, {sizes}: bubble {run.bubble:.1%}, peak {max(run.peak):g} M_B"
    draw_timeline(bars(run), file, title)
    typer.echo(f"timeline: {file}", err=True)


def _simulations(names: str, asked: SimulationRequest) -> Iterator[tuple[str, SimulatedStep | str]]:
    """Yield each schedule of `names` with its simulation, or the reason why it cannot be simulated."""
    for name in SCHEDULES.names if names == "all" else [name.strip() for name in names.split(",")]:
        rule = SCHEDULES.get(name)
        for placement in ONE_PIPE if rule.table is None else [rule.placement]:
            label = rule.name if rule.table else f"{rule.name} ({placement})"
            own = replace(asked, v=rule.chunks or (2 if placement == "v" else asked.v))
            own = own if rule.overlaps else replace(own, hidden=None)
            try:
                yield label, _run(name, own, asked.warmup if rule.takes_warmup else None, placement)
            except BadSchedule as bad:
                yield label, bad.reason
            except ValueError as error:
                yield label, str(error)


def _compare(names: str, asked: SimulationRequest, as_json: bool) -> None:
    # sizes that no schedule accepts are reported once, not in every row
    _run("1f1b", replace(asked, v=None, cap=None, hidden=None))
    simulations = list(_simulations(names, asked))
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {"schedule": name} | (_as_json(run) if isinstance(run, SimulatedStep) else {"error": run})
                    for name, run in simulations
                ]
            )
        )
        return
    typer.echo(
        "fastest first; makespan in the unit of --times, bubble: its idle share, span bubble: that of the longest\n"
        "rank's span, bound: the least bubble at these sizes, peak: most that a rank keeps, in M_B of a microbatch"
    )
    width = max(14, *(len(name) + 1 for name, _ in simulations))
    typer.echo(f"{'schedule':<{width}} v    makespan   bubble  span bubble    bound  peak (M_B)  transfers")
    for name, run in sorted(simulations, key=_makespan):
        typer.echo(f"{name:<{width}}{_row(run, asked) if isinstance(run, SimulatedStep) else f' {run}'}")


def _makespan(named: tuple[str, SimulatedStep | str]) -> float:
    return named[1].makespan if isinstance(named[1], SimulatedStep) else inf


def _row(run: SimulatedStep, asked: SimulationRequest) -> str:
    return (
        f"{run.schedule.placement.chunks:>2}{run.makespan:>12.3f}{run.bubble:>9.4f}{run.span_bubble:>13.4f}"
        f"{_least(run, asked.bound(run)):>9.4f}{max(run.peak):>12g}{run.transfers:>11}"
    )
