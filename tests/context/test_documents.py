"""Packed documents: every backend equals dense attention, whatever tokens see each other."""

import pickle
import re
from functools import cache
from itertools import accumulate, pairwise

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context import documents as sets_of_tokens
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.bias import attend_with_bias, attention_probabilities
from megatron_cp.context.documents import Documents, documents, first_and_window, prefixes, shared_prompts
from megatron_cp.context.layouts import indices
from megatron_cp.context.masks import CAUSAL, FULL
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.proof import prove, small
from megatron_cp.context.trace.record import record
from megatron_cp.grid import most_square
from tests.cases import slow_unless
from tests.context.dense import Problem as Attention
from tests.context.dense import dense, problem, relative_error
from tests.context.problems import grids
from tests.context.test_backends import assert_equals_dense, whole
from tests.tolerances import EXACT

TOKENS = 24
"""Tokens on a rank, of which 2 * ranks chunks have 12."""

LENGTHS = [1, 0, 2, 7, 1, 13, 0, 1]
"""Of documents, before one that straddles all further ranks and a pad tail of 5; some are empty."""


def ends(ranks):
    total = TOKENS * ranks
    return [*accumulate(LENGTHS, initial=0), total - 5, total]


def same_document(cu_seqlens, total):
    """The number of each position's document."""
    numbers = torch.zeros(total, dtype=torch.long)
    for number, (start, stop) in enumerate(pairwise(cu_seqlens)):
        numbers[start:stop] = number
    return numbers[:, None] == numbers[None]


class Case:
    """Documents, the plan's choices for them, and the pairs that they leave, found without the package's masks."""

    def __init__(self, packed: Documents, pairs: torch.Tensor, **choices) -> None:
        self.packed, self.pairs, self.choices = packed, pairs, choices


def case(kind: str, ranks: int) -> Case:
    cu, total = ends(ranks), TOKENS * ranks
    same, at = same_document(cu, total), torch.arange(total)
    before = at[None] - at[:, None]
    sizes = [stop - start for start, stop in pairwise(cu)]
    start = torch.tensor([max(first for first in cu[:-1] if first <= position) for position in range(total)])
    inside = at - start
    match kind:
        case "causal":
            return Case(documents(cu), same & (before <= 0))
        case "full":
            return Case(documents(torch.tensor(cu, dtype=torch.int32)), same, causal=False)
        case "window":
            return Case(documents(cu), same & (before <= 0) & (before >= -3), window=(3, 0))
        case "both sides":
            return Case(documents(cu), same & (before <= 2) & (before >= -4), causal=False, window=(4, 2))
        case "prefix":
            lengths = [min(size, 3 + number % 2) for number, size in enumerate(sizes)]
            of = torch.tensor([lengths[number] for number, size in enumerate(sizes) for _ in range(size)])
            return Case(prefixes(cu, lengths), same & ((inside[None] < of[:, None]) | (before <= 0)), causal=False)
        case "first and window":
            near = (before >= -4) | (inside[None] < 2)
            return Case(first_and_window(cu, 2, 4), same & (before <= 0) & near, causal=False)
        case "shared prompt":
            prompts = [min(size, 4) for size in sizes]
            answers = [[min(3, size - prompt)] for size, prompt in zip(sizes, prompts, strict=True)]
            prompt, first = (
                torch.tensor([values[number] for number, size in enumerate(sizes) for _ in range(size)])
                for values in (prompts, [sum(parts) + p for parts, p in zip(answers, prompts, strict=True)])
            )
            part = (inside >= prompt).long() + (inside >= first).long()
            pairs = same & (before <= 0) & ((part[:, None] == part[None]) | (part[None] == 0))
            return Case(shared_prompts(cu, prompts, answers), pairs, causal=False)
        case "other keys":
            # every document's keys end three positions earlier, but for the last one's
            keys = [0, *(max(0, end - 3) for end in cu[1:-1]), total]
            pairs = torch.zeros(total, total, dtype=torch.bool)
            for q, kv in zip(pairwise(cu), pairwise(keys), strict=True):
                rows, cols = q[1] - q[0], kv[1] - kv[0]
                pairs[slice(*q), slice(*kv)] = torch.ones(rows, cols, dtype=torch.bool).tril(cols - rows)
            return Case(documents(cu, keys), pairs)
    raise AssertionError(kind)


