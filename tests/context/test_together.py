"""Documents, sinks, values of another dim, ALiBi and dropout at once, on 2 to 8 ranks: every algorithm equals dense.

One stream has documents of every kind of mask. What a feature does alone is shown, on fewer ranks, in its own file.
"""

from functools import cache, partial

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.documents import Documents, TokenSet
from megatron_cp.context.layouts import indices
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from tests.cases import slow_unless
from tests.context.dense import Problem, hidden, problem, relative_error
from tests.context.test_alibi import SLOPES
from tests.context.test_backends import whole
from tests.context.test_documents import KINDS, TOKENS, Case, case
from tests.context.test_dropout import DROPPING, RATE, SEED, factors
from tests.context.test_sinks import HEADS, KV_HEADS, SINKS, grid_for
from tests.tolerances import EXACT

RANKS = range(2, 9)
SINK = SINKS["learned"]
VALUE_DIM = 12


@cache
def every_kind(ranks: int) -> Case:
    """Return one stream with documents of every kind of mask, and a causal tail that fills it up."""
    made = [case(kind, 2) for kind in KINDS]
    used = sum(each.packed.tokens for each in made)
    total = -(-used // (TOKENS * ranks)) * TOKENS * ranks
    sets, pairs, start = list[TokenSet](), torch.zeros(total, total, dtype=torch.bool), 0
    for each in made:
        # a set with a band of its own does not take that of the plan
        pieces = each.packed.mask(band_of(**each.choices)).moved(-start, -start).all
        sets += [TokenSet(*piece) for piece in pieces]
        stop = start + each.packed.tokens
        pairs[start:stop, start:stop] = each.pairs
        start = stop
    sets.append(TokenSet(range(start, total), range(start, total), CAUSAL))
    pairs[start:, start:] = torch.ones(total - start, total - start, dtype=torch.bool).tril()
    return Case(Documents(sets, total), pairs, causal=False)


def band_of(causal: bool = True, window: tuple[int, int] | None = None) -> Mask:
    """Return the band of a plan with these choices."""
    if window is not None:
        return Mask(*window)
    return CAUSAL if causal else FULL


@cache
def task_of(kind: str, ranks: int) -> tuple[Case, Problem]:
    made = every_kind(ranks) if kind == "every kind" else case(kind, ranks)
    task = problem(len(made.pairs), HEADS, KV_HEADS, causal=False, batch=1, value_dim=VALUE_DIM)
    return made, task._replace(packed=made.pairs)


@cache
def expected(kind: str, ranks: int, alibi: bool, dropped: bool) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv and dsink in float64, by autograd through a softmax with one more column."""
    _, task = task_of(kind, ranks)
    q, k, v, sink = (x.clone().requires_grad_() for x in (*task[:3], SINK))
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, keys) * q.shape[-1] ** -0.5
    if alibi:
        places = torch.arange(len(q), dtype=torch.float64)
        scores = scores + torch.tensor(SLOPES, dtype=torch.float64)[:, None, None] * (places - places[:, None])
    scores = scores.masked_fill(hidden(task), -torch.inf)
    column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out = torch.einsum("bhst,tbhd->sbhd", weights * factors(task) if dropped else weights, values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v, sink), task.dout)


def sharded(fabric, kind, backend, alibi, dropped):
    made, task = task_of(kind, fabric.size)
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    choices = {**made.choices, **({"alibi": SLOPES} if alibi else {}), **({"dropout": RATE} if dropped else {})}
    how = plan(backend, cp=fabric, kernel="reference", **axes, **choices)
    mine = torch.tensor(indices("zigzag", len(task.q), fabric.size, fabric.rank))
    leaves = [*(x[mine].requires_grad_() for x in task[:3]), SINK.clone().requires_grad_()]
    seed = {"dropout_seed": SEED} if dropped else {}
    out = attend(*leaves[:3], how, documents=made.packed, sink=leaves[3], **seed)
    return mine, (out.detach(), *torch.autograd.grad(out, leaves, task.dout[mine]))


def error(kind, backend, ranks, alibi=False):
    """The largest deviation of out and all gradients, each over its largest value."""
    dropped = alibi and backend in DROPPING
    parts = in_process(ranks, partial(sharded, kind=kind, backend=backend, alibi=alibi, dropped=dropped))
    *tensors, dsink = expected(kind, ranks, alibi, dropped)
    found = whole([(mine, of_tokens[:4]) for mine, of_tokens in parts])
    found.append(sum(of_tokens[4] for _, of_tokens in parts))
    return max(relative_error(one, other) for one, other in zip(found, [*tensors, dsink], strict=True))


def assert_exact(words, backend, errors):
    print(f"{backend:<14} {words}:", *(f"P={ranks} {found:.1e}" for ranks, found in errors.items()))
    assert max(errors.values()) <= EXACT


CASES = slow_unless([("zigzag", (2,))], [("zigzag", (2,)), *((backend, tuple(RANKS)) for backend in ALGORITHMS)])


@pytest.mark.parametrize(("backend", "ranks"), CASES)
def test_every_kind_of_document_beside_a_sink_and_wide_values_equals_dense(backend, ranks):
    assert_exact("documents, sink, dv", backend, {size: error("every kind", backend, size) for size in ranks})


@pytest.mark.parametrize(("backend", "ranks"), CASES)
def test_alibi_and_dropout_in_documents_beside_a_sink_and_wide_values_equal_dense(backend, ranks):
    words = "ALiBi, dropout" if BACKENDS.get(backend).capabilities.softcap else "ALiBi"
    assert_exact(words, backend, {size: error("causal", backend, size, alibi=True) for size in ranks})


def test_one_stream_holds_every_kind_of_mask():
    made = every_kind(3)
    seen = torch.zeros_like(made.pairs)
    for q, kv, (left, right) in made.packed.mask(FULL).all:
        before = torch.arange(kv.start, kv.stop)[None] - torch.arange(q.start, q.stop)[:, None]
        first, last = (-len(seen) if left is None else -left), (len(seen) if right is None else right)
        inside = (before >= first) & (before <= last)
        assert not seen[q.start : q.stop, kv.start : kv.stop][inside].any(), "two pieces have a pair in common"
        seen[q.start : q.stop, kv.start : kv.stop] |= inside
    assert torch.equal(seen, made.pairs)
