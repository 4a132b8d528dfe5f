"""Islands of Local SGD are the instances of Megatron's distributed optimizer.

Megatron scatters gradients inside an instance and then adds the shards between the instances. The second half is left
out here. Instead the instances average their shards of weights and moments at some steps, before Megatron hands the
weights on to the model and gathers them as ever.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_cp.comm import GroupFabric
from megatron_cp.megatron.replicas.arrivals import open_connections, wait_for_all
from megatron_cp.megatron.run import Settings, say
from megatron_cp.replicas.outer import Spread, put_mean, sampled_spread
from megatron_cp.replicas.sync_steps import is_read, phases_of, syncs

ISLAND = "megatron_cp_island"
"""Attribute of a distributed optimizer that holds its Island, once it has been asked for."""


def keep_gradients(old: Callable[..., None], settings: Settings, replica: Any, *args: Any, **kwargs: Any) -> None:
    """Build Megatron's replica, and let gradients be averaged inside its island alone."""
    old(replica, *args, **kwargs)
    if settings.local_sgd.steps is None:
        return
    config = replica.ddp_config
    # what Megatron adds between the instances is added over this rank alone
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for group in (*replica.bucket_groups, *replica.expert_parallel_bucket_groups):
        group.inter_distributed_optimizer_instance_group = alone
        for bucket in group.buckets:
            # Megatron divides by all ranks; where the collective averages, it already does so over the island
            if not config.average_in_collective:
                bucket.gradient_scaling_factor *= config.num_distributed_optimizer_instances


def take_step(old: Callable[..., Any], settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """Take a step of training, after which the islands meet where it is a sync.

    Between syncs the losses that Megatron logs are of this rank's island, so that it waits for no other.
    """
    if settings.local_sgd.steps is None:
        return old(*args, **kwargs)
    given = inspect.signature(old).bind(*args, **kwargs).arguments
    optimizers = getattr(given["optimizer"], "chained_optimizers", [given["optimizer"]])
    islands = [island_of(optimizer, settings) for optimizer in optimizers]
    step = given["iteration"] + 1
    meet = syncs(phases_of(settings.local_sgd.steps), step)
    must = is_read(step, settings.steps.stop if settings.steps else None, settings.read_every)
    open_connections(settings.timeout_minutes)
    for island in islands:
        island.begin(step, meet, must)
    groups = get_attr_wrapped_model(given["model"][0], "pg_collection")
    # the first of two groups that Megatron looks for
    everyone = getattr(groups, "dp_cp_gtp_remat", None)
    if not meet:
        groups.dp_cp_gtp_remat = parallel_state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=True
        )
    try:
        result = old(*args, **kwargs)
    finally:
        groups.dp_cp_gtp_remat = everyone
    if meet:
        _report(step, islands)
    return result


def hand_on(old: Callable[..., None], optimizer: Any) -> None:
    """Hand on the optimizer's weights to the model; at a sync those that all islands go on from."""
    island = getattr(optimizer, ISLAND, None)
    if island is not None and island.meets:
        island.sync()
    old(optimizer)


