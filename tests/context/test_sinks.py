"""Attention with sinks equals a dense softmax with one more column, on every algorithm."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.func import grad, vmap

from megatron_cp.comm import GroupFabric, in_process
from megatron_cp.context import ALGORITHMS, AUTO, BACKENDS, Capabilities
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import indices
from megatron_cp.grid import Grid
from tests.cases import slow_unless
from tests.context.dense import hidden, problem, relative_error
from tests.context.test_modes import made
from tests.ranks import run_ranks
from tests.tolerances import EXACT

# 2 to 8, beside all else: tests/context/test_together.py
RANKS = [3, 8]
HEADS, KV_HEADS = 8, 2
SINKS = {
    "learned": torch.linspace(-2, 3, HEADS, dtype=torch.float64),
    "of each sequence": torch.linspace(-2, 3, 2 * HEADS, dtype=torch.float64).view(2, HEADS),
    "off by one": 0.0,
    "number": -1.5,
    "no sink in some heads": torch.tensor([-torch.inf, 1.0] * (HEADS // 2), dtype=torch.float64),
}


def dense_with_sink(task, sink):
    """out, dq, dk, dv and dsink in float64, by autograd through a softmax with one more column."""
    q, k, v = (x.detach().requires_grad_() for x in task[:3])
    sink = torch.as_tensor(sink, dtype=torch.float64).clone().requires_grad_()
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(hidden(task), -torch.inf)
    column = sink.expand(q.shape[1:3])[..., None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out = torch.einsum("bhst,tbhd->sbhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v, sink), task.dout)


def sharded(fabric, task, backend, sink, grid=None, **choices):
    """out, dq, dk, dv of this rank's tokens, its part of dsink, and where the tokens stand in the sequence."""
    mine = torch.tensor(indices("zigzag", len(task.q), fabric.size, fabric.rank))
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    choices = {"kernel": "reference", **choices}
    how = plan(backend, cp=fabric, causal=task.causal, window=task.window, **axes, **choices)
    leaves = [x[mine].requires_grad_() for x in task[:3]]
    if isinstance(sink, torch.Tensor):
        sink = sink.clone().requires_grad_()
        leaves.append(sink)
    out = attend(*leaves[:3], how, sink=sink)
    return mine, (out.detach(), *torch.autograd.grad(out, leaves, task.dout[mine]))


def assert_equals_dense(parts, task, sink, tolerance=EXACT):
    *expected, dsink = dense_with_sink(task, sink)
    for mine, found in parts:
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=False):
            assert (a.double() - b[mine]).abs().max() <= tolerance * b.abs().max(), name
    if isinstance(sink, torch.Tensor):
        assert relative_error(sum(found[4] for _, found in parts), dsink) <= tolerance


def grid_for(backend, ranks):
    if not BACKENDS.get(backend).needs_grid:
        return None
    inner = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n < ranks)
    return Grid(inner, ranks // inner)


@pytest.mark.parametrize(
    ("ranks", "causal", "window"),
    slow_unless(
        [(3, True, None)],
        [*((ranks, True, None) for ranks in RANKS), (5, False, None), (8, True, (9, 0)), (4, False, (7, 3))],
    ),
)
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_a_learned_sink_equals_dense(backend, ranks, causal, window):
    task, sink = problem(12 * ranks, HEADS, KV_HEADS, causal=causal)._replace(window=window), SINKS["learned"]
    grid = grid_for(backend, ranks)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, backend, sink, grid)), task, sink)


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("backend", ["zigzag", "ulysses", "fpdt", "rsa"])
def test_every_kind_of_sink_equals_dense(backend, kind):
    task, sink, grid = problem(24, HEADS, KV_HEADS, causal=True), SINKS[kind], grid_for(backend, 2)
    parts = in_process(2, lambda fabric: sharded(fabric, task, backend, sink, grid, kernel="torch"))
    assert_equals_dense(parts, task, sink)


@pytest.mark.parametrize(
    "backend", slow_unless(["ring"], [e.name for e in BACKENDS if e.capabilities.chunks and e.name != AUTO])
)
def test_a_sink_in_chunks_equals_dense(backend):
    task, sink, grid = problem(64, HEADS, KV_HEADS, causal=True), SINKS["learned"], grid_for(backend, 4)
    parts = in_process(4, lambda fabric: sharded(fabric, task, backend, sink, grid, chunks=4))
    assert_equals_dense(parts, task, sink)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (10, 5), (6, 1)])
@pytest.mark.parametrize("backend", ["ulysses", "fpdt"])
def test_a_sink_of_heads_that_are_dealt_unevenly_equals_dense(backend, heads, kv_heads):
    task, sink = problem(36, heads, kv_heads, causal=True), torch.linspace(-1, 2, heads, dtype=torch.float64)
    assert_equals_dense(in_process(3, lambda fabric: sharded(fabric, task, backend, sink)), task, sink)


def test_auto_takes_a_sink():
    task, sink = problem(24, HEADS, KV_HEADS, causal=True), SINKS["learned"]
    assert_equals_dense(in_process(2, lambda fabric: sharded(fabric, task, AUTO, sink)), task, sink)


