"""Tokens in pieces are tokens at once, forward and backward, and every rank sends in the same order."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.experts.exchange import TwoHopExchange
from megatron_cp.experts.pieces import PieceLoop, RowsOnTheWay, in_pieces, in_turn
from tests.tolerances import EXACT

HIDDEN, TOKENS = 4, 12
# ranks, ranks on a node, pieces
CASES = [(2, 1, 1), (2, 1, 4), (4, 1, 2), (4, 2, 3), (6, 3, 4)]


ORDERS = {
    1: "there 0, there 1, experts 0, home 0, there 2, experts 1, home 1, experts 2, home 2",
    None: "there 0, there 1, there 2, experts 0, home 0, experts 1, home 1, experts 2, home 2",
}


@pytest.mark.parametrize("ahead", ORDERS)
def test_pieces_leave_before_one_is_computed(ahead):
    done = []

    def noted(what):
        def run(piece, *_):
            done.append((what, piece))
            return (torch.zeros(1),) if what == "experts" else RowsOnTheWay((torch.zeros(1),))

        return run

    assert len(in_turn(3, noted("there"), noted("experts"), noted("home"), ahead)) == 3
    assert ", ".join(f"{what} {piece}" for what, piece in done) == ORDERS[ahead]


class Noted(TwoHopExchange):
    """An exchange that notes the pieces that it sends."""

    def __init__(self, inside, between, notes):
        super().__init__(inside, between)
        self.notes, self.plans = notes, []

    def there(self, rows, plan):
        self.notes.append(f"there {self._piece(plan)}")
        return super().there(rows, plan)

    def home(self, rows, plan):
        self.notes.append(f"home {self._piece(plan)}")
        return super().home(rows, plan)

    def _piece(self, plan):
        # pieces may have equal plans
        return next(at for at, each in enumerate(self.plans) if each is plan)


class Layer(NamedTuple):
    """Tokens of all ranks with the probabilities of their experts, one on each rank; 0 where a token does not go."""

    x: Tensor
    probs: Tensor
    weights: Tensor
    gradient: Tensor


def layer_of(ranks):
    draw = torch.Generator().manual_seed(ranks)
    x, gradient = (torch.randn(ranks, TOKENS, HIDDEN, generator=draw).double() for _ in range(2))
    weights = torch.randn(ranks, HIDDEN, HIDDEN, generator=draw).double()
    probs = torch.rand(ranks, TOKENS, ranks, generator=draw).double()
    # two of three experts, some tokens for none, and nothing for the last rank in the first half
    probs *= torch.rand(probs.shape, generator=draw) < 2 / 3
    probs[:, : TOKENS // 2, -1] = 0
    return Layer(x, probs, weights, gradient)


def expert(x, probs, weight):
    return torch.tanh(x @ weight) * probs[:, None]


def dense(layer):
    """Output and gradients of all ranks, with every token through its experts one by one."""
    x, probs, weights = (each.clone().requires_grad_() for each in layer[:3])
    output = sum(
        expert(x.flatten(0, 1), probs.flatten(0, 1)[:, at], weights[at]).view_as(x) for at in range(len(weights))
    )
    output.backward(layer.gradient)
    return output.detach(), x.grad, torch.where(layer.probs > 0, probs.grad, 0.0), weights.grad


def of_rank(fabric, layer, per_node, pieces):
    me, notes = fabric.rank, []
    first = me // per_node * per_node
    groups = (range(first, first + per_node), range(me % per_node, fabric.size, per_node))
    inside, between = (SingleFabric() if len(group) == 1 else fabric.subset(list(group)) for group in groups)
    exchange = Noted(inside, between, notes)
    x, probs, weight = (each[me].clone().requires_grad_() for each in layer[:3])
    rows, of_rows, tokens = [], [], []
    for piece, chosen in zip(x.tensor_split(pieces), probs.tensor_split(pieces), strict=True):
        goes = (chosen.t() > 0).nonzero()
        tokens.append(goes[:, 1])
        rows.append(piece[goes[:, 1]])
        of_rows.append(chosen[goes[:, 1], goes[:, 0]])
    for cut in zip(*(each.tensor_split(pieces) for each in layer.probs), strict=True):
        counts = [(each > 0).sum(0).tolist() for each in cut]
        exchange.plans.append(exchange.plan(counts[first : first + per_node], [row[me] for row in counts]))

    def compute(arrived, chances):
        notes.append("experts")
        return expert(arrived, chances, weight)

    loop = PieceLoop(exchange, exchange.plans, [compute] * pieces, keeps=True)
    home = in_pieces(loop, rows, of_rows, [weight])
    parts = [
        torch.zeros_like(piece).index_add(0, chosen, arrived)
        for piece, chosen, arrived in zip(x.tensor_split(pieces), tokens, home, strict=True)
    ]
    output, forward = torch.cat(parts), notes.copy()
    notes.clear()
    output.backward(layer.gradient[me])
    return [output.detach(), x.grad, probs.grad, weight.grad], forward, notes


@pytest.mark.parametrize(
    ("ranks", "per_node", "pieces"),
    CASES,
    ids=[f"{ranks} by {per_node}, {pieces}" for ranks, per_node, pieces in CASES],
)
def test_pieces_give_what_all_tokens_at_once_give(ranks, per_node, pieces):
    layer = layer_of(ranks)
    expected = dense(layer)
    # tokens and probabilities leave together
    there = [[f"there {piece}"] * 2 for piece in range(pieces)]
    order = [*there[0]]
    back = ["there 0"]
    for piece in range(pieces):
        following = there[piece + 1] if piece + 1 < pieces else []
        order += [*following, "experts", f"home {piece}"]
        back += [*following[:1], f"home {piece}", f"home {piece}"]
    for me, (found, forward, backward) in enumerate(
        in_process(ranks, lambda fabric: of_rank(fabric, layer, per_node, pieces), per_node)
    ):
        for mine, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, whole[me], rtol=EXACT, atol=EXACT)
        assert (forward, backward) == (order, back)


def test_without_a_backward_nothing_is_kept():
    def run(fabric):
        exchange = TwoHopExchange(SingleFabric(), fabric)
        kept = []

        def compute(rows, probs):
            kept.append(rows.requires_grad or torch.is_grad_enabled())
            return rows * probs[:, None]

        plans = [exchange.plan([[1, 1]], [1, 1])] * 2
        with torch.no_grad():
            home = in_pieces(
                PieceLoop(exchange, plans, [compute] * 2, torch.is_grad_enabled()),
                [torch.ones(2, HIDDEN)] * 2,
                [torch.ones(2)] * 2,
                [torch.ones(1, requires_grad=True)],
            )
        return kept, [rows.requires_grad for rows in home]

    assert in_process(2, run) == [([False] * 2, [False] * 2)] * 2
