"""Our core attention among TransformerEngine's layers: the keys of its state dict."""

from typing import Any

import torch
from torch import Tensor

from megatron_cp.megatron.layers.attention import CoreAttention


class TECoreAttention(CoreAttention):
    """CoreAttention in the place of TransformerEngine's DotProductAttention.

    Its state dict has the key of that module, `_extra_state`, with nothing in it: FP8 scales are kept there, and our
    attention has none. What a checkpoint has under the key is not read, and a checkpoint may lack it.
    """

    def get_extra_state(self) -> Tensor:
        """Return an empty byte tensor, as TransformerEngine does without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Ignore what a checkpoint of TransformerEngine's attention has here."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the sinks only: distributed checkpoints have no other key of TransformerEngine's attention either."""
        return super().sharded_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)
