"""Tokens in pieces: while the experts compute one of them, the next is on its way and the one before goes home.

The pipelining of Tutel (arXiv:2206.03382, section 3.3) and the smart schedule of FasterMoE (PPoPP 2022, section 4.2)
with pieces of tokens. One loop decides what is sent when, forward and backward alike: nodes of autograd alone would
wait for each message in backward.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.experts.exchange import HopPlan, TwoHopExchange
from megatron_cp.experts.priority import ExchangePriority

Tensors = tuple[Tensor, ...]


class RowsOnTheWay(NamedTuple):
    """Rows on their way; `over` is None where they have arrived."""

    rows: Tensors
    over: torch.cuda.Event | None = None

    def landed(self) -> Tensors:
        """Return the rows; what is computed with them waits for them, and the host does not."""
        if self.over is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self.over)
            for each in self.rows:
                each.record_stream(current)
        return self.rows


def started(send: Callable[[Tensor], Tensor], rows: Tensors) -> RowsOnTheWay:
    """Send rows beside what is computed: on a GPU on one stream, in the order of these calls; elsewhere at once."""
    if not rows[0].is_cuda:
        return RowsOnTheWay(tuple(send(each) for each in rows))
    stream = _stream(rows[0].device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in rows:
            each.record_stream(stream)
        return RowsOnTheWay(tuple(send(each) for each in rows), stream.record_event())


@lru_cache(8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def in_turn(
    pieces: int,
    there: Callable[[int], RowsOnTheWay],
    compute: Callable[[int, Tensors], Tensors],
    home: Callable[[int, Tensors], RowsOnTheWay],
    ahead: int | None = 1,
) -> list[Tensors]:
    """Return what comes home of each piece.

    Of the pieces so many leave before one is computed, which goes home before the one after them leaves: every rank
    sends in the same order, and ahead + 1 pieces are on a rank at a time. With None all leave first.
    """
    coming: deque[RowsOnTheWay] = deque()
    returning: list[RowsOnTheWay] = []
    for piece in range(pieces):
        first = piece + len(coming)
        coming += map(there, range(first, pieces if ahead is None else min(pieces, piece + 1 + ahead)))
        returning.append(home(piece, compute(piece, coming.popleft().landed())))
    return [flight.landed() for flight in returning]


class PieceLoop(NamedTuple):
    """One forward pass over pieces and its backward, in an object so that autograd does not see it.

    plans:    of the exchange of each piece
    experts:  for each piece, what this rank makes of the rows that arrive and their probabilities: rows to send home
    keeps:    True if there will be a backward
    leaves:   what they compute with in the place of the last of the weights, which are not leaves of autograd
    ahead:    pieces that leave before one is computed, beside it; None for all
    priority: over reductions of gradients; None where they start when they are ready
    """

    exchange: TwoHopExchange
    plans: Sequence[HopPlan]
    experts: Sequence[Callable[[Tensor, Tensor], Tensor]]
    keeps: bool
    leaves: Tensors = ()
    ahead: int | None = 1
    priority: ExchangePriority | None = None

    def there(self, piece: int, rows: Tensors) -> RowsOnTheWay:
        """Start the way to the experts."""
        return started(partial(self.exchange.there, plan=self.plans[piece]), rows)

    def home(self, piece: int, rows: Tensors) -> RowsOnTheWay:
        """Start the way back."""
        return started(partial(self.exchange.home, plan=self.plans[piece]), rows)


class _Pieces(torch.autograd.Function):
    """Rows of all pieces, their probabilities and the experts' weights to rows of all pieces.

    Keeps a graph of autograd for the experts of each piece, with what they keep. A weight gets the sum of its gradients
    over the pieces, once.
    """

    @staticmethod
    def forward(ctx: Any, loop: PieceLoop, *tensors: Tensor) -> Tensors:
        pieces = len(loop.plans)
        rows, probs, weights = tensors[:pieces], tensors[pieces : 2 * pieces], tensors[2 * pieces :]
        ctx.weights = (*weights[: len(weights) - len(loop.leaves)], *loop.leaves)
        ctx.loop, ctx.graphs = loop, []

        def compute(piece: int, arrived: Tensors) -> Tensors:
            inputs = tuple(each.detach().requires_grad_(loop.keeps) for each in arrived)
            with torch.set_grad_enabled(loop.keeps):
                output = loop.experts[piece](*inputs)
            if loop.keeps:
                ctx.graphs.append((inputs, output))
            return (output.detach(),)

        back = in_turn(
            pieces, lambda piece: loop.there(piece, (rows[piece], probs[piece])), compute, loop.home, loop.ahead
        )
        if loop.keeps and loop.priority:
            loop.priority.expect()
        return tuple(output for (output,) in back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        loop, weights = ctx.loop, ctx.weights
        of_weights: list[Tensor | None] = [None] * len(weights)

        def compute(_: int, arrived: Tensors) -> Tensors:
            # in the order of forward: what a first microbatch overwrites, the pieces after it add to
            inputs, output = ctx.graphs.pop(0)
            found = torch.autograd.grad(output, (*inputs, *weights), arrived, allow_unused=True)
            for at, gradient in enumerate(found[len(inputs) :]):
                of_weights[at] = _sum(of_weights[at], gradient)
            pairs = zip(inputs, found, strict=False)
            return tuple(torch.zeros_like(each) if gradient is None else gradient for each, gradient in pairs)

        back = in_turn(
            len(loop.plans),
            lambda piece: loop.there(piece, (gradients[piece].contiguous(),)),
            compute,
            loop.home,
            loop.ahead,
        )
        if loop.priority:
            loop.priority.over()
        rows, probs = zip(*back, strict=True)
        return None, *rows, *probs, *of_weights


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more


def in_pieces(loop: PieceLoop, rows: Sequence[Tensor], probs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensors:
    """Return what the experts of all ranks have made of this rank's rows, piece by piece, with autograd.

    rows, probs: of each piece, [T h] and [T], in order of the rank that they are for
    weights:     of this rank's experts, whose gradients autograd takes
    """
    result: Tensors = _Pieces.apply(loop, *rows, *probs, *weights)
    return result
