"""What a schedule is played with: times per stage and hop, and memory kept per stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from megatron_cp.errors import Refused
from megatron_cp.pipeline.placement import Placement


@dataclass(frozen=True)
class Costs:
    """Times in any one unit and memory in any one unit, both per stage and for one microbatch.

    forward, input, weight: F, I and W of each stage; a full backward B takes input + weight
    comm:  delay of one hop between different ranks; sender and receiver stay free meanwhile
    kept:  activations from a stage's F to its I
    held:  the part of them that stays until its W
    unit:  how much of `kept` one rank holds for one whole microbatch (M_B): peaks and caps are counted in it
    """

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    comm: float
    kept: tuple[float, ...]
    held: tuple[float, ...]
    unit: float

    def __post_init__(self) -> None:
        for name in ("forward", "input", "weight"):
            for stage, time in enumerate(getattr(self, name)):
                if not (isfinite(time) and time > 0):
                    raise Refused(f"times must be positive, got {name} time {time} of stage {stage}")
        if not (isfinite(self.comm) and self.comm >= 0):
            raise Refused(f"the time of a hop cannot be negative, got {self.comm}")
        for kept, held in zip(self.kept, self.held, strict=True):
            if not 0 <= held <= kept or not isfinite(kept) or kept == 0:
                raise Refused(f"memory needs 0 <= M_W <= M_B and M_B > 0, got M_B = {kept}, M_W = {held}")

    def work(self, placement: Placement) -> list[float]:
        """Compute time of one microbatch on each rank."""
        times = [sum(parts) for parts in zip(self.forward, self.input, self.weight, strict=True)]
        return [sum(times[stage] for stage in stages) for stages in placement.of_rank]


def uniform(placement: Placement, times: Sequence[float], memory: Sequence[float] = (1.0, 1.0)) -> Costs:
    """The costs of equal stages from those of a whole rank.

    times:  T_F, T_I, T_W and T_comm of all of a rank's layers for one microbatch; a chunk takes T / v, a hop T_comm
    memory: M_B kept from F to I and the part M_W of it kept until W, of all of a rank's layers
    """
    if len(times) != 4:
        raise Refused(f"times are T_F,T_I,T_W,T_comm, four numbers; got {len(times)}")
    if len(memory) != 2:
        raise Refused(f"memory is M_B,M_W, two numbers; got {len(memory)}")
    stages, v = len(placement.rank_of), placement.chunks
    forward, input_gradient, weight = ((time / v,) * stages for time in times[:3])
    kept, held = ((size,) * stages for size in memory)
    return Costs(forward, input_gradient, weight, times[3], kept, held, memory[0] * v)