@pytest.mark.parametrize("backend", ALGORITHMS)
def test_a_sink_sends_nothing(backend):
    task, grid = problem(24, HEADS, KV_HEADS, causal=True), grid_for(backend, 2)

    def sent(sink, fabric):
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
        how = plan(backend, cp=fabric, **axes)
        mine = [x[:12].clone().requires_grad_() for x in task[:3]]
        attend(*mine, how, sink=sink).sum().backward()
        return how.sent

    with_sink, without = (in_process(2, partial(sent, sink)) for sink in (SINKS["learned"], None))
    assert with_sink == without != [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sink_of_another_dtype_gets_a_gradient_of_its_own(dtype):
    task, sink = problem(24, HEADS, KV_HEADS, causal=True), SINKS["learned"].to(dtype)
    parts = in_process(2, lambda fabric: sharded(fabric, task, "zigzag", sink))
    assert all(part.dtype == dtype for _, (*_, part) in parts)
    assert_equals_dense(
        [(mine, (*found, part.double())) for mine, (*found, part) in parts], task, sink.double(), torch.finfo(dtype).eps
    )


def test_bfloat16_with_a_sink_is_rounded_once_more():
    task, sink = problem(64, HEADS, KV_HEADS, causal=True, dim=32), SINKS["learned"]
    narrow = task._replace(**{name: getattr(task, name).bfloat16() for name in ("q", "k", "v", "dout")})
    exact = dense_with_sink(task._replace(**{n: getattr(narrow, n).double() for n in ("q", "k", "v", "dout")}), sink)
    for mine, found in in_process(2, lambda fabric: sharded(fabric, narrow, "zigzag", sink)):
        for a, b in zip(found[:4], exact, strict=False):
            assert (a.double() - b[mine]).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.parametrize("backend", slow_unless(["ring", "ulysses"], ALGORITHMS))
@pytest.mark.parametrize("shape", [(HEADS,), (2, HEADS)])
def test_grad_and_vmap_of_a_sink_in_any_order_equal_autograd(backend, shape):
    def body(fabric):
        how = made(fabric, backend)
        torch.manual_seed(fabric.rank)
        many = torch.randn(3, 12, 2, HEADS, 8, dtype=torch.float64)
        one, sinks = torch.randn(12, 2, HEADS, 8, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)

        def loss(q, k, sink):
            return attend(q, k, q, how, sink=sink).square().sum()

        def by_autograd(q, sink):
            leaves = [x.clone().requires_grad_() for x in (q, one, sink)]
            return torch.autograd.grad(loss(*leaves), leaves)

        expected = [torch.stack(each) for each in zip(*map(by_autograd, many, sinks), strict=True)]
        found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, 0))(many, one, sinks)
        assert all(relative_error(a, b) <= EXACT for a, b in zip(found, expected, strict=True))
        shared = vmap(grad(loss, argnums=2), in_dims=(0, None, None))(many, one, sinks[0])
        rows = torch.stack([by_autograd(q, sinks[0])[2] for q in many])
        assert relative_error(shared, rows) <= EXACT
        outside = grad(lambda sink: vmap(loss, in_dims=(0, None, None))(many, one, sink).sum())(sinks[0])
        assert relative_error(outside, rows.sum(0)) <= EXACT

    in_process(2, body)


def compiled():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fabric, found = GroupFabric(dist.group.WORLD), []
    for backend, sink in (("zigzag", torch.randn(4).double().requires_grad_()), ("ulysses", 0.0)):
        how = made(fabric, backend)

        def body(q, k, sink, how=how):
            return attend(q * 2, k + 1, k, how, sink=sink) * 2

        fast = torch.compile(body, backend="aot_eager", fullgraph=True)
        leaves = [torch.randn(12, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in "qk"]
        leaves += [sink] if isinstance(sink, torch.Tensor) else []
        pairs = [torch.autograd.grad(call(leaves[0], leaves[1], sink).sin().sum(), leaves) for call in (fast, body)]
        found += [relative_error(a, b) for a, b in zip(*pairs, strict=True)]
    dist.barrier()
    return found


@pytest.mark.slow
def test_a_compiled_attention_with_a_sink_equals_the_plain_one():
    for errors in run_ranks(2, compiled):
        assert max(errors) <= EXACT
        assert len(errors) == 5


X = torch.zeros(12, 2, 4, 8)
FIT = "sink must have a logit for each of the 4 query heads of this rank, got shape "
UNFIT = [
    (torch.zeros(3), FIT + "(3,); give (4,), or (2, 4) for sinks of each sequence"),
    (torch.zeros(3, 4), FIT + "(3, 4); give (4,), or"),
    (torch.zeros(()), FIT + "(); give (4,), or"),
    (
        torch.zeros(4, dtype=torch.int64),
        "sink must be of dtype float64 or float32 or bfloat16 or float16, got torch",
    ),
    (torch.zeros(4, device="meta"), "sink must be on the device of q, got meta and cpu; move it"),
    ("0", "sink must be a number or a tensor with a logit for each of 4 query heads, got '0'"),
    (True, "sink must be a number or a tensor with a logit for each of 4 query heads, got True"),
    (float("nan"), "sink must be a number below infinity, got nan; leave it out"),
]


def refusals():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fabric, texts = GroupFabric(dist.group.WORLD), []
    for sink in (*(sink for sink, _ in UNFIT), 0.0 if fabric.rank else None):
        try:
            attend(X, X, X, plan("zigzag", cp=fabric), sink=sink)
        except ValueError as error:
            texts.append(str(error))
    dist.barrier()
    return texts, fabric.sent


@pytest.mark.slow
def test_sinks_that_do_not_fit_are_one_line_on_every_rank():
    first, second = run_ranks(2, refusals)
    assert first == second
    (*texts, differ), sent = first
    assert sent == 0
    assert differ.startswith("all ranks must hold tensors of one shape (s, b, h, d), got rank 0: ")
    for text, (_, start) in zip(texts, UNFIT, strict=True):
        assert text.startswith(start)
        assert "\n" not in text


def test_a_backend_that_keeps_something_else_refuses_sinks():
    entry = replace(BACKENDS.get("ring"), capabilities=Capabilities(sinks="none"))
    with pytest.raises(ValueError, match="backend 'ring' does not merge sinks; use backend 'zigzag' or "):
        attend(X, X, X, replace(plan("zigzag"), backend=entry), sink=0.0)
