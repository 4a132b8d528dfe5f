"""In bf16 a sharded run is as near to float64 as the unsharded kernel is, however many ranks there are."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.grid import Grid
from megatron_cp.kernels import aten, choose
from tests.context.dense import Problem, dense, problem
from tests.context.test_backends import sharded, whole
from tests.tolerances import BF16_RATIO, BF16_RATIO_EVEN


def frobenius(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def computed_in_bf16(rounded):
    """out, dq, dk, dv of the whole sequence, in bf16 also where the kernel casts to what the CPU multiplies."""
    kernel, _ = choose("torch", device="cpu", dtype="bfloat16", head_dim=64)
    out, lse = kernel.forward(rounded.q, rounded.k, rounded.v, scale=0.125, causal=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "multiplies", lambda dtype: True)
        return (out, *kernel.backward(rounded.dout, *rounded[:3], out, lse, scale=0.125, causal=True))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_bf16_error_is_the_unsharded_kernels(backend, ranks):
    exact = problem(1024, 8, 2, causal=True, dim=64, batch=1)
    rounded = Problem(*(tensor.bfloat16() for tensor in exact[:4]), True)
    expected = dense(rounded)
    alone = computed_in_bf16(rounded)
    grid = Grid(2, ranks // 2) if BACKENDS.get(backend).needs_grid else None
    parts = in_process(ranks, lambda fabric: sharded(fabric, rounded, backend, grid, kernel="torch"))
    for name, found, single, truth in zip(("out", "dq", "dk", "dv"), whole(parts), alone, expected, strict=True):
        assert found.dtype == torch.bfloat16
        allowed = BF16_RATIO_EVEN if (backend, name) == ("striped", "out") else BF16_RATIO
        assert frobenius(found, truth) <= allowed * frobenius(single, truth), name
