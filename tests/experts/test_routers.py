"""Experts take tokens as they come, group by group; GShard's second expert comes by chance."""

import pytest
import torch

from megatron_cp.experts.draws import uniform
from megatron_cp.experts.first_come import first_come, from_groups, in_groups
from megatron_cp.experts.gshard import dispatched
from megatron_cp.experts.pyramid import experts_of_layers
from megatron_cp.experts.residual import expert_share
from megatron_cp.experts.routed import capacity_of
from megatron_cp.experts.turns import Turn, Turns

GROUPS, TOKENS, EXPERTS = 3, 40, 5


def gates(seed, choices):
    """Gates [G, N, E] with a sum of 1 over the choices of a token, and which these are."""
    scores = torch.rand(GROUPS, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    values, at = scores.topk(choices, dim=-1)
    found = torch.zeros_like(scores).scatter(-1, at, values.softmax(-1))
    return found, found > 0


def by_the_paper(gates, draws, capacity):
    """Algorithm 1 of GShard for one group [N, E], token by token; the same tokens that are sent."""
    sent, counts = torch.zeros_like(gates, dtype=torch.bool), [0] * gates.shape[1]
    order = gates.argsort(-1, descending=True)
    for token, (first, *_) in enumerate(order.tolist()):
        sent[token, first] = counts[first] < capacity
        counts[first] += 1
    for token, (_, second, *_) in enumerate(order.tolist()):
        if draws is not None and not 2 * gates[token, second] > draws[token]:
            continue
        sent[token, second] = counts[second] < capacity
        counts[second] += 1
    return sent


@pytest.mark.parametrize("capacity", [1, 7, 16, 80])
@pytest.mark.parametrize("chance", [True, False])
def test_gshard_sends_what_the_papers_loop_sends(capacity, chance):
    found, chosen = gates(1, 2)
    draws = torch.rand(GROUPS, TOKENS, 1, generator=torch.Generator().manual_seed(2)) if chance else None
    sent = dispatched(found, chosen, draws, capacity)
    for group in range(GROUPS):
        assert torch.equal(sent[group], by_the_paper(found[group], draws[group] if chance else None, capacity))
    assert sent.sum(1).max() <= capacity


def test_an_expert_takes_the_first_that_come():
    wanted = torch.tensor([[[True, False], [False, True], [True, True], [True, True]]])
    assert first_come(wanted, 2)[0].tolist() == [[True, False], [False, True], [True, True], [False, False]]
    assert not first_come(wanted, 2, torch.tensor([[[2, 0]]]))[..., 0].any()


@pytest.mark.parametrize(("samples", "size"), [(1, None), (3, None), (1, 4), (3, 4), (2, 7)])
def test_groups_are_consecutive_tokens_of_one_sample(samples, size):
    tokens = 12 * samples
    x = torch.arange(tokens).unsqueeze(1).repeat(1, 2)
    groups = in_groups(x, samples, size)
    assert torch.equal(from_groups(groups, samples, size, tokens), x)
    if size is not None:
        second = groups.view(samples, -1, size, 2)[:, 1, :, 0]
        expected = torch.arange(size, min(2 * size, 12)) * samples
        assert torch.equal(second[:, : len(expected)], expected + torch.arange(samples).unsqueeze(1))
        assert not second[:, len(expected) :].any()


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 8), (1.25, 10), (0.3, 3)])
def test_the_capacity_is_a_share_of_all_choices_rounded_up(factor, expected):
    assert capacity_of(16, 2, 4, factor) == expected


def test_draws_are_uniform_and_each_names_own():
    position, sample = torch.arange(4096).unsqueeze(1), torch.arange(8).unsqueeze(0)
    found = uniform(7, 3, sample, position)
    assert (found.shape, found.dtype) == ((4096, 8), torch.float32)
    assert found.min() >= 0
    assert found.max() < 1
    shares = torch.histc(found, 16, 0, 1) / found.numel()
    assert (shares * 16 - 1).abs().max() < 0.1
    # neighbours in each name have nothing to do with each other
    for other in (
        uniform(8, 3, sample, position),
        uniform(7, 4, sample, position),
        uniform(7, 3, sample + 1, position),
    ):
        assert torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack([found[1:].flatten(), found[:-1].flatten()]))[0, 1].abs() < 0.02
    # wherever a token is computed
    assert torch.equal(uniform(7, 3, torch.tensor([5]), position[64:128]), found[64:128, 5:6])


def test_a_second_expert_comes_as_often_as_twice_its_gate():
    tokens = 20000
    found = torch.tensor([0.9, 0.1]).repeat(1, tokens, 1)
    draws = uniform(1, torch.arange(tokens)).view(1, tokens, 1)
    sent = dispatched(found, found > 0, draws, 2 * tokens)
    assert sent[..., 0].all()
    assert sent[..., 1].float().mean() == pytest.approx(0.2, abs=0.01)


def test_a_microbatch_that_is_computed_again_keeps_its_turn():
    turns, states, first = Turns(), [], []
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            for _ in range(3):
                states.append(torch.get_rng_state())
                first.append(turns.take(4))
        assert first == [Turn(4, 0), Turn(4, 1), Turn(4, 2)]
        # in another order than they came
        for at in (2, 0, 1):
            torch.set_rng_state(states[at])
            assert turns.take(4) == first[at]
        assert [turns.take(4), turns.take(5), turns.take(5)] == [Turn(4, 3), Turn(5, 0), Turn(5, 1)]


def test_an_expert_has_the_share_that_its_mlp_leaves():
    x, gate = torch.randn(6, 2, 3), torch.randn(1, 3)
    # the paper's softmax, of rows whose difference is the gate
    rows = torch.cat([torch.zeros_like(gate), gate])
    assert torch.allclose(expert_share(x, gate), (x @ rows.t()).softmax(-1)[..., :1].view(-1, 1))


@pytest.mark.parametrize(
    ("text", "expected"), [(None, [4] * 6), ("3:8", [4, 4, 8, 8, 8, 8]), ("2:8,6:16", [4, 8, 8, 8, 8, 16])]
)
def test_later_layers_have_more_experts(text, expected):
    assert experts_of_layers(text, 4, 6) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "is LAYER:EXPERTS,…, such as 13:64,23:128, got 8; change it"),
        ("3:", "got 3:; change it"),
        ("3:8,x:16", "got 3:8,x:16; change it"),
        ("3:0", "got 3:0; change it"),
        ("1:8", "needs layers in rising order, from 2 to 6, got 1:8; change them"),
        ("3:8,3:16", "rising order"),
        ("7:8", "from 2 to 6, got 7:8"),
        ("3:6", "needs multiples of --num-experts 4, got 6; change one of the two"),
    ],
)
def test_what_is_no_pyramid_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        experts_of_layers(text, 4, 6)
