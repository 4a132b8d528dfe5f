"""Groups of KV heads: each gathered beside the computation of the one before."""

import pytest

from megatron_cp.context.algorithms.all_gather import GROUPS, groups
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from tests.context.algorithms.test_ulysses import beside_attention, heads


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
