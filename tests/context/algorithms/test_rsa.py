"""Whole rows of scores: probabilities and a dense bias, with gradients, by two rings in each pass."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context.algorithms import rsa
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.bias import attend_with_bias, attention_probabilities
from megatron_cp.context.layouts import LAYOUTS, indices, layout
from megatron_cp.context.masks import CAUSAL, FULL
from megatron_cp.context.task import Task
from megatron_cp.kernels.reference import ReferenceKernel
from tests.context.dense import hidden, problem, relative_error
from tests.context.test_backends import assert_equals_dense, sharded
from tests.tolerances import EXACT

MASKS = [(True, None), (False, None), (True, (7, 0)), (False, (3, 5))]
BYTES = 8


def positions(fabric, task, outside="zigzag"):
    return torch.tensor(indices(outside, task.q.shape[0], fabric.size, fabric.rank))


def probabilities(task, bias=None):
    """Dense softmax, b h S S."""
    group = task.q.shape[2] // task.k.shape[2]
    scores = torch.einsum("sbhd,tbhd->bhst", task.q, task.k.repeat_interleave(group, dim=2)) * task.q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(hidden(task), -torch.inf).softmax(-1)


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_equals_dense_on_other_numbers_of_ranks(ranks):
    task = problem(12 * ranks, 6, 2, causal=True)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, "rsa")), task)


@pytest.mark.parametrize(("causal", "window"), MASKS, ids=str)
@pytest.mark.parametrize("outside", list(LAYOUTS))
def test_probabilities_are_the_softmax_in_sequence_order(outside, causal, window):
    task = problem(36, 4, 2, causal=causal)._replace(window=window)

    def body(fabric):
        mine = positions(fabric, task, outside)
        made = plan("rsa", cp=fabric, causal=causal, window=window, layout=outside)
        return mine, attention_probabilities(task.q[mine], task.k[mine], made)

    expected = probabilities(task)
    for mine, found in in_process(3, body):
        assert relative_error(found, expected[:, :, mine]) <= EXACT


# which of b h s S the bias has, the others are broadcast
SHAPES = [(1, 1, 1, 1), (0, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 1), (0, 0, 1, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_and_all_gradients_equal_dense(shape, causal):
    task = problem(24, 4, 2, causal=causal)
    whole = [size if has else 1 for size, has in zip((2, 4, 24, 24), shape, strict=True)]
    bias = torch.randn(whole, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def body(fabric):
        mine = positions(fabric, task)
        leaves = [x[mine].requires_grad_() for x in task[:3]]
        rows = (bias[:, :, mine] if shape[2] else bias.clone()).requires_grad_()
        made = plan("rsa", cp=fabric, causal=causal)
        out = attend_with_bias(*leaves, rows, made)
        seen = attention_probabilities(task.q[mine], task.k[mine], made, rows)
        return mine, seen, [out.detach(), *torch.autograd.grad(out, (*leaves, rows), task.dout[mine])]

    leaves = [x.detach().requires_grad_() for x in (*task[:3], bias)]
    weights = probabilities(task._replace(q=leaves[0], k=leaves[1]), leaves[3])
    out = torch.einsum("bhst,tbhd->sbhd", weights, leaves[2].repeat_interleave(2, dim=2))
    expected = [out.detach(), *torch.autograd.grad(out, leaves, task.dout)]
    total = torch.zeros_like(bias)
    for mine, seen, (*found, dbias) in in_process(3, body):
        assert relative_error(seen, weights.detach()[:, :, mine]) <= EXACT
        for ours, theirs in zip(found, expected, strict=False):
            assert relative_error(ours, theirs[mine]) <= EXACT
        # ranks that share a row of the bias add up what each of them has found
        if shape[2]:
            total[:, :, mine] += dbias
        else:
            total += dbias
    # one number added to all scores changes nothing: its gradient is 0, up to rounding of what is added up
    assert (total - expected[-1]).abs().max() <= EXACT * max(1.0, expected[-1].abs().max().item())


def sent(ranks, causal, gradients):
    """Bytes that each rank sends, and the size of one rank's K."""
    task = problem(12 * ranks, 8, 2, causal=causal)

    def body(fabric):
        mine = positions(fabric, task)
        if gradients:
            sharded(fabric, task, "rsa")
        else:
            attend(task.q[mine], task.k[mine], task.v[mine], plan("rsa", cp=fabric, causal=causal))
        return fabric.sent

    return in_process(ranks, body), task.k.numel() // ranks * BYTES


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_two_rings_each_way_and_gradients_home(ranks):
    forward, unit = sent(ranks, causal=False, gradients=False)
    assert forward == [2 * (ranks - 1) * unit] * ranks
    both, unit = sent(ranks, causal=False, gradients=True)
    assert both == [6 * (ranks - 1) * unit] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_causal_rings_carry_three_quarters(ranks):
    both, unit = sent(ranks, causal=True, gradients=True)
    assert sum(both) == 0.75 * ranks * 6 * (ranks - 1) * unit


def test_probabilities_move_the_keys_only():
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8, dtype=torch.float64)
        attention_probabilities(x, x, plan("rsa", cp=fabric, causal=False))
        return fabric.sent

    assert in_process(3, body) == [2 * 12 * 2 * 8 * BYTES] * 3


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=["causal", "full"])
def test_no_row_of_scores_is_kept_for_the_backward_pass(mask):
    def body(fabric):
        q, k, v = (torch.randn(64, 1, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
        task = Task(
            fabric=fabric, layout=layout("zigzag", 128, 2), mask=mask, scale=1.0, kernel=ReferenceKernel(), heads=(4, 2)
        )
        _, saved = rsa.forward(q, k, v, task)
        return max(tensor.untyped_storage().nbytes() for tensor in saved) <= q.untyped_storage().nbytes()

    assert in_process(2, body) == [True, True]


@pytest.mark.parametrize(
    ("backend", "choices", "size", "message"),
    [
        ("zigzag", {}, (1, 1, 12, 24), r"held by backend 'rsa' without chunks only, got 'zigzag' with chunks = None"),
        ("rsa", {"chunks": 2}, (1, 1, 12, 24), "got 'rsa' with chunks = 2"),
        ("rsa", {}, (1, 1, 24, 24), r"bias must be b h s S = \(1, 2, 12, 24\), or 1 where it is broadcast, got"),
        ("rsa", {}, (12, 24), r"bias must be b h s S = .*, got \(12, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(backend, choices, size, message):
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8, dtype=torch.float64)
        made, bias = plan(backend, cp=fabric, **choices), torch.zeros(size, dtype=torch.float64)
        with pytest.raises(ValueError, match=message):
            attend_with_bias(x, x, x, bias, made)
        with pytest.raises(ValueError, match=message):
            attention_probabilities(x, x, made, bias)
        return fabric.sent

    assert in_process(2, body) == [0, 0]