KINDS = ["causal", "full", "window", "both sides", "prefix", "first and window", "shared prompt", "other keys"]


def sharded(fabric, task, made: Case, backend, grid, kernel="reference", outside="zigzag"):
    mine = torch.tensor(indices(outside, len(task.q), fabric.size, fabric.rank))
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    chosen = plan(backend, cp=fabric, kernel=kernel, layout=outside, **axes, **made.choices)
    q, k, v = (x[mine].requires_grad_() for x in task[:3])
    out = attend(q, k, v, chosen, documents=made.packed)
    return mine, (out.detach(), *torch.autograd.grad(out, (q, k, v), task.dout[mine]))


def grid_of(backend, ranks):
    return most_square(ranks) if BACKENDS.get(backend).needs_grid else None


@cache
def packed_problem(kind, ranks):
    made = case(kind, ranks)
    return made, problem(TOKENS * ranks, 8, 2, causal=False)._replace(packed=made.pairs)


@pytest.mark.parametrize(
    ("ranks", "kind"),
    slow_unless(
        [(3, "prefix")],
        # every kind on 2 to 8 ranks, in one stream: tests/context/test_together.py
        [*((3, kind) for kind in KINDS), (8, "causal")],
    ),
)
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_backend_equals_dense_on_packed_documents(backend, ranks, kind):
    made, task = packed_problem(kind, ranks)
    grid = grid_of(backend, ranks)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, made, backend, grid)), task)


THOUSAND = [*accumulate([1, 2, 7, 100, 1000, 2, 1, 7, 100, 1, 1, 37], initial=0)]
"""Ends of documents of one to a thousand tokens."""


@cache
def thousand():
    return problem(THOUSAND[-1] + 12 * 8, 8, 2, causal=True, batch=1)


