"""Quantised reductions and gathers over nodes: errors, bytes by the formulas, and equal bits on all ranks."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.replicas import QUANTISATIONS
from megatron_cp.replicas.parts import ParameterSpan, parts_of, places_of
from megatron_cp.replicas.two_hops import (
    Sent,
    all_gather,
    collect_left,
    hops_of,
    nothing_left,
    own_left,
    reduce_scatter,
    sent_to_gather,
    sent_to_reduce,
)
from tests.replicas.test_blocks import heavy

# matrices, a norm among them, elements between parameters, and an embedding over several parts
SPANS = [
    ParameterSpan(0, 700),
    ParameterSpan(704, 720, exact=True),
    ParameterSpan(720, 1000),
    ParameterSpan(1001, 1800, exact=True),
]
ELEMENTS = 1920
NODES = [(1, 1), (2, 2), (4, 2), (4, 1), (6, 3), (6, 4)]
INT8, INT4 = QUANTISATIONS.get("int8"), QUANTISATIONS.get("int4")


def drawn(rank: int, elements: int = ELEMENTS) -> torch.Tensor:
    return heavy(1, elements, rank)[0]


@pytest.mark.parametrize("quantisation", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize(("ranks", "per_node"), NODES)
def test_a_reduction_adds_up_and_sends_what_the_formula_says(quantisation, ranks: int, per_node: int) -> None:
    parts = parts_of(SPANS, ELEMENTS, ranks)

    def reduce(fabric):
        hops = hops_of(fabric, fabric.nodes)
        whole = drawn(fabric.rank)
        reduce_scatter(whole, parts, hops, quantisation)
        return whole, Sent(hops.inside.sent, hops.between.sent)

    found = in_process(ranks, reduce, per_node)
    total = sum(drawn(rank) for rank in range(ranks))
    most = sum(drawn(rank).abs().max() for rank in range(ranks)) / (2 ** (quantisation.bits - 1) - 1)
    places = places_of([rank // per_node for rank in range(ranks)])
    for rank, (whole, sent) in enumerate(found):
        for each in parts[rank].plain:
            torch.testing.assert_close(whole[each], total[each], rtol=1e-5, atol=1e-4)
        for each in parts[rank].coded:
            assert (whole[each] - total[each]).abs().max() <= 2 * most
        # what no parameter has, and what others own, stays as it was
        mine = {at for each in (*parts[rank].plain, *parts[rank].coded) for at in range(each.start, each.stop)}
        others = [at for at in range(ELEMENTS) if at not in mine]
        assert whole[others].equal(drawn(rank)[others])
        assert sent == sent_to_reduce(parts, places, quantisation, torch.float32, rank)


def test_whole_blocks_take_the_bytes_of_the_paper() -> None:
    # two nodes of two ranks: 4 parts of 4 blocks
    parts, places = parts_of([ParameterSpan(0, 4096)], 4096, 4), places_of([0, 0, 1, 1])
    message = 256 + 4
    assert sent_to_reduce(parts, places, INT8, torch.float32, 0) == Sent(2 * 4 * message, 4 * message)
    assert sent_to_gather(parts, places, INT8, torch.bfloat16, 0) == Sent(2 * 4 * message, 4 * message)
    # 16 blocks of 64 in a part
    assert sent_to_reduce(parts, places, INT4, torch.float32, 0) == Sent(2 * 16 * 36, 16 * 36)


@pytest.mark.parametrize(("ranks", "per_node"), NODES)
def test_a_gather_leaves_equal_bits_on_all_ranks(ranks: int, per_node: int) -> None:
    parts = parts_of(SPANS, ELEMENTS, ranks)
    size = ELEMENTS // ranks

    def gather(fabric):
        hops = hops_of(fabric, fabric.nodes)
        whole = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
        own = slice(fabric.rank * size, (fabric.rank + 1) * size)
        whole[own] = drawn(0).bfloat16()[own]
        all_gather(whole, parts, hops, INT8)
        return whole, Sent(hops.inside.sent, hops.between.sent)

    found = in_process(ranks, gather, per_node)
    expected = drawn(0).bfloat16()
    places = places_of([rank // per_node for rank in range(ranks)])
    for rank, (whole, sent) in enumerate(found):
        assert sent == sent_to_gather(parts, places, INT8, torch.bfloat16, rank)
        for start, stop, exact in SPANS:
            assert whole[start:stop].equal(found[0][0][start:stop])
            error = (whole[start:stop].float() - expected[start:stop].float()).abs().max()
            assert error <= (0 if exact else drawn(0).abs().max() / 127)


# 16 ranks, 8 on a node: the relative error of the sum of gradients with heavy tails
ERRORS = {("int8", 1): 0.011, ("int8", 8): 0.016, ("int4", 1): 0.15, ("int4", 8): 0.22}


@pytest.mark.parametrize(("name", "per_node"), ERRORS)
def test_the_errors_of_one_hop_and_of_two(name: str, per_node: int) -> None:
    found = relative_error(name, per_node)
    assert found == pytest.approx(ERRORS[name, per_node], rel=0.5)


def relative_error(name: str, per_node: int, ranks: int = 16, elements: int = 16 * 1024) -> float:
    parts = parts_of([ParameterSpan(0, elements)], elements, ranks)

    def gradient(rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        normal, square = torch.randn(elements, generator=generator), torch.randn(4, elements, generator=generator)
        # Student's t of 4 degrees of freedom
        return normal / square.square().mean(0).sqrt()

    def reduce(fabric):
        hops = hops_of(fabric, fabric.nodes)
        whole = gradient(fabric.rank)
        reduce_scatter(whole, parts, hops, QUANTISATIONS.get(name))
        return whole.view(ranks, -1)[fabric.rank]

    found = torch.cat(in_process(ranks, reduce, per_node))
    total = sum(gradient(rank) for rank in range(ranks))
    return float((found - total).norm() / total.norm())


@pytest.mark.parametrize("per_node", [1, 2])
def test_what_int4_leaves_over_comes_in_later_steps(per_node: int) -> None:
    ranks, steps = 4, 16
    parts = parts_of(SPANS, ELEMENTS, ranks)

    def train(fabric):
        hops = hops_of(fabric, fabric.nodes)
        totals = []
        for left in (None, nothing_left(parts, hops, INT4, torch.device("cpu"))):
            total = torch.zeros(ELEMENTS)
            for _ in range(steps):
                whole = drawn(fabric.rank)
                reduce_scatter(whole, parts, hops, INT4, left)
                total += whole
            totals.append(total)
        return totals

    found = in_process(ranks, train, per_node)
    expected = steps * sum(drawn(rank) for rank in range(ranks))
    forgotten, kept = (
        sum(
            float((one[way][each] - expected[each]).square().sum())
            for one, part in zip(found, parts, strict=True)
            for each in part.coded
        )
        ** 0.5
        for way in (0, 1)
    )
    # the error of a sum over steps does not grow with them
    assert kept < forgotten / 4


@pytest.mark.parametrize(("ranks", "per_node"), NODES[1:])
def test_what_is_left_over_is_handed_to_the_rank_of_its_part(ranks: int, per_node: int) -> None:
    parts = parts_of(SPANS, ELEMENTS, ranks)

    def collect(fabric):
        hops = hops_of(fabric, fabric.nodes)
        left = nothing_left(parts, hops, INT4, torch.device("cpu"))
        whole = drawn(fabric.rank)
        reduce_scatter(whole, parts, hops, INT4, left)
        collect_left(left, ELEMENTS, parts, hops, INT4)
        kept = [each.clone() for each in left]
        views = own_left(left, parts, hops)
        # nothing is left elsewhere, so that a second time changes nothing
        assert sum(int(each.count_nonzero()) for each in left) == sum(int(view.count_nonzero()) for view in views)
        collect_left(left, ELEMENTS, parts, hops, INT4)
        assert all(each.equal(before) for each, before in zip(left, kept, strict=True))
        return whole, views

    found = in_process(ranks, collect, per_node)
    total = sum(drawn(rank) for rank in range(ranks))
    # half a scale of each rank in either hop, rounded to bf16 there and in the end
    most = sum(drawn(rank).abs().max() for rank in range(ranks)) / 7
    for rank, (whole, views) in enumerate(found):
        for each, view in zip(parts[rank].coded, views, strict=True):
            assert (view.float() + whole[each] - total[each]).abs().max() <= most / 200


def test_a_hop_of_one_rank_keeps_nothing() -> None:
    parts = parts_of([ParameterSpan(0, 256)], 256, 2)

    def sizes(fabric):
        return [len(each) for each in nothing_left(parts, hops_of(fabric, fabric.nodes), INT4, torch.device("cpu"))]

    # rows of 64: of both parts between two ranks of a node, or the same between two nodes
    assert in_process(2, sizes, 2) == [[4, 0]] * 2
    assert in_process(2, sizes, 1) == [[0, 4]] * 2
