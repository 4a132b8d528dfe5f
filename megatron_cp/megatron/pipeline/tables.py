"""The tables of one run: made for the costs known so far, and made again once its first steps have shown their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_cp.comm import GroupFabric
from megatron_cp.megatron.pipeline import costs
from megatron_cp.megatron.pipeline.split_linear import queue_in_force
from megatron_cp.megatron.run import global_args, say
from megatron_cp.pipeline import Rule
from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.channels import Channels
from megatron_cp.pipeline.clock import Clock
from megatron_cp.pipeline.execute import Observe, forward_only, lower
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.profile import Profile, agree, hop_seconds, lower_split
from megatron_cp.pipeline.schedule import Schedule


class Tables:
    """What a run executes, for every number of microbatches that it comes with."""

    def __init__(self, rule: Rule, placement: Placement, profile: Profile | None) -> None:
        self._rule, self._placement, self._profile = rule, placement, profile
        self._known = costs.given(global_args(), placement) or costs.equal(placement)
        self._built: dict[int, Schedule] = {}
        self._lowered: dict[tuple[int, bool], Schedule] = {}

    def lowered(self, micros: int, training: bool) -> Schedule:
        """The table of a step, or of a batch of an evaluation, as an executor runs it."""
        key = (micros, training)
        if key not in self._lowered:
            self._lowered[key] = self._made(micros) if training else forward_only(self._placement, micros)
        return self._lowered[key]

    def _made(self, micros: int) -> Schedule:
        """The table of a step, said once; while costs are measured all of its backwards are in two halves."""
        where, known = self._placement, self._known
        schedule = build(
            self._rule.name,
            where.ranks,
            micros,
            where.chunks,
            placement=where.name,
            costs=known.costs,
            caps=costs.caps(global_args(), where),
        )
        for line in costs.describe(schedule, known):
            say(line)
        self._built[micros] = schedule
        return lower_split(schedule) if self._profile else lower(schedule)

    def observing(self, own: Observe) -> Observe:
        """What is around every action of a training step that begins: also the profile, while it runs."""
        profile = self._profile
        if profile is None:
            return own
        profile.begin()

        @contextmanager
        def observe(action: Action) -> Iterator[None]:
            with own(action), profile.observe(action):
                yield

        return observe

    def learn(self, channels: Channels, rank: int, buffer: Callable[[], Tensor]) -> None:
        """After the last measured step go by what it showed; all ranks call it before every training step.

        They go by the largest of what they measured, and so all of them come to the same new table.
        """
        if self._profile is None or not self._profile.done:
            return
        placement, args = self._placement, global_args()
        mine = {stage: self._profile.of(stage) for stage in placement.of_rank[rank]}
        hop = hop_seconds(channels, rank, placement.ranks, buffer)
        everyone = torch.distributed.group.WORLD
        assert everyone, "Megatron has made the groups"
        stages, hop = agree(GroupFabric(everyone), buffer().device, mine, len(placement.rank_of), hop)
        self._known = costs.measured(args, placement, stages, hop, args.pp_profile_steps)
        self._profile = None
        say(costs.figures(self._known))
        self._make_again()

    def _make_again(self) -> None:
        before, self._built = self._built, {}
        self._lowered.clear()
        for micros, schedule in before.items():
            self.lowered(micros, training=True)
            say(costs.changes(schedule, self._built[micros], self._known))


def profile_of(model: list[Any]) -> Profile | None:
    """The profile of the run's first steps, where its arguments ask for one."""
    steps = getattr(global_args(), "pp_profile_steps", None)
    if not steps:
        return None
    say(f"measuring the first {steps} steps, then scheduling for what they show")

    def parameters() -> set[int]:
        return {weight.untyped_storage().data_ptr() for chunk in model for weight in chunk.parameters()}

    queue = queue_in_force()
    clock = Clock(next(model[0].parameters()).device)
    return Profile(steps, clock, parameters, lambda stage, micro: queue.held((stage, micro)))
