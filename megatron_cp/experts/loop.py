"""Product `loop`: one product for each expert that has tokens, written to its place in the whole result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cp.experts.product import Groups


class LoopProduct:
    """Products one after the other; nothing is copied."""

    name = "loop"

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
        self.calls += 1
        y = x.new_empty(len(x), weights[0].shape[0])
        for expert, rows in groups.filled:
            torch.mm(x[rows], weights[expert].t(), out=y[rows])
        return y

    def input_gradient(self, dy: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
        dx = dy.new_empty(len(dy), weights[0].shape[1])
        for expert, rows in groups.filled:
            torch.mm(dy[rows], weights[expert], out=dx[rows])
        return dx

    def weight_gradients(self, dy: Tensor, x: Tensor, groups: Groups) -> Sequence[Tensor]:
        filled = {expert: dy[rows].t().mm(x[rows]) for expert, rows in groups.filled}
        return [
            filled[expert] if expert in filled else dy.new_zeros(dy.shape[1], x.shape[1])
            for expert in range(len(groups.sizes))
        ]
