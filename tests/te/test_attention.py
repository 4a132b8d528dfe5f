"""Our attention among TransformerEngine's layers in FP8."""

import contextlib
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from megatron.core.transformer.enums import AttnMaskType

from megatron_cp.megatron.layers.te_attention import TECoreAttention
from tests.ranks import RankError, run_ranks
from tests.te import stand_in
from tests.te.models import config, model, ready


def _attended(attention: TECoreAttention, context: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(16, 2, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    with context:
        out = attention(q, k, v, None)
    out.square().sum().backward()
    return [out, *(tensor.grad for tensor in (q, k, v))]


def _in_fp8() -> list[Any]:
    with ready():
        fp8 = config(fp8="hybrid", bf16=True, params_dtype=torch.bfloat16)
        names = {type(module).__name__ for module in model(fp8).modules()}
        attention = TECoreAttention(fp8, 1, AttnMaskType.causal, "self")
        plain = _attended(attention, contextlib.nullcontext())
        # the older name, and the newer one
        entered = [getattr(te, name, None) for name in ("fp8_autocast", "autocast")]
        stand_in.CALLS.clear()
        equal = [all(map(torch.equal, _attended(attention, enter(enabled=True)), plain)) for enter in entered if enter]
        return [names, equal, dict(stand_in.CALLS)]


def test_attention_is_not_touched_by_fp8_around_it() -> None:
    ((names, equal, calls),) = run_ranks(1, _in_fp8)
    assert {"TECoreAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= names
    assert equal
    assert all(equal)
    assert calls == {}


@pytest.mark.parametrize("name", ["fp8_dot_product_attention", "fp8_multi_head_attention"])
def test_attention_in_fp8_is_refused_with_what_it_would_need(name: str) -> None:
    with pytest.raises(RankError, match=r"Refused: layer 1: .*attention in FP8 .*kernels that take FP8 with scales"):
        run_ranks(1, _built, {"fp8": "hybrid", name: True})


def _built(changes: dict[str, Any]) -> None:
    with ready():
        model(config(**changes))
