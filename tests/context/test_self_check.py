"""A small batch shows a wrong kernel or algorithm, and passes what is right."""

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.context import ALGORITHMS
from megatron_cp.context.attend import plan
from megatron_cp.context.self_check import CheckedHeads, deviation
from megatron_cp.kernels.reference import ReferenceKernel
from tests.cases import slow_unless
from tests.context.test_sinks import grid_for

CPU = torch.device("cpu")
HEADS = CheckedHeads(heads=8, kv_heads=2, key_dim=12, value_dim=8)


class WrongKernel(ReferenceKernel):
    """Halves the gradient of the keys."""

    name = "wrong"

    def backward(self, *args, **choices):
        dq, dk, dv = super().backward(*args, **choices)
        return dq, dk / 2, dv


def found(fabric, backend, dtype=torch.float64, sink=None, **choices):
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    how = plan(backend, cp=fabric, **{"kernel": "reference", **axes, **choices})
    before = how.sent
    made = deviation(how, HEADS, dtype, CPU, sink)
    assert how.sent == before
    return made


@pytest.mark.parametrize("backend", slow_unless(["zigzag"], ALGORITHMS))
def test_every_algorithm_passes(backend):
    assert not any(made.wrong for made in in_process(2, lambda fabric: found(fabric, backend)))


@pytest.mark.parametrize(
    "choices",
    [
        {"dtype": torch.float32, "kernel": "torch"},
        {"dtype": torch.bfloat16, "kernel": "torch", "window": (50, 0)},
        {"sink": 0.5, "alibi": [2.0**-n for n in range(1, 9)]},
        {"dtype": torch.float32, "alibi": [2.0**-n for n in range(1, 9)]},
        {"softcap": 0.7, "causal": False},
        {"chunks": 3, "layout": "contiguous"},
        {"dropout": 0.5},
    ],
)
def test_plans_of_all_kinds_pass(choices):
    for made in in_process(2, lambda fabric: found(fabric, "zigzag", **choices)):
        assert not made.wrong
        assert made.error > 0


def test_a_wrong_kernel_is_found_with_its_tensor():
    made = found(SingleFabric(), "zigzag", kernel=WrongKernel())
    assert (made.tensor, made.wrong) == ("dk", True)
    assert made.error == pytest.approx(0.5, rel=0.01)


def test_a_wrong_kernel_of_one_rank_is_found():
    def body(fabric):
        return found(fabric, "ulysses", kernel=WrongKernel() if fabric.rank else ReferenceKernel())

    assert [made.tensor for made in in_process(2, body) if made.wrong] == ["dk", "dk"]


def test_what_is_no_number_is_wrong():
    class Empty(ReferenceKernel):
        def forward(self, *args, **choices):
            out, lse = super().forward(*args, **choices)
            return out * torch.nan, lse

    assert found(SingleFabric(), "zigzag", kernel=Empty()).error == torch.inf
