"""Checkpoints with what shards have beside Adam's moments: islands' outer momentum, or what int4 has left over.

Either lies beside the weights and moments of the same shard, saved once, so that runs of other numbers of islands or
data-parallel ranks load it. Saves of islands fall on syncs: every island has the same momentum then, and the weights of
the last sync are those saved. What ranks have left over of a shard is handed to its owner at a save, in the run that
goes on as in the checkpoint.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_cp.megatron.replicas.islands import island_of
from megatron_cp.megatron.replicas.quantised import collect_left, keeps_any, own_left
from megatron_cp.megatron.run import Settings
from megatron_cp.replicas.blocks import LEFT

MOMENTUM = "outer_momentum"
"""At the end of a key, and in the description of a checkpoint that has it."""
LEFT_OVER = "left_over"
"""At the end of a key, and in such a description, for what quantised gradients have left over."""

StateDict = dict[str, Any]
Values = Callable[[StateDict, Tensor], Tensor | None]
"""Function that returns what a shard of these weights has, None where nothing is kept of it, as of padding."""
# how Megatron calls a shard of weights, in its own order of shards and in the model's
WEIGHTS = ("param", "fp32_param")


def with_shard_state(
    old: Callable[..., StateDict], settings: Settings, optimizer: Any, *args: Any, **kwargs: Any
) -> StateDict:
    """Return what Megatron saves or loads of an optimizer, and what is ours; a checkpoint without leaves it at zero."""
    found = old(optimizer, *args, **kwargs)
    name = _asked(settings, optimizer)
    if not name:
        return found
    given = inspect.signature(old).bind(optimizer, *args, **kwargs).arguments
    loads, description = given.get("is_loading", False), given["metadata"]
    if loads and not description.get(name):
        return found
    # Megatron writes the description into the checkpoint
    description[name] = True
    if name == LEFT_OVER and not loads:
        collect_left(optimizer)
    values = _momenta(optimizer, settings) if name == MOMENTUM else _left_over(optimizer)
    dtype = None if name == MOMENTUM else LEFT
    for shard, weights in _shards_in(found["param_state"]):
        weight = shard[weights]
        data = values(shard, weight.data)
        # the padding between shards is saved too
        data = torch.zeros_like(weight.data, dtype=dtype) if data is None else data
        part = _beside(weight, weights, name, data)
        shard[name] = _copied_in(part) if loads else part
    return found


def _asked(settings: Settings, optimizer: Any) -> str:
    """Return what this run keeps of the optimizer's shards; the two do not go together."""
    if settings.local_sgd.steps is not None and settings.local_sgd.outer_optimizer.remembers:
        return MOMENTUM
    gradients = settings.quantised.of_gradients
    return LEFT_OVER if gradients and gradients.keeps and keeps_any(optimizer) else ""


def _momenta(optimizer: Any, settings: Settings) -> Values:
    momenta = island_of(optimizer, settings).momenta
    return lambda shard, weight: momenta.get(weight)


def _left_over(optimizer: Any) -> Values:
    """Take shards in Megatron's own order, for not every optimizer has float32 weights of its own."""
    values = own_left(optimizer)

    def of_next(shard: StateDict, weight: Tensor) -> Tensor | None:
        value = None if shard["padding"].unwrap() else next(values)
        assert value is None or value.shape == weight.shape, (value.shape, weight.shape)
        return value

    return of_next


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


def _beside(weight: ShardedTensor, weights: str, name: str, data: Tensor) -> ShardedTensor:
    before, found, after = weight.key.rpartition(weights)
    assert found, weight.key
    return replace(weight, key=f"{before}{name}{after}", data=data, dtype=data.dtype)


def _copied_in(part: ShardedTensor) -> ShardedTensorFactory:
    """Let the loaded values be copied into the tensor: Megatron hands on to the optimizer only what Adam keeps."""
    into = part.data

    def copy(loaded: Tensor) -> None:
        into.copy_(loaded)

    return ShardedTensorFactory(part.key, into, lambda *_: part, copy, part.replica_id)
