"""Prove a backend's own loop: run it on tokens that carry their position, and count the pairs that meet.

The ranks are threads of one process. Each query, key, value and output gradient carries its real position and head,
and the kernel, instead of attention, looks at what it was given and counts every pair. A backend is exact when each
unmasked pair was computed once in each pass, and when all that was computed for a token came home to it.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_cp.comm import LocalFabric, MessageError, in_process
from megatron_cp.context.attend import attend
from megatron_cp.context.masks import AnyMask, Pieces
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.probe import probe
from megatron_cp.context.trace.record import plan_on
from megatron_cp.kernels import Window

KINDS = {"q": 1, "k": 2, "v": 3, "dout": 4, "out": 5}
CHANNELS = ("position", "head", "kind", "one")


class Proof(NamedTuple):
    """The result of a proof.

    covered: True if each unmasked pair was computed exactly once in each pass
    problem: the first error, or empty
    pairs:   unmasked pairs of all heads
    """

    covered: bool
    problem: str
    pairs: int


class NotExactError(Exception):
    """A kernel call or a result that differs from the expected one."""


def prove(problem: Problem) -> Proof:
    """Run the backend on the problem and check every pair; meant for small sequences, see `small`.

    Raises ValueError for what the backend refuses.
    """
    book = Book(problem)
    try:
        wrong = _run(problem, book)
        if wrong and not book.asked:
            # the loop computes without a kernel
            wrong = probe(problem, book.visible)
    except MessageError as error:
        wrong = str(error)
    return Proof(not wrong, wrong, 0 if wrong else int(book.visible.sum()) * problem.heads)


def _run(problem: Problem, book: "Book") -> str:
    """Describe the first error of the run; empty if there is none."""
    try:
        in_process(problem.ranks, lambda fabric: _rank(problem, book, fabric), problem.ranks_per_node)
        for counts in (book.forward, book.backward):
            counts.check()
    except MessageError:
        raise
    except (NotExactError, RuntimeError, AssertionError, IndexError) as error:
        return str(error) or type(error).__name__
    return ""


def small(problem: Problem, tokens_per_rank: int = 0) -> Problem:
    """Shorten sequence, window, stripes and documents of a problem, to as many tokens per rank as 64 ranks allow."""
    tokens = tokens_per_rank or (12 if problem.ranks <= 16 else 2) * (problem.chunks or 1)
    seq = tokens * problem.ranks
    if problem.seq <= seq:
        return problem
    left, right = (limit and max(1, round(limit * seq / problem.seq)) for limit in problem.window or (None, None))
    stripe = 1 if problem.stripe == 1 else 2 * (problem.chunks or 1)
    documents = problem.documents and problem.documents.shortened(seq)
    return replace(problem, seq=seq, window=(left, right), stripe=stripe, documents=documents)


class Counts:
    """How often each (query head, query position, key position) was computed in one pass."""

    def __init__(self, name: str, visible: np.ndarray, heads: int) -> None:
        self._name, self._visible = name, visible
        self._found = np.zeros((heads, *visible.shape), dtype=np.int16)

    def add(self, heads: list[int], queries: list[int], keys: list[int], unmasked: np.ndarray) -> None:
        """Count the unmasked pairs of one kernel call; raises NotExactError for one that the mask hides."""
        hidden = unmasked & ~self._visible[np.ix_(queries, keys)]
        if hidden.any():
            i, j = np.argwhere(hidden)[0]
            raise NotExactError(f"{self._name}: query {queries[i]} may not see key {keys[j]}, but a kernel call has it")
        self._found[np.ix_(heads, queries, keys)] += unmasked

    def check(self) -> None:
        """Raise NotExactError for the first pair that was not computed exactly once."""
        wrong = np.argwhere(self._found != self._visible)
        if len(wrong):
            head, query, key = wrong[0]
            raise NotExactError(
                f"{self._name}: query {query} and key {key} of head {head} meet {self._found[head, query, key]} times "
                f"instead of once, and {len(wrong) - 1} more pairs are wrong"
            )


class Book:
    """The pairs that must be computed, and those that were."""

    def __init__(self, problem: Problem) -> None:
        self.visible = visible(problem.mask, problem.seq)
        self.group = problem.heads // problem.kv_heads
        self.asked = False
        self.forward = Counts("forward", self.visible, problem.heads)
        self.backward = Counts("backward", self.visible, problem.heads)


def visible(mask: AnyMask, tokens: int) -> np.ndarray:
    """Return the pairs that a mask leaves, [queries keys]."""
    if isinstance(mask, Pieces):
        whole = np.zeros((tokens, tokens), dtype=bool)
        for q, kv, band in mask.all:
            queries, keys = slice(q.start, q.stop), slice(kv.start, kv.stop)
            whole[queries, keys] |= visible(band, tokens)[queries, keys]
        return whole
    positions = np.arange(tokens)
    distance = positions[None] - positions[:, None]
    left, right = (tokens if limit is None else limit for limit in mask)
    return (distance >= -left) & (distance <= right)


def _rank(problem: Problem, book: Book, fabric: LocalFabric) -> None:
    """Run both passes of one rank and check its results."""
    mine = [position for run in problem.held[fabric.rank] for position in run]
    q, k, v = (
        _tokens(name, mine, heads).requires_grad_()
        for name, heads in (("q", problem.heads), ("k", problem.kv_heads), ("v", problem.kv_heads))
    )
    plan = plan_on(problem, fabric, ProvingKernel(book, problem.windows))
    out = attend(q, k, v, plan, documents=problem.packed)
    # a query without a key has no result
    sees = torch.from_numpy(book.visible[mine].any(1))[:, None, None, None]
    _expect("out", out.detach(), _tokens("out", mine, problem.heads) * sees, mine)
    grads = torch.autograd.grad(out, (q, k, v), _tokens("dout", mine, problem.heads))
    for name, found, expected in zip(("dq", "dk", "dv"), grads, _gradients(problem, book, mine), strict=True):
        _expect(name, found, expected, mine)


def _tokens(name: str, positions: list[int], heads: int) -> Tensor:
    """[s 1 h 4] in float64: position, head, kind and 1 in each token's channels; sums of them stay exact."""
    tokens = torch.ones(len(positions), 1, heads, len(CHANNELS), dtype=torch.float64)
    tokens[..., 0] = torch.tensor(positions, dtype=torch.float64)[:, None, None]
    tokens[..., 1] = torch.arange(heads, dtype=torch.float64)
    tokens[..., 2] = KINDS[name]
    return tokens


