"""Groups of KV heads, each gathered beside the computation of the one before: by messages, or by a collective."""

import pytest
import torch

from megatron_cp.comm import GroupFabric, LocalFabric, in_process
from megatron_cp.context.algorithms import all_gather
from megatron_cp.context.algorithms.all_gather import GROUPS, by_collective, groups
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from megatron_cp.context.trace.events import Post, Problem
from megatron_cp.context.trace.proof import prove
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.rings import neighbours, rings
from tests.cases import slow_unless
from tests.context.algorithms.test_ulysses import beside_attention, heads
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded
from tests.ranks import run_ranks


@pytest.mark.parametrize(("count", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (20, 5), (7, 7)])
def test_every_head_is_in_one_group_with_those_it_serves(count, kv_heads):
    found = groups(count, kv_heads)
    assert len(found) == min(GROUPS, kv_heads)
    assert [head for group in found for head in heads(group.kv)] == [*range(kv_heads)]
    assert [head for group in found for head in heads(group.q)] == [*range(count)]
    assert all({head // (count // kv_heads) for head in heads(group.q)} == {*heads(group.kv)} for group in found)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_all_groups_but_the_first_arrive_during_attention(kv_heads):
    recorded, count = record(Problem("all-gather", 4, 512, 8, kv_heads)), min(GROUPS, kv_heads)
    assert beside_attention(recorded.forward) == [count - 1] * 4
    # of as many exchanges of gradients, too, all but the last are over after another group's attention
    assert beside_attention(recorded.backward) == [2 * (count - 1)] * 4


def test_two_groups_of_what_is_seen_are_alive():
    ranks, tokens, kv_heads = 16, 4096, 8
    recorded = record(Problem("all-gather", ranks, tokens, 8, kv_heads, head_dim=64, causal=False))
    gathered = 2 * tokens * kv_heads * 64 * 2
    # beside them only what is as large as local tensors, a 32nd of the gathered ones each
    assert gathered * 2 / GROUPS < max(recorded.forward.peak) < gathered * (2 / GROUPS + 6 / 32)


def nodes(ranks, per_node):
    return tuple(rank // per_node for rank in range(ranks))


@pytest.mark.parametrize(
    ("name", "mask", "per_node", "expected"),
    [
        # on one node, and with one rank on each: where every rank sees all
        ("zigzag", FULL, 8, True),
        ("zigzag", CAUSAL, 8, False),
        ("zigzag", FULL, 1, True),
        ("zigzag", CAUSAL, 1, False),
        # 3/4 of the tokens, twice or four times over a node's links
        ("zigzag", CAUSAL, 2, True),
        ("zigzag", CAUSAL, 4, True),
        # half of them: 4 ranks on a node see more than all of the other nodes' tokens, 1 sees less
        ("contiguous", CAUSAL, 4, True),
        ("contiguous", CAUSAL, 1, False),
        # a window leaves what is outside it on its node
        ("contiguous", Mask(8, 0), 4, False),
        ("zigzag", Mask(8, 0), 8, False),
    ],
)
def test_a_collective_is_used_where_it_brings_no_more_tokens_over_the_links(name, mask, per_node, expected):
    assert by_collective(layout(name, 128, 8), mask, nodes(8, per_node)) == expected


def between(ranks, per_node, causal):
    """Bytes that each rank sends to other nodes, in both passes."""
    recorded = record(Problem("all-gather", ranks, 64 * ranks, 1, 1, 8, causal=causal, ranks_per_node=per_node))
    sent = (run.sent_between(per_node) for run in (recorded.forward, recorded.backward))
    return [a + b for a, b in zip(*sent, strict=True)]


@pytest.mark.parametrize(("ranks", "per_node"), slow_unless([(16, 4)], [(16, 4), (32, 8)]))
@pytest.mark.parametrize(("causal", "seen"), [(False, 1), (True, 0.75)])
def test_over_four_nodes_a_collective_sends_less_between_them(ranks, per_node, causal, seen, monkeypatch):
    collective = between(ranks, per_node, causal)
    monkeypatch.setattr(all_gather, "by_collective", lambda *_: False)
    messages = between(ranks, per_node, causal)
    # every port carries as much
    assert max(collective) - min(collective) <= 8
    # 6.2 and 4.6 times as much on 32 ranks
    fewer = seen * (ranks - per_node) * per_node / (ranks - 1)
    assert sum(messages) / sum(collective) == pytest.approx(fewer, rel=0.02)


def test_rings_leave_every_node_through_each_of_its_ranks():
    found = rings(nodes(12, 4))
    assert len(found) == 4
    assert all(sorted(ring) == [*range(12)] for ring in found)
    for rank in range(12):
        ahead, behind = neighbours(nodes(12, 4), rank)
        assert sum(peer // 4 != rank // 4 for peer in ahead) == 1
        assert [neighbours(nodes(12, 4), peer)[1][i] for i, peer in enumerate(ahead)] == [rank] * 4
        assert [neighbours(nodes(12, 4), peer)[0][i] for i, peer in enumerate(behind)] == [rank] * 4
    assert rings((0, 0, 0)) == ((0, 1, 2),)
    assert rings((0, 0, 1)) == ((0, 1, 2),)


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (6, 2), (6, 3), (8, 4), (5, 3)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_every_pair_is_computed_once_on_several_nodes(ranks, per_node, causal):
    asked = Problem("all-gather", ranks, 12 * ranks, 4, 2, causal=causal, ranks_per_node=per_node)
    assert prove(asked).covered
    run = record(asked).forward
    expected = by_collective(layout("zigzag", 12 * ranks, ranks), asked.mask, nodes(ranks, per_node))
    posts = [event for event, _ in run.steps[0] if isinstance(event, Post)]
    assert all(bool(post.collective) == expected for post in posts)
    if expected:
        # two groups of one KV head each
        assert [post.collective for post in posts] == ["gather"] * 2
        assert run.sent == [2 * (ranks - 1) * 12 * 2 * 64 * 2] * ranks


@pytest.mark.parametrize(
    ("ranks", "per_node", "causal"),
    slow_unless(
        [(4, 2, True), (3, 3, False)],
        [(4, 2, True), (3, 3, False), (6, 3, True), (8, 4, True), (8, 8, False), (5, 5, False)],
    ),
)
def test_a_collective_equals_dense(ranks, per_node, causal, monkeypatch):
    counted = {"start_all_gather": 0, "start_reduce_scatter": 0}

    def spied(name, original, *arguments):
        counted[name] += 1
        return original(*arguments)

    for name in counted:
        original = getattr(LocalFabric, name)
        monkeypatch.setattr(LocalFabric, name, lambda *a, name=name, original=original: spied(name, original, *a))
    task = problem(12 * ranks, 8, 2, causal=causal)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, "all-gather"), per_node), task)
    # two groups, gathered in both passes
    assert counted == {"start_all_gather": 4 * ranks, "start_reduce_scatter": 2 * ranks}


def over_gloo(tasks):
    """Results of 4 ranks on 2 nodes, as torchrun says it, and how often a collective was started."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fabric, started, original = GroupFabric(dist.group.WORLD), [], GroupFabric.start_reduce_scatter
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setattr(GroupFabric, "start_reduce_scatter", lambda *a: started.append(a[0].nodes) or original(*a))
        found = [sharded(fabric, task, "all-gather") for task in tasks]
    dist.barrier()
    return found, started


@pytest.mark.smoke
def test_a_collective_of_processes_equals_dense():
    tasks = [problem(48, 8, 2, causal=causal) for causal in (True, False)]
    per_rank = run_ranks(4, over_gloo, tasks)
    for number, task in enumerate(tasks):
        assert_equals_dense([found[number] for found, _ in per_rank], task)
    assert [started for _, started in per_rank] == [[(0, 0, 1, 1)] * 4] * 4


def test_ranks_that_see_other_nodes_are_refused_before_anything_is_sent():
    def body(fabric):
        fabric._per_node = 2 if fabric.rank else 4
        x = torch.zeros(12, 1, 4, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"must attend by one plan, got .*nodes=1 with 4.*nodes=2 with 2"):
            attend(x, x, x, plan("all-gather", cp=fabric))
        return fabric.sent

    assert in_process(4, body) == [0] * 4
