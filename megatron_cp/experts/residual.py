"""The residual expert of DeepSpeed-MoE (arXiv:2201.05596, 4.1): one expert of a token, beside an MLP that sees all."""

from torch import Tensor
from torch.nn.functional import linear


def expert_share(x: Tensor, gate: Tensor) -> Tensor:
    """Return [T, 1], the share of a token's expert in its output: 1 - sigmoid(x gate), what the MLP leaves.

    x:    [s, b, h], T = s b
    gate: [1, h], the difference of the two rows of the paper's softmax over MLP and expert
    """
    return linear(x, -gate).sigmoid().view(-1, 1)