@cache
def dense_document(start, stop):
    return dense(Attention(*(x[start:stop] for x in thousand()[:4]), causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_backend_equals_dense_on_documents_of_one_to_a_thousand_tokens(backend):
    # two of the sizes 2 to 8; every size has four algorithms
    number = list(ALGORITHMS).index(backend)
    for ranks in (2 + number % 7, 2 + (number + 3) % 7):
        total = -(-THOUSAND[-1] // (12 * ranks)) * 12 * ranks
        made = Case(documents([*THOUSAND, total]), torch.empty(0))
        task = Attention(*(x[:total] for x in thousand()[:4]), causal=True)
        grid = grid_of(backend, ranks)
        parts = in_process(ranks, lambda fabric: sharded(fabric, task, made, backend, grid, "torch"))  # noqa: B023
        each = [dense_document(*ends) for ends in pairwise([*THOUSAND, total]) if ends[0] < ends[1]]
        expected = map(torch.cat, zip(*each, strict=True))
        found = max(relative_error(one, other) for one, other in zip(whole(parts), expected, strict=True))
        print(f"{backend:<14} 1 to 1,000 tokens, P={ranks}: {found:.1e}")
        assert found <= EXACT


@pytest.mark.parametrize("outside", ["contiguous", "striped"])
@pytest.mark.parametrize("backend", ["zigzag", "distflash"])
def test_documents_lie_on_any_layout(backend, outside):
    made, task = packed_problem("causal", 4)
    grid = grid_of(backend, 4)
    parts = in_process(4, lambda fabric: sharded(fabric, task, made, backend, grid, outside=outside))
    assert_equals_dense(parts, task)


@pytest.mark.parametrize(
    ("kind", "ranks", "windows"),
    slow_unless(
        [("prefix", 2, False)],
        [("prefix", 2, False), ("causal", 3, False), ("first and window", 4, True)],
    ),
)
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_every_pair_of_a_document_is_computed_once_in_each_pass(backend, kind, ranks, windows):
    made = case(kind, ranks)
    for grid in grids(backend, ranks):
        choices = {"grid": grid, "documents": made.packed, "windows": windows, **made.choices}
        proof = prove(Problem(backend, ranks, TOKENS * ranks, 8, 2, **choices))
        assert proof.covered, proof.problem
        assert proof.pairs == 8 * made.pairs.sum()


def test_the_proof_notices_documents_that_are_not_masked(monkeypatch):
    # a mask over the whole sequence in place of the documents'
    asked = Problem("zigzag", 2, 48, 8, 2, documents=documents([0, 9, 48]))
    assert prove(asked).covered
    wrong = documents([0, 48]).mask(CAUSAL)
    expected = asked.mask
    calls = iter([expected])
    monkeypatch.setattr(Documents, "mask", lambda self, band: next(calls, wrong))
    assert "may not see key" in prove(asked).problem


@pytest.mark.parametrize("backend", slow_unless(["zigzag"], ALGORITHMS))
def test_a_trace_counts_the_pairs_of_documents(backend):
    made = case("causal", 4)
    asked = Problem(backend, 4, TOKENS * 4, 8, 2, grid=grid_of(backend, 4), documents=made.packed)
    found = record(asked)
    assert sum(found.forward.work) == sum(found.backward.work) == 8 * made.pairs.sum()
    whole = record(Problem(backend, 4, TOKENS * 4, 8, 2, grid=grid_of(backend, 4)))
    assert sum(found.forward.sent) <= sum(whole.forward.sent)


def test_short_documents_need_fewer_tokens_of_other_ranks():
    # no document straddles two chunks
    apart = documents([*range(0, 97, 12)])
    assert sum(record(Problem("zigzag", 4, 96, documents=apart)).forward.sent) == 0


def test_a_shorter_problem_keeps_its_documents():
    asked = Problem("zigzag", 2, 4800, documents=documents([0, 1000, 1000, 2400, 4800]))
    shorter = small(asked)
    assert [each.q for each in shorter.documents.sets] == [range(5), range(5, 5), range(5, 12), range(12, 24)]
    assert prove(shorter).covered


def refused(made, backend="zigzag", **choices):
    """The text of the refusal, the same on both ranks, and the bytes sent before it."""

    def body(fabric):
        x = torch.zeros(TOKENS, 1, 4, 8, dtype=torch.float64)
        try:
            attend(x, x, x, plan(backend, cp=fabric, **choices), documents=made())
        except ValueError as error:
            return str(error), fabric.sent
        return "taken", fabric.sent

    (found,) = set(in_process(2, body))
    return found


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: [0, 20, 40], "documents must end where the sequence does, at S = 48 on 2 ranks, got .* at 40; pads"),
        (lambda: [0, 20, 50], "at S = 48 on 2 ranks, got cu_seqlens that end at 50; cut the last"),
        (lambda: [0, 30, 20, 48], "cu_seqlens must not fall, got 20 after 30; sort the documents"),
        (lambda: [0, -4, 48], "cu_seqlens must not fall, got -4 after 0"),
        (lambda: [8, 20, 48], "cu_seqlens must start at 0, got 8; it holds where documents start and end, not lengths"),
        (lambda: documents([0.0, 48.0]), r"cu_seqlens must be whole numbers, .* got \[0.0, 48.0\]"),
        (lambda: [0], "cu_seqlens must be whole numbers"),
        (lambda: torch.tensor([[0, 48]]), "cu_seqlens must be whole numbers"),
        (
            lambda: torch.empty(3, dtype=torch.int32, device="meta"),
            "must be on the CPU or the device of q, cpu, got meta",
        ),
        (
            lambda: documents(torch.empty(3, dtype=torch.int32, device="meta")),
            "must hold numbers, got a tensor on .* meta",
        ),
        (lambda: documents([0, 20, 48], [0, 48]), "equally many documents and end at one S, got 2 to 48 and 1 to 48"),
        (lambda: documents([0, 20, 48], [0, 20, 40]), "end at one S, got 2 to 48 and 2 to 40"),
        (lambda: prefixes([0, 20, 48], [21, 0]), "a prefix has 0 to as many tokens as its document, here 20, got 21"),
        (lambda: prefixes([0, 20, 48], [2]), "each document needs its prefix, got 1 for 2 documents"),
        (
            lambda: prefixes([0, 20, 48], [2, 3]),
            "bring bands of their own, got a plan with .*; make the plan with causal=",
        ),
        (lambda: first_and_window([0, 48], -1, 3), "first is a number of tokens, 0 or more, got -1"),
        (lambda: first_and_window([0, 48], 1, -2), "window is a number of tokens, 0 or more, got -2"),
        (lambda: shared_prompts([0, 48], [40], [[4, 5]]), "48 tokens cannot hold a prompt of 40 and answers"),
    ],
)
def test_documents_that_do_not_fit_are_refused_before_anything_is_sent(made, message):
    text, sent = refused(made)
    assert re.search(message, text), text
    assert "\n" not in text
    assert not sent


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="a window's limits are 0 or more, or -1 for none"):
        plan("zigzag", window=(-2, 0))


