"""In bf16 a sharded run is as near to float64 as the unsharded kernel is, however many ranks there are."""

from functools import cache

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.grid import Grid
from megatron_cp.kernels import aten, choose
from tests.cases import slow_unless
from tests.context.dense import Problem, dense, problem
from tests.context.test_backends import sharded, whole
from tests.tolerances import BF16_RATIO, BF16_RATIO_EVEN

NAMES = ("out", "dq", "dk", "dv")
# as many query heads as the most ranks, so that these can be dealt one each
TOKENS, HEADS, KV_HEADS, DIM = 1024, 32, 8, 32


def frobenius(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@cache
def rounded():
    exact = problem(TOKENS, HEADS, KV_HEADS, causal=True, dim=DIM, batch=1)
    return Problem(*(tensor.bfloat16() for tensor in exact[:4]), True)


@cache
def truth():
    return dense(rounded())


def errors(found):
    return [frobenius(x, y) for x, y in zip(found, truth(), strict=True)]


@cache
def alone():
    """Errors of one kernel call on the whole sequence, in bf16 also where the CPU multiplies none and the op casts."""
    task, scale = rounded(), DIM**-0.5
    kernel, _ = choose("torch", device="cpu", dtype="bfloat16", head_dim=DIM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "multiplies", lambda dtype: True)
        out, lse = kernel.forward(task.q, task.k, task.v, scale=scale, causal=True)
        return errors((out, *kernel.backward(task.dout, *task[:3], out, lse, scale=scale, causal=True)))


@pytest.mark.parametrize("ranks", slow_unless([8], [2, 8, 32]), ids=lambda n: f"p{n}")
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_bf16_error_is_the_unsharded_kernels(backend, ranks):
    grid = Grid(2, ranks // 2) if BACKENDS.get(backend).needs_grid else None
    parts = in_process(ranks, lambda fabric: sharded(fabric, rounded(), backend, grid, kernel="torch"))
    results = whole(parts)
    assert {x.dtype for x in results} == {torch.bfloat16}
    found = errors(results)
    print(f"{backend:>14} P={ranks:<3}", *(f"{name} {error:.2e}" for name, error in zip(NAMES, found, strict=True)))
    for name, error, single in zip(NAMES, found, alone(), strict=True):
        rounded_twice = name == "out" and aten.multiplies(torch.bfloat16) and (backend == "striped" or ranks > 8)
        allowed = BF16_RATIO_EVEN if rounded_twice else BF16_RATIO
        assert error <= allowed * single, name
