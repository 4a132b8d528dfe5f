"""Cross-attention: other numbers of keys than of queries on each rank, through every algorithm."""

import pytest
import torch
from torch.func import grad
from torch.utils.checkpoint import checkpoint

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.context import ALGORITHMS, AUTO
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.keep import keeping
from tests.cases import slow_unless
from tests.context.dense import problem, relative_error
from tests.context.test_sinks import grid_for
from tests.tolerances import EXACT

# ranks, queries and keys of each, KV heads of 8 query heads
CASES = [
    *((ranks, 6, 11, 2) for ranks in range(2, 9)),
    *((ranks, 13, 4, 8) for ranks in (2, 5, 8)),
    (3, 1, 7, 1),
    (4, 9, 1, 2),
]


def dense(q, k, v, dout):
    """out, dq, dk and dv of attention in which each query sees all keys."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in leaves[1:])
    weights = (torch.einsum("sbhd,tbhd->bhst", leaves[0], keys) * q.shape[-1] ** -0.5).softmax(-1)
    out = torch.einsum("bhst,tbhd->sbhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def inputs(ranks, queries, keys, kv_heads):
    """q, k, v and dout of the whole sequences, values wider than keys."""
    one, other = problem(ranks * queries, 8, 8, causal=False), problem(ranks * keys, 8, kv_heads, causal=False, seed=1)
    wide = problem(ranks * max(queries, keys), 8, kv_heads, causal=False, seed=2, value_dim=12)
    return one.q, other.k, wide.v[: ranks * keys], wide.dout[: ranks * queries]


def crossed(fabric, given, backend, **choices):
    """out, dq, dk and dv of this rank's part of each."""
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    how = plan(backend, cp=fabric, causal=False, **{"kernel": "reference", **axes, **choices})
    q, k, v, dout = (x.chunk(fabric.size)[fabric.rank] for x in given)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, how)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_equals_dense(ranks, given, backend, **choices):
    parts = in_process(ranks, lambda fabric: crossed(fabric, given, backend, **choices))
    for name, found, expected in zip(("out", "dq", "dk", "dv"), zip(*parts, strict=True), dense(*given), strict=True):
        assert relative_error(torch.cat(found), expected) <= EXACT, name


@pytest.mark.parametrize(("ranks", "queries", "keys", "kv_heads"), slow_unless([CASES[1], CASES[7]], CASES))
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_cross_attention_equals_dense(backend, ranks, queries, keys, kv_heads):
    assert_equals_dense(ranks, inputs(ranks, queries, keys, kv_heads), backend)


@pytest.mark.parametrize(
    ("backend", "choices"),
    [
        (AUTO, {}),
        ("zigzag", {"kernel": "torch"}),
        ("striped", {"stripe": 3}),
        ("zigzag", {"layout": "striped"}),
        ("zigzag", {"chunks": 3}),
        ("fpdt", {"chunks": 3}),
        ("all-gather", {"document_layout": "auto"}),
    ],
)
def test_choices_of_a_plan_hold_for_cross_attention(backend, choices):
    assert_equals_dense(4, inputs(4, 5, 7, 2), backend, **choices)


def test_a_ring_sends_no_pads():
    def sent(fabric, keys):
        how = plan("zigzag", cp=fabric, causal=False)
        q, k = torch.zeros(12, 1, 2, 8), torch.zeros(keys, 1, 2, 8)
        attend(q, k, k, how)
        return how.sent

    few, many = (in_process(4, lambda fabric, keys=keys: sent(fabric, keys)) for keys in (3, 12))
    assert [4 * n for n in few] == many


def test_a_sink_takes_its_share_and_has_a_gradient():
    given, sink = inputs(1, 5, 8, 2), torch.linspace(-1, 1, 8, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (*given[:3], sink)]
    out = attend(*leaves[:3], plan("zigzag", causal=False, cp=SingleFabric()), sink=leaves[3])
    found = torch.autograd.grad(out, leaves, given[3])
    others = [x.clone().requires_grad_() for x in (*given[:3], sink)]
    scores = torch.einsum("sbhd,tbhd->bhst", others[0], others[1].repeat_interleave(4, 2)) * 8**-0.5
    column = others[3].expand(2, 8)[..., None, None].expand(2, 8, 5, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("bhst,tbhd->sbhd", weights, others[2].repeat_interleave(4, 2))
    for a, b in zip(found, torch.autograd.grad(expected, others, given[3]), strict=True):
        assert relative_error(a, b) <= EXACT


def test_torch_func_differentiates_it():
    q, k, v, dout = inputs(1, 5, 8, 2)
    how = plan("zigzag", causal=False)
    found = grad(lambda *given: (attend(*given, how) * dout).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(relative_error(a, b) <= EXACT for a, b in zip(found, dense(q, k, v, dout)[1:], strict=True))


@pytest.mark.parametrize(
    ("choices", "call", "message"),
    [
        ({}, {}, "got a causal mask; make the plan with causal=False"),
        ({"causal": False, "window": (3, 3)}, {}, "got a window; "),
        ({"causal": False}, {"documents": [0, 4, 12]}, "got documents; "),
        ({"causal": False, "dropout": 0.5}, {"dropout_seed": 1}, "got dropout_seed; "),
        ({"window": (3, 0)}, {"documents": [0, 12]}, "got a causal mask and a window and documents; "),
    ],
)
def test_what_needs_positions_is_refused_on_every_rank(choices, call, message):
    def body(fabric):
        q, k = torch.zeros(6, 1, 2, 8), torch.zeros(9, 1, 2, 8)
        with pytest.raises(ValueError, match=f"of 6 queries of this rank over 9 keys, .*{message}"):
            attend(q, k, k, plan("zigzag", cp=fabric, **choices), **call)
        return fabric.sent

    assert in_process(2, body) == [0, 0]


@pytest.mark.parametrize(("queries", "keys"), [(6, 8), (5, 9), (6, 6)])
def test_ranks_with_other_lengths_are_found_by_all(queries, keys):
    def body(fabric):
        sizes = (queries, keys) if fabric.rank else (6, 9)
        q, k = (torch.zeros(tokens, 1, 2, 8) for tokens in sizes)
        with pytest.raises(ValueError, match="all ranks must "):
            attend(q, k, k, plan("zigzag", cp=fabric, causal=False))
        return fabric.sent

    assert in_process(2, body) == [0, 0]


def test_tensors_that_do_not_fit_are_refused_as_ever():
    q, k = torch.zeros(6, 1, 2, 8), torch.zeros(9, 1, 3, 8)
    with pytest.raises(ValueError, match="query heads must be a multiple of KV heads"):
        attend(q, k, k, plan("zigzag", causal=False))


def test_a_recomputation_takes_what_was_kept():
    q, k, v, dout = inputs(1, 5, 8, 2)
    leaves, how = [x.clone().requires_grad_() for x in (q, k, v)], plan("zigzag", causal=False)
    out = checkpoint(keeping(lambda *given: attend(*given, how)), *leaves, use_reentrant=True)
    out.backward(dout)
    found = out.detach(), *(x.grad for x in leaves)
    for a, b in zip(found, dense(q, k, v, dout), strict=True):
        assert relative_error(a, b) <= EXACT