def test_ranks_with_other_documents_are_found_by_all():
    def body(fabric):
        x = torch.zeros(TOKENS, 1, 4, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"all ranks must attend by one plan, got rank 0: .*2 sets of 48 tokens"):
            attend(x, x, x, plan("zigzag", cp=fabric), documents=[0, 20 + fabric.rank, 48])
        return fabric.sent

    assert in_process(2, body) == [0, 0]


def test_a_backend_that_cannot_do_documents_is_refused_by_name():
    entry = BACKENDS.get("tokenring")
    object.__setattr__(entry.capabilities, "masks", frozenset({"full", "causal"}))
    try:
        text, sent = refused(lambda: [0, 20, 48], backend="tokenring")
    finally:
        object.__setattr__(entry.capabilities, "masks", frozenset({"full", "causal", "window", "packed"}))
    assert "backend 'tokenring' does causal and full attention only, got a packed mask" in text
    assert not sent


def test_documents_are_one_object_for_all_layers():
    packed = documents([0, 20, 48])
    assert packed.mask(CAUSAL) is packed.mask(CAUSAL)
    assert packed.mask(CAUSAL) is not packed.mask(FULL)


def test_pickled_documents_see_the_same_tokens():
    packed = prefixes([0, 20, 48], [3, 5])
    again = pickle.loads(pickle.dumps(packed))
    assert (again.sets, again.tokens, again.term) == (packed.sets, packed.tokens, packed.term)
    assert again.number != packed.number


def test_documents_of_a_graph_that_are_gone_are_named():
    number = documents([0, 4]).number
    with pytest.raises(ValueError, match=f"documents {number} of a compiled graph are gone"):
        sets_of_tokens.numbered(number)


@pytest.mark.parametrize("backend", ["zigzag", "tokenring", "rsa", "fpdt"])
def test_sinks_share_the_softmax_of_a_document(backend):
    made, task = packed_problem("other keys", 2)
    sink = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def body(fabric):
        mine = torch.tensor(indices("zigzag", len(task.q), 2, fabric.rank))
        q, k, v, own = (x.clone().requires_grad_() for x in (*(x[mine] for x in task[:3]), sink))
        out = attend(q, k, v, plan(backend, cp=fabric, kernel="reference"), documents=made.packed, sink=own)
        return mine, out.detach(), *torch.autograd.grad(out, (q, own), task.dout[mine])

    parts = in_process(2, body)
    q, k, v = (x.clone().requires_grad_() for x in task[:3])
    own = sink.clone().requires_grad_()
    scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(4, 2)) * q.shape[-1] ** -0.5
    wide = torch.cat([scores.masked_fill(~made.pairs, -torch.inf), own[:, None, None].expand(2, 8, len(q), 1)], -1)
    out = torch.einsum("bhst,tbhd->sbhd", wide.softmax(-1)[..., :-1], v.repeat_interleave(4, 2))
    dq, dsink = torch.autograd.grad(out, (q, own), task.dout)
    for mine, found, dq_found, _ in parts:
        assert relative_error(found, out.detach()[mine]) <= EXACT
        assert relative_error(dq_found, dq[mine]) <= EXACT
    assert relative_error(sum(part for *_, part in parts), dsink) <= EXACT


def test_probabilities_and_bias_know_documents():
    made, task = packed_problem("causal", 2)
    bias = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def body(fabric):
        mine = torch.tensor(indices("zigzag", len(task.q), 2, fabric.rank))
        chosen = plan("rsa", cp=fabric, kernel="reference")
        q, k, v = (x[mine] for x in task[:3])
        out = attend_with_bias(q, k, v, bias, chosen, documents=made.packed)
        weights = attention_probabilities(q, k, chosen, documents=made.packed)
        assert (weights[:, :, ~made.pairs[mine]] == 0).all()
        return (out - dense(task)[0][mine]).abs().max().item()

    assert max(in_process(2, body)) <= EXACT