def _gradients(problem: Problem, book: Book, mine: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's tokens: the sums over the tokens that each one meets."""
    seen = torch.from_numpy(book.visible).double()
    everything = range(problem.seq)
    keys = _tokens("k", [*everything], problem.kv_heads).repeat_interleave(book.group, 2)
    queries = _tokens("q", [*everything], problem.heads).unflatten(2, (problem.kv_heads, book.group)).sum(3)
    # times the token's own place, so that no two tokens have the same gradient even where all see the same
    place = 1.0 + torch.tensor(mine, dtype=torch.float64)[:, None, None, None]
    dq = torch.einsum("st,tbhd->sbhd", seen[mine], keys) * place
    dk = torch.einsum("st,sbgd->tbgd", seen[:, mine], queries) * place
    return dq, dk, 2 * dk


def _expect(name: str, found: Tensor, expected: Tensor, positions: list[int]) -> None:
    """Raise NotExactError for the first token whose result is not its own."""
    wrong = torch.nonzero(~((found - expected).abs() <= 1e-6 * expected.abs().clamp(min=1)).all(-1))
    if len(wrong):
        token, batch, head = wrong[0].tolist()
        raise NotExactError(
            f"{name} of position {positions[token]}, head {head}, is {_show(found[token, batch, head])} "
            f"instead of {_show(expected[token, batch, head])}, and {len(wrong) - 1} more are wrong"
        )


def _show(channels: Tensor) -> str:
    return "(" + ", ".join(f"{name} {value:g}" for name, value in zip(CHANNELS, channels.tolist(), strict=True)) + ")"


class Labels(NamedTuple):
    """The real positions and heads of what a kernel call was given."""

    queries: list[int]
    heads: list[int]
    keys: list[int]
    kv_heads: list[int]


class ProvingKernel:
    """Fulfils the kernel protocol; out is the query's label and lse the log of how many keys it met."""

    name = "proving"

    def __init__(self, book: Book, windows: bool) -> None:
        self._book, self.windows = book, windows

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, window: Window | None = None
    ) -> tuple[Tensor, Tensor]:
        labels, unmasked = self._look(q, k, v, (None, 0) if causal else window)
        self._book.forward.add(labels.heads, labels.queries, labels.keys, unmasked)
        met = torch.from_numpy(np.log(unmasked.sum(1, dtype=float)))
        return _as_out(q), met[:, None, None].expand(q.shape[:3]).contiguous()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels, unmasked = self._look(q, k, v, (None, 0) if causal else window)
        self._look_at_rows(labels, dout, q, out, lse)
        self._book.backward.add(labels.heads, labels.queries, labels.keys, unmasked)
        seen, group = unmasked.astype(float), q.shape[2] // k.shape[2]
        # what each query meets, and what each key meets, s t, t (b g d) -> s (b g d), times its own place
        keys, queries = k.numpy(), q.unflatten(2, (k.shape[2], group)).sum(3).numpy()
        dq = torch.from_numpy((seen @ keys.reshape(len(k), -1)).reshape(len(q), *k.shape[1:]))
        dk = torch.from_numpy((seen.T @ queries.reshape(len(q), -1)).reshape(k.shape)) * (1 + k[:, :, :, :1])
        return dq.repeat_interleave(group, 2) * (1 + q[:, :, :, :1]), dk, 2 * dk

    def _look(self, q: Tensor, k: Tensor, v: Tensor, window: Window | None) -> tuple[Labels, np.ndarray]:
        """Return the labels, and which of the pairs are unmasked, [queries keys]."""
        self._book.asked = True
        (queries, heads), (keys, kv_heads) = _read("q", q), _read("k", k)
        if _read("v", v) != (keys, kv_heads):
            raise NotExactError(f"the values of a kernel call are not those of its keys {keys}")
        served = [head for head in kv_heads for _ in range(len(heads) // len(kv_heads))]
        if [head // self._book.group for head in heads] != served:
            raise NotExactError(f"query heads {heads} are attended with KV heads {kv_heads}")
        return Labels(queries, heads, keys, kv_heads), _unmasked(len(queries), len(keys), window or (None, None))

    def _look_at_rows(self, labels: Labels, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Check what belongs to whole rows: the output's gradient, its product with the output, and the merged lse."""
        if _read("dout", dout) != (labels.queries, labels.heads):
            raise NotExactError(f"the output gradients of a kernel call are not those of its queries {labels.queries}")
        # an algorithm may hand on this product instead of the output
        if _differ((out * dout).sum(-1), (_as_out(q) * dout).sum(-1)):
            raise NotExactError(f"the outputs of a kernel call are not those of its queries {labels.queries}")
        keys = np.log(self._book.visible[labels.queries].sum(1))
        if _differ(lse, torch.from_numpy(keys)[:, None, None]):
            raise NotExactError(f"the lse of queries {labels.queries} is not the one over all of their keys")


def _unmasked(queries: int, keys: int, window: Window) -> np.ndarray:
    """Return the pairs that a window leaves, [queries keys]; the last query has the last key's position."""
    left, right = window
    pairs = np.ones((queries, keys), dtype=bool)
    if right is not None:
        pairs &= np.tri(queries, keys, keys - queries + right, dtype=bool)
    if left is not None:
        pairs &= ~np.tri(queries, keys, keys - queries - left - 1, dtype=bool)
    return pairs


def _as_out(q: Tensor) -> Tensor:
    out = q.clone()
    out[..., 2] = KINDS["out"]
    return out


def _differ(found: Tensor, expected: Tensor) -> bool:
    a, b = found.numpy(), expected.numpy()
    # not > : NaN differs too
    return not (np.abs(a - b) <= 1e-9 * np.maximum(np.abs(b), 1)).all()


def _read(name: str, tokens: Tensor) -> tuple[list[int], list[int]]:
    """Read the positions and heads that [s 1 h 4] tokens carry; raise NotExactError for any other tensor."""
    values = tokens.numpy()
    positions, heads = values[:, 0, 0, 0], values[0, 0, :, 1]
    same = (values[:, 0, :, 0] == positions[:, None]).all() and (values[:, 0, :, 1] == heads).all()
    if not (same and (values[..., 2] == KINDS[name]).all() and (values[..., 3] == 1).all()):
        raise NotExactError(f"a kernel call's {name} is no set of such tokens; the first is {_show(tokens[0, 0, 0])}")
    tokens_at = positions.astype(int).tolist()
    if len({*tokens_at}) < len(tokens_at):
        raise NotExactError(f"a kernel call has a position of {name} twice: {tokens_at}")
    return tokens_at, heads.astype(int).tolist()
