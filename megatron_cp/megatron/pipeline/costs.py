"""Costs that a run's schedules are made for: equal times, those of a file, or those of its own first steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cp.errors import Refused
from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.bounds import least_memory
from megatron_cp.pipeline.build import price_of_moves
from megatron_cp.pipeline.costs import Costs, uniform
from megatron_cp.pipeline.costs_file import CostsFile, StageCosts, of_stages, read, refuse_other_model, write
from megatron_cp.pipeline.offload import described
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from megatron_cp.pipeline.slices import SliceShare
from megatron_cp.pipeline.steady import free_step

FILE_NAME = "pipeline-costs.yaml"


@dataclass(frozen=True)
class Known:
    """Costs with their origin for the log, the unit of their times, and the size of M_B where it is known."""

    costs: Costs
    origin: str
    time: str
    unit: str = "M_B"


def equal(placement: Placement, lengths: Sequence[int] = ()) -> Known:
    """Return costs with equal F, I and W in every stage, hops of no time, and equal activations kept until W.

    lengths: tokens of slices of equal cost, which keep activations of so many tokens
    """
    parts = tuple(SliceShare(*(1 / len(lengths),) * 3, length / sum(lengths)) for length in lengths)
    return Known(uniform(placement, (1.0, 1.0, 1.0, 0.0), slices=parts), "for equal F, I and W", "T_F")


def given(settings: Settings, placement: Placement) -> Known | None:
    """Read the costs of `--pp-costs`; raises ValueError for those of another model, or that cannot be read."""
    name = settings.pipeline.costs
    if name is None:
        return None
    assert settings.model, "settings with costs know their model"
    file = read(Path(name))
    refuse_other_model(Path(name), file, settings.model)
    try:
        return _known(file, placement, f"from {name}")
    except ValueError as error:
        raise Refused(f"--pp-costs {name}: {error}") from None


def measured(
    settings: Settings, placement: Placement, stages: Sequence[StageCosts], hop: float, move: float, steps: int
) -> Known:
    """Return the costs that the first steps showed; rank 0 of the run writes them beside its checkpoints.

    hop, move: seconds of a hop, and of moving a byte of activations one way
    """
    assert settings.model, "settings with a profile know their model"
    file = of_stages(settings.model, stages, hop, move, placement)
    if settings.rank == 0 and settings.save:
        write(Path(settings.save) / FILE_NAME, file, steps)
    return _known(file, placement, f"from {steps} measured steps")


def _known(file: CostsFile, placement: Placement, origin: str) -> Known:
    costs = file.costs(placement)
    return Known(costs, origin, "ms", f"M_B of {costs.unit:.4g} MiB")


def caps(settings: Settings, placement: Placement) -> list[float] | None:
    """Return what `--pp-memory-limit` leaves each rank, in M_B."""
    limit = settings.pipeline.memory_limit
    return None if limit is None else [limit] * placement.ranks


def refuse_cap(settings: Settings, placement: Placement, costs: Costs) -> None:
    """Raise ValueError when not even one microbatch at a time fits under `--pp-memory-limit`."""
    limit = settings.pipeline.memory_limit
    least = least_memory(placement, costs)
    if limit is not None and limit < least:
        raise Refused(f"--pp-memory-limit {limit:g} is below the minimum {least:g} M_B, one microbatch at a time")


def describe(schedule: Schedule, known: Known, moving: bool = False, caps: Sequence[float] | None = None) -> list[str]:
    """Return log lines with the schedule and the simulator's prediction, and where asked with what it moves.

    caps: per rank, in M_B
    """
    placement, run = schedule.placement, simulate(schedule, known.costs)
    sizes = f"p={placement.ranks} v={placement.chunks} m={schedule.sequences}"
    peak = " ".join(f"{value:.3g}" for value in run.peak)
    rule = SCHEDULES.get(schedule.name)
    moves = _moves(run, known, caps) if run.moved or rule.lends or moving else []
    late = rule.delay(placement.ranks, schedule.sequences) if rule.delay else None
    versions = (
        [
            f"updates that weights lack, per rank: {' '.join(map(str, late.behind))}; each keeps one version more",
            f"a step of free-running ranks: {free_step(schedule, known.costs):.5g} {known.time}",
        ]
        if late
        else []
    )
    return [
        f"pipeline schedule {schedule.name} ({rule.paper}), {sizes}, placement {placement.name}{_parts(schedule)}",
        f"predicted {known.origin}: makespan {_time(run, known)}, bubble {run.bubble:.4f}, "
        f"peak activations per rank {peak} {known.unit}",
        *moves,
        *versions,
    ]


def _moves(run: SimulatedStep, known: Known, caps: Sequence[float] | None) -> list[str]:
    price = f"; {price_of_moves(run, caps, known.time)}" if run.moved else ""
    lines = [f"activations that move: {described(run.schedule)}{price}"]
    if not known.costs.move:
        lines.append(
            f"the time of a move (T_move) is not known {known.origin} and counts as 0; --pp-profile-steps measures it"
        )
    return lines


def _parts(schedule: Schedule) -> str:
    sliced = f", sequences in {schedule.slices} slices" if schedule.slices > 1 else ""
    return sliced + (f", {schedule.pairs} forwards beside backwards" if schedule.pairs else "")


def figures(known: Known) -> str:
    """Return a log line with the times of every stage."""
    costs = known.costs
    times = [("T_F", costs.forward), ("T_I", costs.input), ("T_W", costs.weight), ("T_comm", (costs.comm,))]
    if costs.move:
        times.append(("T_move", (costs.move,)))
    text = "; ".join(f"{name} {' '.join(f'{value:.4g}' for value in values)}" for name, values in times)
    return f"per stage, in {known.time}: {text}"


def changes(before: Schedule, after: Schedule, known: Known) -> str:
    """Return a log line with the number of moved actions and the predicted gain."""
    old, new = simulate(before, known.costs), simulate(after, known.costs)
    pairs = [pair for ranks in zip(before.table, after.table, strict=True) for pair in zip(*ranks, strict=False)]
    moved = sum(here != there for here, there in pairs)
    return (
        f"rescheduled: {moved} of {sum(map(len, after.table))} actions moved, "
        f"predicted makespan {_time(old, known)} before and {_time(new, known)} now"
    )


def _time(run: SimulatedStep, known: Known) -> str:
    return f"{run.makespan:.5g} {known.time}"
