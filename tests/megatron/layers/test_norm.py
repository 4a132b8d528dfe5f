"""The local norm: torch's numbers, Megatron's marks."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_cp.megatron.layers.norm import Norm

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

WIDTH = 48


def config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=4, **changes)


def random_like(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def gradients(module: nn.Module, x: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(dout)
    return [out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torchs_norm(name: str, dtype: torch.dtype) -> None:
    ours = random_like(Norm(config(normalization=name), WIDTH, eps=1e-6)).to(dtype)
    theirs = random_like(getattr(nn, name)(WIDTH, eps=1e-6)).to(dtype)
    x, dout = torch.randn(2, 5, 3, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    for mine, yours in zip(gradients(ours, x, dout), gradients(theirs, x, dout), strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_statistics_of_bf16_are_taken_in_fp32(name: str) -> None:
    norm = Norm(config(normalization=name), WIDTH).bfloat16()
    x = (100 + torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = Norm(config(normalization=name), WIDTH).double()(x.double())
    # half a unit in the last place of bf16's eight bits
    assert ((norm(x).double() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_zero_centered_weight_is_stored_minus_one(name: str) -> None:
    plain = random_like(Norm(config(normalization=name), WIDTH))
    centered = random_like(Norm(config(normalization=name, layernorm_zero_centered_gamma=True), WIDTH))
    assert Norm(config(layernorm_zero_centered_gamma=True), WIDTH).weight.abs().max() == 0
    with torch.no_grad():
        centered.weight -= 1
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(centered(x), plain(x))


def test_fp32_residual_stream_meets_bf16_parameters() -> None:
    assert Norm(config(), WIDTH).bfloat16()(torch.randn(3, WIDTH)).dtype is torch.bfloat16


@pytest.mark.parametrize("parallel", [True, False])
def test_parameters_carry_the_sequence_parallel_mark(parallel: bool) -> None:
    norm = Norm(config(tensor_model_parallel_size=2, sequence_parallel=parallel), WIDTH)
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [parallel, parallel]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": "L2Norm"}, "LayerNorm or RMSNorm, got 'L2Norm'"),
        ({"memory_efficient_layer_norm": True}, "memory_efficient_layer_norm"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Norm(config(**changes), WIDTH)
