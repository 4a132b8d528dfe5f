"""Attention in slices of a sequence equals dense attention, on every algorithm, forward and backward."""

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.context import ALGORITHMS
from megatron_cp.context.attend import plan
from megatron_cp.context.layouts import indices
from megatron_cp.context.slices import KeptKeys, attend_slice
from tests.cases import slow_unless
from tests.context.dense import dense, problem
from tests.context.test_sinks import grid_for
from tests.tolerances import EXACT

SLICED = [name for name in ALGORITHMS if name != "fpdt"]
HEADS, KV_HEADS = 8, 2


def stretches(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(range(start, start + length) for start, length in zip(starts, lengths, strict=True))


def in_slices(fabric, task, backend, lengths, again=False, **choices):
    """out, dq, dk, dv of this rank's tokens, and where they stand; `again`: each forward runs twice."""
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    layout = "zigzag" if fabric.size > 1 else "contiguous"
    choices |= {"causal": task.causal, "window": task.window, "layout": layout, "kernel": "reference"}
    how = plan(backend, cp=fabric, **axes, **choices)
    kept = KeptKeys(stretches(lengths))
    places, leaves, outs = [], [], []
    for number, tokens in enumerate(kept.tokens):
        mine = torch.tensor(indices(layout, len(tokens), fabric.size, fabric.rank)) + tokens.start
        places.append(mine)
        leaves.append([x[mine].requires_grad_() for x in task[:3]])
        if again:
            with torch.no_grad():
                attend_slice(*leaves[-1], how, kept, number)
        else:
            outs.append(attend_slice(*leaves[-1], how, kept, number))
    for number in reversed(range(len(lengths))):
        if again:
            outs.insert(0, attend_slice(*leaves[number], how, kept, number))
        outs[0 if again else number].backward(task.dout[places[number]])
    assert not kept.slices
    grads = [torch.cat([inputs[i].grad for inputs in leaves]) for i in range(3)]
    return torch.cat(places), (torch.cat(outs).detach(), *grads)


def assert_equals_dense(parts, task):
    expected = dense(task)
    assert sorted(torch.cat([mine for mine, _ in parts]).tolist()) == list(range(len(task.q)))
    for mine, found in parts:
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert (a - b[mine]).abs().max() <= EXACT * b.abs().max(), name


@pytest.mark.parametrize(
    ("ranks", "window"),
    slow_unless([(2, None)], [(2, None), (3, (9, 0)), (4, (40, 0))]),
)
@pytest.mark.parametrize("backend", SLICED)
def test_slices_equal_dense(backend, ranks, window):
    step = 12 * ranks
    task = problem(6 * step, HEADS, KV_HEADS, causal=True)._replace(window=window)
    lengths = [2 * step, step, step, 2 * step]
    assert_equals_dense(in_process(ranks, lambda fabric: in_slices(fabric, task, backend, lengths)), task)


@pytest.mark.parametrize("window", [None, (9, 0)])
def test_slices_on_one_rank_equal_dense(window):
    task = problem(72, HEADS, KV_HEADS, causal=True)._replace(window=window)
    assert_equals_dense([in_slices(SingleFabric(), task, "zigzag", [24, 13, 12, 23])], task)


@pytest.mark.parametrize("backend", ["zigzag", "ulysses", "all-gather"])
def test_recomputed_slices_equal_dense(backend):
    task = problem(48, HEADS, KV_HEADS, causal=True)
    assert_equals_dense(in_process(2, lambda fabric: in_slices(fabric, task, backend, [24, 12, 12], again=True)), task)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (6, 1)])
def test_slices_of_heads_that_are_shared_unevenly_equal_dense(heads, kv_heads):
    task = problem(72, heads, kv_heads, causal=True)
    assert_equals_dense(in_process(3, lambda fabric: in_slices(fabric, task, "ulysses", [36, 12, 24])), task)


@pytest.mark.parametrize("scale", [-0.5, 0.25])
def test_slices_take_any_scale(scale):
    task = problem(24, 2, 2, causal=True)
    whole = in_slices(SingleFabric(), task, "zigzag", [24], softmax_scale=scale)
    cut = in_slices(SingleFabric(), task, "zigzag", [12, 6, 6], softmax_scale=scale)
    for a, b in zip(cut[1], whole[1], strict=True):
        assert (a - b).abs().max() <= EXACT * b.abs().max()


@pytest.mark.parametrize(
    ("backend", "choices", "reason"),
    [
        ("fpdt", {}, "takes no slices; take one without chunks"),
        ("ring", {"chunks": 2}, "takes no slices; take one without chunks"),
        ("ring", {"causal": False}, "slices need a causal mask"),
    ],
)
def test_plans_that_take_no_slices_are_refused(backend, choices, reason):
    x = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match=reason):
        attend_slice(x, x, x, plan(backend, **choices), KeptKeys((range(4), range(4, 8))), 0)


def test_a_slice_of_another_length_is_refused():
    x = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match="slice 1 has 6 tokens over all ranks, got 4 on 1"):
        attend_slice(x, x, x, plan("ring"), KeptKeys((range(4), range(4, 10))), 1)
