"""Checkpoints with the versions of weights that batches in flight need, under keys of their own.

A checkpoint holds the newest weights, as ever. Without the earlier ones training goes on, but its first batches run on
other weights than in a run that was not interrupted. Other schedules do not ask for these keys.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.utils import unwrap_model

from megatron_cp.comm import GroupFabric, values_of_all
from megatron_cp.megatron.pipeline.versions import WeightVersions

PREFIX = "earlier_weights."
"""In front of a key: earlier_weights.2.decoder… is what decoder… was two updates before the checkpoint."""

StateDict = dict[str, Any]


def save_too(model: Any, versions: WeightVersions) -> None:
    """Let the checkpoints of a model chunk hold its earlier weights from now on."""
    module = unwrap_model(model)
    stock = module.sharded_state_dict

    def with_earlier(*args: Any, **kwargs: Any) -> StateDict:
        found: StateDict = stock(*args, **kwargs)
        for updates in range(1, versions.behind + 1):
            version = versions.of_batch(versions.newest + versions.behind - updates)
            found |= _sharded(stock, versions, version, updates)
        return found

    module.sharded_state_dict = with_earlier


def load(model: Any, versions: WeightVersions, folder: Path) -> bool:
    """Take the earlier weights of a checkpoint over, where it has all that any rank needs; all ranks call it.

    Returns whether it has them.
    """
    module = unwrap_model(model)
    made = versions.add_older(min(versions.behind, versions.newest))
    asked: StateDict = {}
    for version in made:
        asked |= _sharded(module.sharded_state_dict, versions, version, versions.newest - version)
    stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    everyone = torch.distributed.group.WORLD
    assert everyone, "Megatron has made the groups"
    device = torch.device(torch.cuda.current_device())
    mine = all(part.key in stored for part in asked.values())
    if not all(has for (has,) in values_of_all(GroupFabric(everyone), device, [mine])):
        versions.drop(made)
        return False
    loaded = dist_checkpointing.load(asked, str(folder))
    for version in made:
        prefix = _prefix(versions.newest - version)
        weights = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
        with versions.shown(version):
            module.load_state_dict(weights, strict=False)
    return True


def _sharded(stock: Callable[..., StateDict], versions: WeightVersions, version: int, updates: int) -> StateDict:
    """Return the weights of a version, so many updates before the newest, with keys of its own for each layer.

    Ranks keep different numbers of versions: a key for all layers together would have gaps.
    """
    with versions.shown(version):
        found = stock(metadata={"non_homogeneous_layers": True})
        parts = {
            f"{_prefix(updates)}{name}": part
            for name, part in found.items()
            if isinstance(part, ShardedTensor | ShardedTensorFactory)
        }
        for part in parts.values():
            # the parameter shows another version later
            part.data = part.data.detach()
    add_prefix_for_sharding(parts, _prefix(updates))
    return parts


def _prefix(updates: int) -> str:
    return f"{PREFIX}{updates}."
