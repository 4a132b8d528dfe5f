"""Attention that sends the latent of multi-latent attention equals dense attention over expanded keys and values."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import BACKENDS
from megatron_cp.context.attend import plan
from megatron_cp.context.latent import LATENT_TRAFFIC, attend_latent
from megatron_cp.context.layouts import indices
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from megatron_cp.context.traffic import LocalSizes
from tests.cases import slow_unless
from tests.context.dense import relative_error
from tests.tolerances import EXACT

RINGS = [entry.name for entry in BACKENDS if entry.capabilities.latent]
HEADS, RANK, ROTARY, PLAIN, VALUE = 4, 10, 6, 8, 5


def tensors(tokens, batch=2):
    """q, latent, up and dout of the whole sequence."""
    torch.manual_seed(tokens)
    shapes = (tokens, batch, HEADS, PLAIN + ROTARY), (tokens, batch, RANK + ROTARY), (HEADS, PLAIN + VALUE, RANK)
    return [torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (tokens, batch, HEADS, VALUE))]


def dense(q, latent, up, dout, seen, sink=None):
    """out, dq, dlatent, dup and the sink's gradient on one rank, by torch alone."""
    given = [x.clone().requires_grad_() for x in (q, latent, up, *([] if sink is None else [sink]))]
    q, latent, up, *sink = given
    plain, v = torch.einsum("sbr,her->sbhe", latent[..., :RANK], up).split([PLAIN, VALUE], 3)
    k = torch.cat([plain, latent[:, :, None, RANK:].expand(-1, -1, HEADS, -1)], 3)
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) / (PLAIN + ROTARY) ** 0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink:
        column = sink[0][None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    weights = scores.softmax(3)[..., : k.shape[0]]
    out = torch.einsum("bhst,tbhe->sbhe", weights, v)
    return out.detach(), *torch.autograd.grad(out, given, dout)


def assert_equals_dense(ranks, tokens, seen, *, sink=None, documents=None, backend="zigzag", **choices):
    whole = tensors(tokens)

    def body(fabric):
        mine = torch.tensor(indices("zigzag", tokens, fabric.size, fabric.rank))
        q, latent, up = (x.clone().requires_grad_() for x in (whole[0][mine], whole[1][mine], whole[2]))
        logits = [] if sink is None else [sink.clone().requires_grad_()]
        made = plan(backend, cp=fabric, kernel="reference", **choices)
        out = attend_latent(q, latent, up, made, sink=logits[0] if logits else None, documents=documents)
        return mine, (out.detach(), *torch.autograd.grad(out, (q, latent, up, *logits), whole[3][mine]))

    parts = in_process(ranks, body)
    for index, expected in enumerate(dense(*whole, seen, sink)):
        if index < 3:
            found = torch.empty_like(expected)
            for mine, results in parts:
                found[mine] = results[index]
        else:
            # the ranks share the weight and the sink
            found = sum(results[index] for _, results in parts)
        assert relative_error(found, expected) <= EXACT, ("out", "dq", "dlatent", "dup", "dsink")[index]


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("backend", slow_unless(["zigzag"], RINGS))
def test_a_latent_that_travels_equals_dense(backend, ranks):
    assert_equals_dense(ranks, 4 * ranks, causal(4 * ranks), backend=backend)


def test_other_masks_sinks_and_documents_equal_dense():
    full, window = torch.ones(24, 24, dtype=torch.bool), causal(24).triu(-4)
    assert_equals_dense(3, 24, full, causal=False)
    assert_equals_dense(3, 24, window, window=(4, 0), backend="ring")
    assert_equals_dense(3, 24, causal(24), sink=torch.randn(HEADS, dtype=torch.float64))
    document = torch.tensor([0] * 7 + [1] * 2 + [2] * 15)
    seen = causal(24) & (document[:, None] == document)
    for layout in ("stream", "document", "blocks"):
        assert_equals_dense(3, 24, seen, documents=[0, 7, 9, 24], document_layout=layout)


@pytest.mark.parametrize(("ranks", "causal"), [(2, True), (4, True), (4, False)])
def test_counted_bytes_are_the_formula(ranks, causal):
    tokens, rank, rotary, heads, dim = 24, 512, 64, 16, 128
    latent = record(Problem("zigzag", ranks, tokens * ranks, heads, heads, dim, causal, latent=(rank, rotary)))
    expanded = record(Problem("zigzag", ranks, tokens * ranks, heads, heads, dim, causal))
    sizes = LocalSizes(ranks, tokens, 1, heads, 1, rank + rotary)
    for backward in (False, True):
        formula = LATENT_TRAFFIC.elements(sizes, causal=causal, backward=backward).size(2, 4)
        sent = (latent.backward if backward else latent.forward).sent
        assert sum(sent) / ranks == pytest.approx(formula, rel=1e-12)
    # forward: the ratio of a latent to keys and values of all heads
    assert sum(latent.forward.sent) / sum(expanded.forward.sent) == (rank + rotary) / (2 * heads * dim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "ulysses"}, "'ulysses' sends keys and values, no latent; use backend 'zigzag' or 'ring' or"),
        ({"chunks": 2}, "takes no chunks; leave it out"),
        ({"alibi": [0.5] * HEADS}, "takes no alibi; leave it out"),
        ({"latent": torch.zeros(4, 2, RANK - 1)}, "a latent of w = 9 numbers is r = 10 that up expands"),
        ({"up": torch.zeros(HEADS, PLAIN + VALUE, RANK)}, "must have one dtype"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(changes, message):
    q, latent, up, _ = tensors(4)
    choices = {"backend": "zigzag", **{key: value for key, value in changes.items() if key not in ("latent", "up")}}

    def body(fabric):
        with pytest.raises(ValueError, match=message):
            attend_latent(q, changes.get("latent", latent), changes.get("up", up), plan(cp=fabric, **choices))
        return fabric.sent

    assert in_process(2, body) == [0, 0]
