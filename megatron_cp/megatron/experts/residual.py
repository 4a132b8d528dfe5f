"""Megatron's layer of experts with DeepSpeed-MoE's MLP: the two outputs of a token have shares with a sum of 1.

Megatron's gate of shared experts is the share of the MLP, which is such a shared expert. What is left goes into the
probability of the token's expert, which multiplies its output.
"""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_cp.experts.residual import expert_share
from megatron_cp.megatron.flags.experts import ExpertFlags


class ResidualLayer(MoELayer):
    """Megatron's layer of experts, where a token's expert has the share that its shared expert leaves."""

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Return the probabilities of experts, times their share, and the tokens that are sent to them, both [T, E]."""
        probs, sent = super().route(hidden_states, padding_mask)
        if not ExpertFlags.of(self.config).mixes:
            return probs, sent
        shared: Any = self.shared_experts
        return probs * expert_share(hidden_states, shared.gate_weight).to(probs.dtype), sent
