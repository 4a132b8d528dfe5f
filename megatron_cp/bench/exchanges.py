"""Time a layer of experts on processes of this machine: exchanges and pieces in turns, correctness first."""

from collections.abc import Sequence

import torch

from megatron_cp.bench.linears import EngineTimes, in_turns
from megatron_cp.bench.processes import on_ranks
from megatron_cp.comm import Fabric
from megatron_cp.experts import LOOP
from megatron_cp.experts.dispatch_cost import Dispatch
from megatron_cp.experts.routed_layer import LayerSize, RoutedLayer, tensors_of


def measure_exchanges(ranks: int, size: LayerSize, ways: Sequence[Dispatch], rounds: int) -> list[EngineTimes]:
    """Return the times of a layer, forward and backward, each way; RuntimeError where results differ from the first's.

    Experts are computed one by one in float32, as `auto` does on a CPU.
    """
    return on_ranks(ranks, measure, size, tuple(ways), rounds)[0]


def measure(
    fabric: Fabric, device: torch.device, size: LayerSize, ways: Sequence[Dispatch], rounds: int
) -> list[EngineTimes]:
    """Return the times on one rank, equal on all; raises WrongResultError where results differ."""
    layers = {}
    for way in ways:
        held = tensors_of(size, way, fabric.rank, fabric.size, torch.float32, device)
        layers[str(way)] = RoutedLayer(fabric, size, way, held, LOOP)
    return in_turns(fabric, device, {name: layer.run for name, layer in layers.items()}, rounds)
