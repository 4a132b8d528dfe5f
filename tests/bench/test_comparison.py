"""A half-precision result is compared with float64: a kernel that rounds its tiles is no measure for another one."""

import pytest
import torch

from megatron_cp.bench.comparison import AttentionShape, Comparison
from megatron_cp.comm import SingleFabric
from megatron_cp.context.self_check import LARGEST_ERROR

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_compared_with_float64_the_whole_kernel_call_too(dtype):
    compared = Comparison(SingleFabric(), CPU, AttentionShape(128, heads=2, kv_heads=1, dtype=dtype), "torch")
    assert compared.reference == "attention in float64"
    assert {result.dtype for result in compared.expected} == {torch.float64}
    assert 0 < compared.own_error <= LARGEST_ERROR[compared.dtype]
    compared.whole.time()
    row = compared.row()
    assert row.max_error == compared.own_error
    # out, dq, dk and dv as the run has them
    assert row.peak == 2 * 128 * 64 * (2 + 2 + 1 + 1)


def test_wider_dtypes_are_compared_with_the_whole_kernel_call():
    compared = Comparison(SingleFabric(), CPU, AttentionShape(128, heads=2, kv_heads=1), "torch")
    assert (compared.reference, compared.own_error) == ("the whole kernel call", 0.0)
    assert {result.dtype for result in compared.expected} == {torch.float32}