class Island:
    """One optimizer's shards of weights and moments on this rank, and what it remembers of the last sync.

    meets:    True while a step runs that ends in a sync
    averaged: False where the last sync found the islands near enough to go on apart
    spread:   how far the islands' weights were apart at the last sync, as this rank sees it
    waited:   seconds that this rank waited for other islands then
    momenta:  of each shard of weights, equal on all islands; empty for an outer optimizer without
    """

    def __init__(self, optimizer: Any, settings: Settings) -> None:
        self.meets, self.averaged = False, True
        self._number, self._must = 0, True
        self.spread = Spread(torch.zeros(()), torch.zeros(()))
        self.waited = 0.0
        self._optimizer, self._flags, self._minutes = optimizer, settings.local_sgd, settings.timeout_minutes
        self._anchors: list[Tensor] = []
        kept = weights_of(optimizer) if self._flags.outer_optimizer.remembers else []
        self.momenta: dict[Tensor, Tensor] = {weight: torch.zeros_like(weight.detach()) for weight in kept}

    def begin(self, step: int, meets: bool, must: bool = True) -> None:
        """Begin a step, after whose sync weights `must` be equal; a run begins at those of a sync, or a checkpoint."""
        self._number, self.meets, self._must = step, meets, must
        if not self._anchors:
            self._anchors = [weight.detach().clone() for weight in self.momenta]

    def sync(self) -> None:
        """Average weights and moments over the islands, and step towards the mean; all islands call it together.

        With --local-sgd-spread, islands that are near enough go on apart. Raises RuntimeError with those that are gone.
        """
        islands = between_islands()
        began = perf_counter()
        wait_for_all(self._number, self._minutes)
        self.waited = perf_counter() - began
        weights = weights_of(self._optimizer)
        if self._flags.spread is not None and not self._must:
            self.spread = sampled_spread(weights, islands)
            # what is no number is averaged
            self.averaged = not _of_all([self.spread]).apart <= self._flags.spread
            if not self.averaged:
                return
        self.averaged = True
        self.spread = put_mean(weights, islands)
        for moments in moments_of(self._optimizer, weights).values():
            put_mean(moments, islands)
        self._step()

    @torch.no_grad()
    def _step(self) -> None:
        step = self._flags.outer_optimizer.load()
        for (weight, momentum), anchor in zip(self.momenta.items(), self._anchors, strict=True):
            stepped = step(weight, anchor, momentum, self._flags.learning_rate, self._flags.decay)
            if stepped.momentum is not None:
                momentum.copy_(stepped.momentum)
            weight.copy_(stepped.weight)
            anchor.copy_(stepped.weight)


def between_islands() -> GroupFabric:
    """Return the ranks that hold this rank's shard, one of each island."""
    return GroupFabric(parallel_state.get_inter_distributed_optimizer_instance_group())


def weights_of(optimizer: Any) -> list[Tensor]:
    """Return this rank's shards of weights in float32; an optimizer of no parameters has none."""
    kinds = ("shard_fp32_from_float16_groups", "shard_fp32_groups")
    groups = [group for kind in kinds for group in getattr(optimizer, kind, ())]
    return [weight for group in groups for weight in group if weight is not None]


def moments_of(optimizer: Any, weights: list[Tensor]) -> dict[str, list[Tensor]]:
    """Return what the optimizer keeps of each weight, by name."""
    found: dict[str, list[Tensor]] = {}
    for weight in weights:
        for name, value in _kept(optimizer.optimizer.state[weight], weight):
            found.setdefault(name, []).append(value)
    return found


def _kept(state: dict[str, Any], weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, value in sorted(state.items()):
        # the count of steps is a tensor too
        if isinstance(value, Tensor) and value.shape == weight.shape:
            yield name, value


def island_of(optimizer: Any, settings: Settings) -> Island:
    """Return the optimizer's island, made at the first call: by the load of a checkpoint, or by the first step."""
    if not hasattr(optimizer, ISLAND):
        setattr(optimizer, ISLAND, Island(optimizer, settings))
    island: Island = getattr(optimizer, ISLAND)
    return island


class SpreadOfAll(NamedTuple):
    """Distance of the islands from their mean over its norm, of all shards, and the most seconds that one waited."""

    apart: float
    waited: float


def _of_all(spreads: Sequence[Spread], waited: float = 0.0) -> SpreadOfAll:
    """Return what all ranks of the run have found, in the same bits on each; they call it together."""
    distance, norm = (sum(float(getattr(spread, name)) for spread in spreads) for name in Spread._fields)
    device = torch.device(torch.cuda.current_device())
    mine = torch.tensor([distance, norm, waited], dtype=torch.float64, device=device)
    inside = GroupFabric(parallel_state.get_intra_distributed_optimizer_instance_group())
    # island-ranks islands values
    every = inside.all_gather(between_islands().all_gather(mine))
    distance, norm, _ = every.sum(dim=(0, 1)).tolist()
    return SpreadOfAll((distance / max(norm, 1e-300)) ** 0.5, every[..., 2].max().item())


def _report(step: int, islands: list[Island]) -> None:
    """Say how far the islands were apart, whether that was too little, and how long the first waited for the last."""
    found = _of_all([island.spread for island in islands], sum(island.waited for island in islands))
    sampled = "" if all(island.averaged for island in islands) else " in a sample, not averaged"
    apart = f"{found.apart:.2e} of the weights' norm apart{sampled}"
    say(f"step {step}: islands {apart}, waited {found.waited:.2f} s for the last")
