"""Which costs a run's schedules are made for: equal times, those of a file, or those of its own first steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.bounds import least_memory
from megatron_cp.pipeline.costs import Costs, uniform
from megatron_cp.pipeline.costs_file import CostsFile, Model, StageCosts, of_stages, read, refuse_other_model, write
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import SimulatedStep, simulate

FILE_NAME = "pipeline-costs.yaml"


@dataclass(frozen=True)
class Known:
    """Costs, what to call them, the unit of their times, and what M_B is, if that is known."""

    costs: Costs
    origin: str
    time: str
    unit: str = "M_B"


def equal(placement: Placement) -> Known:
    """F, I and W of every stage take equally long, a hop takes nothing, and all stages keep the same until W."""
    return Known(uniform(placement, (1.0, 1.0, 1.0, 0.0)), "for equal F, I and W", "T_F")


def given(args: Any, placement: Placement) -> Known | None:
    """The costs of `--pp-costs`; raises ValueError for those of another model, or that cannot be read."""
    name = getattr(args, "pp_costs", None)
    if name is None:
        return None
    file = read(Path(name))
    refuse_other_model(Path(name), file, model_of(args))
    try:
        return _known(file, placement, f"from {name}")
    except ValueError as error:
        raise Refused(f"--pp-costs {name}: {error}") from None


def measured(args: Any, placement: Placement, stages: Sequence[StageCosts], hop: float, steps: int) -> Known:
    """The costs that the first steps showed; rank 0 of the run leaves them beside its checkpoints."""
    file = of_stages(model_of(args), stages, hop)
    if args.rank == 0 and args.save:
        write(Path(args.save) / FILE_NAME, file, steps)
    return _known(file, placement, f"from {steps} measured steps")


def _known(file: CostsFile, placement: Placement, origin: str) -> Known:
    costs = file.costs(placement)
    return Known(costs, origin, "ms", f"M_B of {costs.unit:.4g} MiB")


def model_of(args: Any) -> Model:
    """What measured times depend on, from Megatron's arguments."""
    uneven = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    return Model(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size or 1,
        expert_model_parallel_size=args.expert_model_parallel_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_experts=args.num_experts or 0,
        params_dtype=str(args.params_dtype).removeprefix("torch."),
        recompute_granularity=args.recompute_granularity or "none",
        layout=next((str(value) for value in uneven if value is not None), "even"),
    )


def caps(args: Any, placement: Placement) -> list[float] | None:
    """What `--pp-memory-limit` leaves each rank, in M_B."""
    limit = getattr(args, "pp_memory_limit", None)
    return None if limit is None else [limit] * placement.ranks


def refuse_cap(args: Any, placement: Placement, costs: Costs) -> None:
    """Raise ValueError when not even one microbatch at a time fits under `--pp-memory-limit`."""
    limit = getattr(args, "pp_memory_limit", None)
    least = least_memory(placement, costs)
    if limit is not None and limit < least:
        raise Refused(f"--pp-memory-limit {limit:g} is below the minimum {least:g} M_B, one microbatch at a time")


def describe(schedule: Schedule, known: Known) -> list[str]:
    """What runs, and what the simulator makes of it."""
    placement, run = schedule.placement, simulate(schedule, known.costs)
    sizes = f"p={placement.ranks} v={placement.chunks} m={schedule.micros}"
    peak = " ".join(f"{value:.3g}" for value in run.peak)
    return [
        f"pipeline schedule {schedule.name} ({SCHEDULES.get(schedule.name).paper}), {sizes}, "
        f"placement {placement.name}",
        f"predicted {known.origin}: makespan {_time(run, known)}, bubble {run.bubble:.4f}, "
        f"peak activations per rank {peak} {known.unit}",
    ]


def figures(known: Known) -> str:
    """The times of every stage."""
    costs = known.costs
    times = (("T_F", costs.forward), ("T_I", costs.input), ("T_W", costs.weight), ("T_comm", (costs.comm,)))
    text = "; ".join(f"{name} {' '.join(f'{value:.4g}' for value in values)}" for name, values in times)
    return f"per stage, in {known.time}: {text}"


def changes(before: Schedule, after: Schedule, known: Known) -> str:
    """How much of a table another one changes, and what that gains."""
    old, new = simulate(before, known.costs), simulate(after, known.costs)
    pairs = [pair for ranks in zip(before.table, after.table, strict=True) for pair in zip(*ranks, strict=False)]
    moved = sum(here != there for here, there in pairs)
    return (
        f"rescheduled: {moved} of {sum(map(len, after.table))} actions moved, "
        f"predicted makespan {_time(old, known)} before and {_time(new, known)} now"
    )


def _time(run: SimulatedStep, known: Known) -> str:
    return f"{run.makespan:.5g} {known.time}"
