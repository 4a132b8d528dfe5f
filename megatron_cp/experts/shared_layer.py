"""The layer that bench and trace run, with experts that neighbouring ranks share: tokens or weights are gathered."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.comm import Fabric
from megatron_cp.experts import WEIGHTS
from megatron_cp.experts.dispatch_cost import Dispatch
from megatron_cp.experts.exchange import TwoHopExchange
from megatron_cp.experts.gathered_weights import GatheredWeights, ShardCut, gathered_here
from megatron_cp.experts.routed_layer import Exchange, LayerSize, RankTensors, RoutedLayer

INTO, BACK = ShardCut(0, 2), ShardCut(1)
"""How ranks share the gated linear into an expert and the one back."""


class SharedLayer(RoutedLayer):
    """One rank of the layer.

    fabric: ranks that share out the experts, at this rank's place among those that share each of them
    around: ranks that share each expert
    """

    def __init__(
        self,
        fabric: Fabric,
        around: Fabric,
        size: LayerSize,
        dispatch: Dispatch,
        tensors: RankTensors,
        product: str,
        exchange: Exchange = TwoHopExchange,
    ) -> None:
        self._around, self._gather = around, dispatch.gather
        super().__init__(fabric, size, dispatch, tensors, product, exchange)
        cuts = [INTO] * len(tensors.first) + [BACK] * len(tensors.second)
        self._gathered = GatheredWeights(around, cuts, [shard.shape for shard in tensors.weights])

    def forward(self) -> tuple[Tensor, ...]:
        """Return what has come home of each piece, with autograd."""
        if self._gather != WEIGHTS:
            return super().forward()
        held = self._tensors
        row = self._gathered.gather(held.weights)
        first, whole = gathered_here(self._gathered, held.weights, held.rows[0], row)
        rows = [first, *held.rows[1:]]
        if len(self.plans) == 1:
            self._use(whole)
            return self._through(rows, ())
        leaf = whole.detach().requires_grad_()
        self._use(leaf)
        return self._through(rows, (whole,), leaf)

    def _use(self, row: Tensor) -> None:
        weights, local = self._gathered.weights(row), len(self._tensors.first)
        self._first, self._second = tuple(weights[:local]), tuple(weights[local:])

    def _compute(self, mine: Sequence[int], senders: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        if self._gather == WEIGHTS:
            return super()._compute(mine, senders, device)
        # equal numbers of rows on all of them
        return partial(_gathering, self._around, super()._compute(mine, senders * self._around.size, device))


def _gathering(around: Fabric, compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, probs: Tensor) -> Tensor:
    gathered = (_Moved.apply(around, False, each).flatten(0, 1) for each in (rows, probs))
    result: Tensor = _Moved.apply(around, True, compute(*gathered).unflatten(0, (around.size, -1)))
    return result


class _Moved(torch.autograd.Function):
    """Rows of all ranks [p ...], or the sum of all ranks' parts; backward is the other one."""

    @staticmethod
    def forward(ctx: Any, around: Fabric, scatters: bool, rows: Tensor) -> Tensor:
        ctx.around, ctx.scatters = around, scatters
        return around.reduce_scatter(rows) if scatters else around.all_gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        gradient = gradient.contiguous()
        return None, None, ctx.around.all_gather(gradient) if ctx.scatters else ctx.around.reduce_scatter(gradient)


def cut_for(tensors: RankTensors, shared: int, place: int) -> RankTensors:
    """Return the tensors of a rank with its shards in the place of whole experts."""

    def shard(cut: ShardCut, whole: Tensor) -> Tensor:
        shape = torch.Size(size // shared if at == cut.dim else size for at, size in enumerate(whole.shape))
        return cut.cut(whole.detach().reshape(-1), shared, shape)[place].reshape(shape).clone().requires_grad_()

    first, second = (
        tuple(shard(cut, whole) for whole in wholes) for cut, wholes in ((INTO, tensors.first), (BACK, tensors.second))
    )
    return tensors._replace(first=first, second=second)
