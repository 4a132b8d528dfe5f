"""Checkpoints with the momentum of islands' outer optimizer, beside the weights and moments of the same shard.

Saves fall on syncs, so that every island has the same momentum and the weights of the last sync are those saved: a
shard's momentum is saved once, and runs of other numbers of islands or data-parallel ranks load it.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_cp.megatron.replicas.islands import island_of
from megatron_cp.megatron.run import Settings

MOMENTUM = "outer_momentum"
"""At the end of a key, and in the description of a checkpoint that has it."""

StateDict = dict[str, Any]
# how Megatron calls a shard of weights, in its own order of shards and in the model's
WEIGHTS = ("param", "fp32_param")


def with_momentum(
    old: Callable[..., StateDict], settings: Settings, optimizer: Any, *args: Any, **kwargs: Any
) -> StateDict:
    """Return what Megatron saves or loads of an optimizer, and the momentum; a checkpoint without leaves it at zero."""
    found = old(optimizer, *args, **kwargs)
    if settings.local_sgd.steps is None or not settings.local_sgd.outer_optimizer.remembers:
        return found
    given = inspect.signature(old).bind(optimizer, *args, **kwargs).arguments
    loads, description = given.get("is_loading", False), given["metadata"]
    if loads and not description.get(MOMENTUM):
        return found
    # Megatron writes the description into the checkpoint
    description[MOMENTUM] = True
    momenta = island_of(optimizer, settings).momenta
    for shard, name in _shards_in(found["param_state"]):
        part = _beside(shard[name], name, momenta)
        shard[MOMENTUM] = _copied_in(part) if loads else part
    return found


def _shards_in(state: Any) -> Iterator[tuple[StateDict, str]]:
    """Yield what is stored of each shard, with the name of its weights, however deep it lies."""
    if isinstance(state, dict):
        name = next((name for name in WEIGHTS if isinstance(state.get(name), ShardedTensor)), None)
        if name:
            yield state, name
            return
        state = state.values()
    elif not isinstance(state, list):
        return
    for each in state:
        yield from _shards_in(each)


def _beside(weight: ShardedTensor, name: str, momenta: dict[Tensor, Tensor]) -> ShardedTensor:
    # the padding between shards is saved too
    data = momenta[weight.data] if weight.data in momenta else torch.zeros_like(weight.data)
    before, found, after = weight.key.rpartition(name)
    assert found, weight.key
    return replace(weight, key=f"{before}{MOMENTUM}{after}", data=data, dtype=data.dtype)


def _copied_in(part: ShardedTensor) -> ShardedTensorFactory:
    """Let the loaded values be copied into the tensor: Megatron hands on to the optimizer only what Adam keeps."""
    into = part.data
    return ShardedTensorFactory(part.key, into, lambda *_: part, lambda loaded: into.copy_(loaded), part.replica_id)
