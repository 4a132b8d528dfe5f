"""MLPs in tiles, of which PyTorch's FSDP2 gathers one after the other (ZeRO-Infinity, arXiv:2104.07857, section 5.1.3).

FSDP2 gathers all weights of a transformer layer at once, and those of a module inside it alone where that module is
sharded before the layer. An MLP whose hidden units are cut into tiles is a sum of MLPs, each of which is such a module.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_cp.errors import CannotRun
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.megatron.run import Settings, say

SHARD = "megatron.core.distributed.torch_fully_sharded_data_parallel:fully_shard"
"""The name by which Megatron shards the layers of a model, the outer ones first."""


class TiledMLP(nn.ModuleList):
    """MLPs in the place of one whose hidden units they share; their outputs are added in their order."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the whole MLP does: an output of the shape of `hidden_states`, and the bias to add to it."""
        outputs = (self._run(tile, hidden_states, *args, **kwargs) for tile in self)
        output, bias = next(outputs)
        for more, _ in outputs:
            output = output + more
        return output, bias

    @staticmethod
    def _run(tile: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = tile(*args, **kwargs)
        if isinstance(tile, FSDPModule):
            # FSDP2 does so but where a layer runs once more in its backward pass, which would gather all tiles
            tile.reshard()
        return result

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a checkpoint holds: each tile as an MLP, under its number."""
        found: dict[str, Any] = {}
        tiles: Iterator[tuple[str, Any]] = self.named_children()
        for number, tile in tiles:
            found |= tile.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata)
        return found


def shard_tiles(old: Callable[..., None], settings: Settings, replica: Any, *args: Any, **kwargs: Any) -> None:
    """Build Megatron's replica by FSDP2 of a model with its MLPs in tiles, each of which is sharded and gathered alone.

    Raises RuntimeError for a model without an MLP.
    """
    count = settings.mlp.tiles
    if count is None:
        old(replica, *args, **kwargs)
        return
    given = inspect.signature(old).bind(replica, *args, **kwargs).arguments
    found = cut_mlps(given["module"], count)
    if not found:
        raise CannotRun(f"--mlp-tiles {count}: no layer of this model has an MLP; leave it out")
    say(f"--mlp-tiles {count}: {found} MLPs of this rank are gathered tile by tile")
    again = given["config"].recompute_granularity is not None
    sharded = replace(SHARD, lambda fully_shard: partial(tiles_first, fully_shard, again))
    try:
        old(replica, *args, **kwargs)
    finally:
        restore(sharded)


def tiles_first(fully_shard: Callable[..., Any], again: bool, module: nn.Module, **how: Any) -> Any:
    """Shard a module, and before it the tiles inside it that are not yet sharded.

    again: layers run once more in their backward pass, and so each tile is told which one to gather ahead: from the
           order of all forward passes FSDP2 would take those of another layer
    """
    inside = [tile for each in module.modules() if isinstance(each, TiledMLP) for tile in each]
    tiles: list[Any] = [tile for tile in inside if not isinstance(tile, FSDPModule)]
    for tile in tiles:
        fully_shard(tile, **how)
    whole = fully_shard(module, **how)
    if again:
        # nothing is gathered ahead of the first: by then its layer's other weights are there
        for before, tile in pairwise([whole, *tiles]):
            tile.set_modules_to_backward_prefetch([before])
    return whole


def cut_mlps(model: nn.Module, count: int) -> int:
    """Put `count` tiles in the place of each dense MLP of a model that is not sharded yet; return how many MLPs."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is MLP
    ]
    for parent, name, mlp in found:
        setattr(parent, name, TiledMLP(tile_of(mlp, number, count) for number in range(count)))
    return len(found)


def tile_of(mlp: MLP, number: int, count: int) -> MLP:
    """Return an MLP of the `number`-th of `count` equal parts of the hidden units of another.

    It has copies of its part of the weights, and the first has the bias of the output.
    """
    # rows of gates come before those of values
    halves = 2 if mlp.config.gated_linear_unit else 1
    fc1: Any = _copied(mlp.linear_fc1)
    fc2: Any = _copied(mlp.linear_fc2)
    fc1.output_size //= count
    fc1.output_size_per_partition //= count
    fc2.input_size //= count
    fc2.input_size_per_partition //= count
    for name, weight in list(fc1.named_parameters(recurse=False)):
        setattr(fc1, name, _part(weight, weight.unflatten(0, (halves, count, -1))[:, number].flatten(0, 1)))
    fc2.weight = _part(fc2.weight, fc2.weight.unflatten(1, (count, -1))[:, number])
    if number:
        fc2.bias = None
    tile = _copied(mlp)
    tile.linear_fc1, tile.linear_fc2 = fc1, fc2
    return tile


def _copied[Module: nn.Module](module: Module) -> Module:
    """Return a module with the parameters and children of another, and hooks of its own."""
    made = copy.copy(module)
    vars(made).update((name, value.copy()) for name, value in vars(module).items() if isinstance(value, dict))
    return made


def _part(whole: nn.Parameter, part: Tensor) -> nn.Parameter:
    """Return a parameter of a copy of a part of another, with what Megatron has noted on that one."""
    copied = part.detach().clone(memory_format=torch.contiguous_format)
    made = nn.Parameter(copied, requires_grad=whole.requires_grad)
    vars(made).update(vars(whole))
    return made
