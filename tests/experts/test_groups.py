"""Rows that go to one group of ranks after the other are rows at once, and both ends of a message are in one step."""

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.experts.groups import by_step, check_group, group_plans, group_size, group_steps, in_rank_order
from megatron_cp.experts.pieces import PieceLoop, in_pieces
from tests.experts.test_pieces import Noted, dense, expert, layer_of
from tests.tolerances import EXACT

# ranks, ranks of a group
CASES = [(2, 1), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)]


@pytest.mark.parametrize(("ranks", "size"), CASES)
def test_both_ends_of_a_message_are_in_one_step_and_each_pair_meets_once(ranks, size):
    steps = [group_steps(rank, ranks, size) for rank in range(ranks)]
    for step in range(ranks // size):
        for rank in range(ranks):
            for other in range(ranks):
                assert (other in steps[rank][step].to) == (rank in steps[other][step].source)
    for of_rank in steps:
        assert sorted(rank for step in of_rank for rank in step.to) == list(range(ranks))
        assert of_rank[0].to == of_rank[0].source


def test_a_group_is_a_node_or_a_rank_unless_it_is_asked_for():
    assert [group_size(ranks, 8) for ranks in (2, 8, 12, 16, 64)] == [1, 1, 1, 8, 8]
    check_group(4, 8)
    for size in (0, 3, 16):
        with pytest.raises(ValueError, match=f"must divide the 8 ranks that share a layer's experts, got {size}"):
            check_group(size, 8)


def of_rank(fabric, layer, size):
    me, notes = fabric.rank, []
    exchange = Noted(SingleFabric(), fabric, notes)
    x, probs, weight = (each[me].clone().requires_grad_() for each in layer[:3])
    counts = (layer.probs > 0).sum(1).tolist()
    steps = group_steps(me, fabric.size, size)
    exchange.plans = group_plans(exchange, counts[me], [row[me] for row in counts], steps)
    goes = (probs.t() > 0).nonzero()
    rows, of_rows = x[goes[:, 1]], probs[goes[:, 1], goes[:, 0]]

    def compute(arrived, chances):
        notes.append("experts")
        return expert(arrived, chances, weight)

    loop = PieceLoop(exchange, exchange.plans, [compute] * len(steps), keeps=True, ahead=None)
    parts = [list(by_step(each, counts[me], steps)) for each in (rows, of_rows)]
    home = torch.cat(in_rank_order(in_pieces(loop, *parts, [weight]), steps))
    output, forward = torch.zeros_like(x).index_add(0, goes[:, 1], home), notes.copy()
    notes.clear()
    output.backward(layer.gradient[me])
    return [output.detach(), x.grad, probs.grad, weight.grad], forward, notes, fabric.sent


@pytest.mark.parametrize(("ranks", "size"), CASES)
def test_groups_give_what_all_ranks_at_once_give(ranks, size):
    layer = layer_of(ranks)
    # nothing between two ranks of different groups, and a rank that gets nothing
    layer.probs[0, :, -1] = 0
    layer.probs[:, :, 1] = 0
    expected, steps = dense(layer), range(ranks // size)
    # tokens and probabilities leave together, and gradients of both come home
    forward = [f"there {step}" for step in steps for _ in range(2)]
    backward = [f"there {step}" for step in steps]
    for step in steps:
        forward += ["experts", f"home {step}"]
        backward += [f"home {step}"] * 2
    for me, (found, *orders, sent) in enumerate(in_process(ranks, lambda fabric: of_rank(fabric, layer, size))):
        for mine, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, whole[me], rtol=EXACT, atol=EXACT)
        assert orders == [forward, backward]
        # rows there and their gradients back, rows home and theirs, probabilities and their gradients, of 8 bytes each
        counts = (layer.probs > 0).sum(1)
        leaving, arriving = (int(each.sum() - counts[me, me]) for each in (counts[me], counts[:, me]))
        assert sent == 8 * (leaving + arriving) * (2 * layer.x.shape[-1] + 1)
