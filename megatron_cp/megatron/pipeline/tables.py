"""Make the tables of one run for the costs known so far, and again once its first steps are measured."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_cp.comm import GroupFabric
from megatron_cp.megatron.pipeline import costs
from megatron_cp.megatron.run import Settings, say
from megatron_cp.pipeline import Rule
from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.channels import Channels
from megatron_cp.pipeline.clock import Clock
from megatron_cp.pipeline.execute import Observe, forward_only, lower
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.profile import Profile, agree, hop_seconds, lower_split
from megatron_cp.pipeline.saved import HostMover, SavedActivations, seconds_per_byte
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.schedules.pipedream import USUAL, StepOfRun
from megatron_cp.pipeline.split_backward import WeightQueue


class Tables:
    """Tables of a run for every number of microbatches that its steps have."""

    def __init__(self, rule: Rule, placement: Placement, settings: Settings, profile: Profile | None) -> None:
        self._rule, self._placement, self._settings, self._profile = rule, placement, settings, profile
        self._known = costs.given(settings, placement) or costs.equal(placement, settings.slice_lengths)
        self._built: dict[int, Schedule] = {}
        self._lowered: dict[tuple[int, bool, StepOfRun], Schedule] = {}

    def lowered(self, micros: int, training: bool, step: StepOfRun = USUAL) -> Schedule:
        """Return the table of a step, or of a batch of an evaluation, as an executor runs it.

        step: of the run, where steps differ; what is logged is the usual one
        """
        key = (micros, training, step)
        if key not in self._lowered:
            self._lowered[key] = self._made(micros, training, step)
        return self._lowered[key]

    def _made(self, micros: int, training: bool, step: StepOfRun) -> Schedule:
        if not training:
            barriers = self._settings.pipeline.vocab_parallel or 0
            return forward_only(self._placement, micros * max(1, len(self._settings.slice_lengths)), barriers)
        if step == USUAL:
            return self._usual(micros)
        self.lowered(micros, training)
        return lower(build(self._rule.name, self._placement.ranks, micros, self._placement.chunks, step=step))

    def _usual(self, micros: int) -> Schedule:
        """Build and log the table of a step; while costs are measured all of its backwards are in two halves."""
        where, known = self._placement, self._known
        schedule = build(
            self._rule.name,
            where.ranks,
            micros,
            where.chunks,
            overlapped=self._settings.combines,
            placement=where.name,
            costs=known.costs,
            caps=costs.caps(self._settings, where),
            moves=self._settings.pipeline.moves,
            slices=max(1, len(self._settings.slice_lengths)),
            barriers=self._settings.pipeline.vocab_parallel or 0,
        )
        moving, caps = self._settings.pipeline.moves is not None, costs.caps(self._settings, where)
        for line in costs.describe(schedule, known, moving, caps):
            say(line)
        if self._settings.slice_lengths:
            say(f"tokens of the slices of a sequence: {' '.join(map(str, self._settings.slice_lengths))}")
        self._built[micros] = schedule
        return lower_split(schedule) if self._profile else lower(schedule)

    def observing(self, own: Observe) -> Observe:
        """Return the context around every action of the training step that begins; it includes a running profile."""
        profile = self._profile
        if profile is None:
            return own
        profile.begin()

        @contextmanager
        def observe(action: Action) -> Iterator[None]:
            with own(action), profile.observe(action):
                yield

        return observe

    def learn(
        self, channels: Channels, rank: int, buffer: Callable[[], Tensor], saved: SavedActivations | None = None
    ) -> None:
        """Switch to the measured costs after the last measured step; all ranks call it before every training step.

        All ranks take the largest measurement of each cost, and so they build the same new table.
        """
        if self._profile is None or not self._profile.done:
            return
        placement, steps = self._placement, self._settings.pipeline.profile_steps
        assert steps, "a profile is of some steps"
        mine = {stage: self._profile.of(stage) for stage in placement.of_rank[rank]}
        hop = hop_seconds(channels, rank, placement.ranks, buffer)
        everyone = torch.distributed.group.WORLD
        assert everyone, "Megatron has made the groups"
        move = seconds_per_byte(saved.mover if saved else HostMover(buffer().device))
        stages, hop, move = agree(GroupFabric(everyone), buffer().device, mine, len(placement.rank_of), hop, move)
        self._known = costs.measured(self._settings, placement, stages, hop, move, steps)
        self._profile = None
        say(costs.figures(self._known))
        self._make_again()

    def _make_again(self) -> None:
        before, self._built = self._built, {}
        self._lowered.clear()
        for micros, schedule in before.items():
            self.lowered(micros, training=True)
            say(costs.changes(schedule, self._built[micros], self._known))


def profile_of(
    model: list[Any], settings: Settings, queue: WeightQueue | None, saved: SavedActivations | None = None
) -> Profile | None:
    """Return the profile of the run's first steps, where its settings ask for one.

    queue: of W's that wait
    saved: what moves activations, if something does
    """
    steps = settings.pipeline.profile_steps
    if not steps:
        return None
    assert queue, "measured steps have split backwards"
    say(f"measuring the first {steps} steps, then scheduling for what they show")

    def parameters() -> set[int]:
        return {weight.untyped_storage().data_ptr() for chunk in model for weight in chunk.parameters()}

    clock = Clock(next(model[0].parameters()).device)
    recorded = (lambda stage: saved.sizes[stage]) if saved else (lambda stage: 0)
    return Profile(steps, clock, parameters, lambda stage, micro: queue.held((stage, micro)), recorded)
