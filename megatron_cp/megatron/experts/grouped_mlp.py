"""All experts of a rank at once, without TransformerEngine: dropless experts (MegaBlocks, arXiv:2211.15841)."""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_cp.experts import PRODUCTS
from megatron_cp.experts.choose import ChosenProduct, choose
from megatron_cp.experts.function import GroupedCall, WeightHalf, activated_linear, grouped_linear
from megatron_cp.experts.product import GroupedProduct, Groups, groups_of
from megatron_cp.megatron.experts.activation import Activation
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.pipeline.split_backward import WeightQueue, accumulate


class GroupedMLP(SequentialMLP):
    """Megatron's SequentialMLP with one product for each linear of all its experts.

    Parameters, initial values, marks and checkpoints are SequentialMLP's, which are interchangeable with
    TEGroupedMLP's. Weight gradients wait in the queue of a split schedule.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._activation = Activation(self.config, self.local_experts[0].activation_func)
        self._recomputes = self.config.recompute_granularity == "selective" and "moe_act" in (
            self.config.recompute_modules or ()
        )
        self.product: GroupedProduct | None = None
        # [n, k] of both linears: k of the first is n of the second; of a shard, whatever they are called with later
        self._widths = self.local_experts[0].linear_fc2.weight.shape

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Return the experts' outputs [T, h] of tokens [T, h], those of one expert after the other, and no bias."""
        x, probs = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            x, probs = (probs.unsqueeze(-1) * x).to(x.dtype), torch.ones_like(probs)
        groups = groups_of(tokens_per_expert, x.device)
        call, bias = self._call("linear_fc1", x, groups)
        inner = grouped_linear(call, x)
        if bias is not None:
            inner = inner + bias
        call, bias = self._call("linear_fc2", inner, groups)
        if self._recomputes:
            output = activated_linear(call, self._activation, inner, probs)
        else:
            output = grouped_linear(call, self._activation(inner, probs))
        if bias is not None:
            output = (output + bias * probs.unsqueeze(-1)).to(output.dtype)
        return output, None

    def describe(self, device: str) -> str:
        """Return the number of experts and the product that runs on such a device."""
        return f"{self.num_local_experts} on a rank, product {self._choice(device, self.config.params_dtype)}"

    def _call(self, name: str, x: Tensor, groups: Groups) -> tuple[GroupedCall, Tensor | None]:
        """Return a linear of all experts for rows such as x, and each row's bias."""
        parameters = [getattr(expert, name)() for expert in self.local_experts]
        weights = tuple(weight for weight, _ in parameters)
        if self.product is None:
            self.product = PRODUCTS.get(self._choice(x.device.type, x.dtype).name).load()()
        call = GroupedCall(self.product, groups, weights, _elsewhere(x, weights))
        if parameters[0][1] is None:
            return call, None
        sizes = torch.tensor(groups.sizes, device=x.device)
        return call, torch.stack([bias for _, bias in parameters]).repeat_interleave(sizes, 0, output_size=len(x))

    def _choice(self, device: str, dtype: torch.dtype) -> ChosenProduct:
        return choose(ExpertFlags.of(self.config).grouped_product, device, dtype, self._widths)


def _elsewhere(x: Tensor, weights: tuple[Tensor, ...]) -> Any:
    """Return what takes the weight half to the queue that a split schedule has open; None where autograd keeps it.

    Without a gradient of x there would be no backward at all once the weights are out of autograd.
    """
    queue = bound_queue()
    if queue is None or not queue.open or not x.requires_grad:
        return None
    if not all(weight.requires_grad and weight.is_leaf for weight in weights):
        return None
    return partial(_deliver, queue, weights)


def _deliver(queue: WeightQueue, weights: tuple[Tensor, ...], half: WeightHalf, dy: Tensor, x: Tensor) -> None:
    """Let the weight half of an I wait for its W; compute that of a B at once."""
    if queue.putting_off:
        queue.put(partial(_weight_half, weights, half), dy, x)
    else:
        _weight_half(weights, half, dy, x)


def _weight_half(weights: tuple[Tensor, ...], half: WeightHalf, dy: Tensor, x: Tensor) -> None:
    for weight, gradient in zip(weights, half(dy, x), strict=True):
        accumulate(weight, gradient)
