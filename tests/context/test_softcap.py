"""Capped scores: every algorithm equals dense attention, and kernels that do not cap them are refused by name."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, AUTO, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.kernels import KERNELS, choose
from megatron_cp.kernels.flash_attn import FlashKernel
from megatron_cp.kernels.protocol import CapsScores
from megatron_cp.kernels.reference import ReferenceKernel
from tests.cases import slow_unless
from tests.context.dense import hidden, problem, relative_error
from tests.context.test_backends import sharded, whole
from tests.context.test_sinks import grid_for
from tests.kernels import stand_ins
from tests.tolerances import EXACT

CAPPING = [name for name in ALGORITHMS if BACKENDS.get(name).capabilities.softcap]
CAP = 0.7


def dense_capped(task):
    q, k, v = (x.detach().requires_grad_() for x in task[:3])
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, keys) * q.shape[-1] ** -0.5
    scores = (CAP * (scores / CAP).tanh()).masked_fill(hidden(task), -torch.inf)
    out = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), task.dout)


@pytest.mark.parametrize(
    ("ranks", "causal", "window"),
    slow_unless([(3, True, None)], [(3, True, None), (8, True, None), (5, False, None), (4, True, (9, 0))]),
)
@pytest.mark.parametrize("backend", slow_unless(["zigzag", "ulysses", "tokenring"], CAPPING))
def test_capped_scores_equal_dense(backend, ranks, causal, window):
    task = problem(12 * ranks, 8, 2, causal=causal)._replace(window=window)
    grid = grid_for(backend, ranks)
    parts = in_process(ranks, lambda fabric: sharded(fabric, task, backend, grid, softcap=CAP))
    for found, expected in zip(whole(parts), dense_capped(task), strict=True):
        assert relative_error(found, expected) <= EXACT


def test_auto_takes_a_kernel_that_caps():
    how = plan(AUTO, softcap=CAP)
    kernel, reason = how.kernel_of("cpu", "float64", 8)
    assert kernel.name == "reference"
    assert "'torch' does not cap scores" in reason


@pytest.mark.parametrize("release", stand_ins.RECORDED["packages"]["flash-attn"])
def test_flash_attention_caps_scores(release):
    task = problem(24, 8, 2, causal=True)
    kernel = FlashKernel(stand_ins.flash_attn(release), deterministic=True).capped(CAP)
    out, lse = kernel.forward(*task[:3], scale=8**-0.5, causal=True)
    grads = kernel.backward(task.dout, *task[:3], out, lse, scale=8**-0.5, causal=True)
    for found, expected in zip((out, *grads), dense_capped(task), strict=True):
        assert relative_error(found, expected) <= EXACT


def test_the_registry_says_which_kernels_cap():
    assert [entry.name for entry in KERNELS if entry.caps] == ["flash", "reference"]
    assert isinstance(ReferenceKernel(), CapsScores)
    assert not isinstance(choose("torch", device="cpu", dtype="float32", head_dim=8)[0], CapsScores)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"kernel": "torch"}, "kernel 'torch' does not cap scores; use 'auto' or one of: flash, reference, or leave"),
        (
            {"kernel": choose("torch", device="cpu", dtype="float32", head_dim=8)[0]},
            "kernel 'torch' does not cap scores",
        ),
        ({"backend": "rsa"}, "backend 'rsa' does not cap scores; use backend 'zigzag' or "),
        ({"softcap": 0}, "softcap must be a positive finite number, got 0; leave it out"),
        ({"softcap": True}, "softcap must be a positive finite number, got True"),
        ({"softcap": float("inf")}, "softcap must be a positive finite number, got inf"),
    ],
)
def test_what_cannot_cap_is_refused_by_name(choices, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"backend": "zigzag", "softcap": CAP, **choices})


def test_ranks_with_different_caps_are_found_by_all():
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8)
        with pytest.raises(ValueError, match="all ranks must attend by one plan, got rank 0: "):
            attend(x, x, x, plan("zigzag", cp=fabric, softcap=1.0 + fabric.rank))
        return fabric.sent

    assert in_process(2, body) == [0, 0]
