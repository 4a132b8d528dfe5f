"""LayerNorm and RMSNorm that work under sequence parallelism with nothing but torch."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_cp.errors import Refused


class Norm(nn.Module):
    """Norm over the last dim, of the kind `config.normalization`; statistics in fp32 (fp64 for fp64 inputs).

    Under sequence parallelism each tensor-parallel rank normalises its own tokens, so the parameters carry Megatron's
    `sequence_parallel` mark, by which their gradients are summed over the tensor-parallel group. With
    `layernorm_zero_centered_gamma` the weight is stored minus one. `persist_layer_norm` chooses among Apex's CUDA
    kernels and means nothing here.

    Raises ValueError for another normalization and for memory-efficient or residual-fused norms.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str | None = None,
    ) -> None:
        super().__init__()
        self.normalization = normalization or config.normalization
        if self.normalization not in ("LayerNorm", "RMSNorm"):
            raise Refused(f"normalization must be LayerNorm or RMSNorm, got {self.normalization!r}")
        for name in ("memory_efficient_layer_norm", "fused_residual_rmsnorm"):
            if getattr(config, name, False):
                raise Refused(
                    f"the local norm does not do {name}; leave it out or use --transformer-impl transformer_engine"
                )
        self.hidden_size, self.eps = hidden_size, eps
        self.zero_centered = zero_centered_gamma or config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = _mark(nn.Parameter(start(hidden_size)), config)
        self.bias = _mark(nn.Parameter(torch.zeros(hidden_size)), config) if self.normalization == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape ... hidden_size; the result has the parameters' dtype."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        # an fp32 residual stream meets bf16 parameters
        wide = torch.promote_types(x.dtype, weight.dtype)
        shape, x, weight = (self.hidden_size,), x.to(wide), weight.to(wide)
        if self.bias is None:
            return functional.rms_norm(x, shape, weight, self.eps).to(self.weight.dtype)
        return functional.layer_norm(x, shape, weight, self.bias.to(wide), self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.normalization}, {self.hidden_size}, eps={self.eps}"


def _mark(parameter: nn.Parameter, config: TransformerConfig) -> nn.Parameter:
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter
