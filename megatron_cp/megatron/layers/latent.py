"""Multi-latent attention that hands the latent to core attention, in place of the keys and values it expands to."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_cp.errors import Refused


class UpProjection(ColumnParallelLinear):
    """The up-projection of keys and values, whose product core attention computes for every block that it sees.

    Megatron's attention calls it for this rank's tokens all the same: the call gives zeros that take no memory, and
    lets hooks of the module gather its weight.
    """

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return zeros ... (h e), expanded from one, for a latent ... r."""
        width = self.output_size_per_partition
        return torch.zeros((), dtype=input_.dtype, device=input_.device).expand(*input_.shape[:-1], width), None


class LatentSelfAttention(MLASelfAttention):
    """Megatron's multi-latent attention without expanded keys and values.

    `key` on its way to core attention is the latent, normed and with its rotary part rotated, in one head that is
    kv_lora_rank + qk_pos_emb_head_dim wide; `value` is the weight of the up-projection.
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return query, latent ... 1 (r p), the weight h e r, and the compressed queries and keys."""
        if inference_context is not None or inference_params is not None:
            raise Refused("--cp-latent is for training, got a cache of inference; leave it out")
        query, key, _, q_compressed, compressed = super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params
        )
        # all heads have the same rotary numbers, behind those that are expanded
        rotary = key[..., 0, self.config.qk_head_dim :]
        latent = torch.cat([compressed, rotary], -1).unsqueeze(-2)
        up = self.linear_kv_up_proj.weight.unflatten(0, (self.num_attention_heads_per_partition, -1))
        return query, latent, up, q_compressed, compressed

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        attn_mask_type: Any = None,
        **extra: Any,
    ) -> Tensor:
        """Call core attention without Megatron's pads of values, which are no values here."""
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        return self.core_attention(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params, attn_mask_type=kind, **extra
        )
