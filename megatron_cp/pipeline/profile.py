"""Measure the times and activations of each stage, and the time of a hop, in the first steps of a run.

Every rank measures its own stages with the executor's `observe`. All ranks then use the largest figures over all ranks
of the run, so that all of them find the same schedule.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, largest
from megatron_cp.pipeline.action import FORWARD, FULL, INPUT, WEIGHT, Action, flat
from megatron_cp.pipeline.channels import Channels
from megatron_cp.pipeline.clock import Clock
from megatron_cp.pipeline.costs_file import StageCosts
from megatron_cp.pipeline.execute import complete
from megatron_cp.pipeline.schedule import Schedule

ROUNDS = 5
TIMED = (FORWARD, INPUT, WEIGHT)


def lower_split(schedule: Schedule) -> Schedule:
    """Return the compute table lowered with every backward in two halves and no overlap, so that each is measured."""
    table = tuple(tuple(half for action in flat(cells) for half in _split(action)) for cells in schedule.table)
    return complete(replace(schedule, table=table))


def _split(action: Action) -> tuple[Action, ...]:
    return (action._replace(kind=INPUT), action._replace(kind=WEIGHT)) if action.kind == FULL else (action,)


class Profile:
    """The actions of this rank over some steps, at least 2: the first one warms up, and its times do not count.

    clock:      of the device that computes
    parameters: addresses of storages that autograd saves but that are no activations
    held:       bytes that wait for the W of a stage and microbatch, None where a module keeps its own
    recorded:   bytes of a stage's activations where something else notes what autograd saves
    """

    def __init__(
        self,
        steps: int,
        clock: Clock,
        parameters: Callable[[], set[int]],
        held: Callable[[int, int], int | None],
        recorded: Callable[[int], int] = lambda stage: 0,
    ) -> None:
        self._steps, self._clock, self._parameters, self._held_bytes = steps, clock, parameters, held
        self._recorded = recorded
        self._times: list[dict[tuple[int, str], list[tuple[Any, Any]]]] = []
        self._kept: dict[int, int] = {}
        self._held: dict[int, int | None] = {}

    @property
    def done(self) -> bool:
        return len(self._times) == self._steps

    def begin(self) -> None:
        """Start a step."""
        self._times.append(defaultdict(list))

    @contextmanager
    def observe(self, action: Action) -> Iterator[None]:
        """Note the time and the memory of `action` without waiting for the device."""
        if action.kind not in TIMED:
            yield
            return
        stage, kind, micro = action
        if kind == FORWARD and stage not in self._kept:
            # the hooks cost time: once is enough, all microbatches keep the same
            with saved_bytes(self._parameters()) as found:
                yield
            # hooks inside these, of what moves activations, see the tensors instead
            self._kept[stage] = sum(found.values()) or self._recorded(stage)
            return
        begun = self._clock.mark()
        yield
        ended = self._clock.mark()
        if kind == INPUT and stage not in self._held:
            self._held[stage] = self._held_bytes(stage, micro or 0)
        self._times[-1][stage, kind].append((begun, ended))

    def of(self, stage: int) -> StageCosts:
        """Return the medians over microbatches and steps."""
        forward, given, weight = (self._seconds(stage, kind) for kind in TIMED)
        kept, held = self._kept[stage], self._held[stage]
        # with recomputation more may wait for W than was kept for I, which a cap cannot tell apart
        return StageCosts(forward, given, weight, kept, kept if held is None else min(held, kept))

    def _seconds(self, stage: int, kind: str) -> float:
        self._clock.settle()
        pairs = (pair for step in self._times[1:] for pair in step[stage, kind])
        return median(self._clock.seconds(*pair) for pair in pairs)


@contextmanager
def saved_bytes(known: set[int]) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd saves inside, by address, with their bytes; those of `known` are left out."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        # an output that its own node saved would keep itself alive
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def hop_seconds(channels: Channels, rank: int, ranks: int, buffer: Callable[[], Tensor]) -> float:
    """Return half of a round trip of one activation to this rank's slower neighbour; all ranks call it together."""
    slowest = 0.0
    for lower in (*range(0, ranks - 1, 2), *range(1, ranks - 1, 2)):
        if rank in (lower, lower + 1):
            trips = [_round_trip(channels, rank, lower, buffer()) for _ in range(ROUNDS)]
            slowest = max(slowest, median(trips) / 2)
    return slowest


def _round_trip(channels: Channels, rank: int, lower: int, tensor: Tensor) -> float:
    clock = Clock(tensor.device)
    clock.settle()
    began = perf_counter()
    if rank == lower:
        channels.send(lower + 1, FORWARD, tensor).wait()
        channels.receive(lower + 1, FULL, tensor).wait()
    else:
        channels.receive(lower, FORWARD, tensor).wait()
        channels.send(lower, FULL, tensor).wait()
    clock.settle()
    return perf_counter() - began


def agree(
    fabric: Fabric, device: torch.device, mine: dict[int, StageCosts], stages: int, hop: float, move: float = 0.0
) -> tuple[Sequence[StageCosts], float, float]:
    """Return the largest costs of every stage, of a hop, and of moving a byte, over all ranks: one collective."""
    none = StageCosts(0, 0, 0, 0, 0)
    values = [value for stage in range(stages) for value in mine.get(stage, none)]
    *agreed, hop, move = largest(fabric, device, *values, hop, move)
    width = len(none)
    return [StageCosts(*agreed[stage * width : (stage + 1) * width]) for stage in range(stages)], hop, move
