"""Tokens are dealt out to slots as plans count them, and weights of copies travel as many bytes as the formula says."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.experts import PLACEMENTS
from megatron_cp.experts.dealing import deal_of, dealt, slot_of
from megatron_cp.experts.lending import (
    Borrowed,
    Lending,
    as_rows,
    borrowed_here,
    check_plans,
    in_shapes,
    lent_here,
    loan_of,
)
from megatron_cp.experts.placing import ChangingPlan
from megatron_cp.experts.slots import SlotCosts, SlotPlan, Slots, lent_bytes, load_of

# a shadow on all other ranks, an expert on one, and a rank that hosts nothing
PLAN = SlotPlan(Slots(8, 4, 2), ((), (0, 7), (0,), (0,)))
SHAPES = [torch.Size((3, 2)), torch.Size((2,))]


def test_a_token_goes_to_its_experts_slot_on_its_own_rank_or_to_any_in_turns():
    draw = torch.Generator().manual_seed(0)
    sent = [torch.rand(24, 8, generator=draw) < 0.4 for _ in range(4)]
    # so that shares are whole: an expert of two ranks has an even number of tokens
    for of_rank in sent:
        of_rank[0, 7] ^= bool(of_rank[:, 7].sum() % 2)
    probs = [torch.rand(24, 8, generator=draw).requires_grad_() for _ in range(4)]
    load = load_of(PLAN, [of_rank.sum(0).tolist() for of_rank in sent])
    rows = [0] * 4
    for rank in range(4):
        wide, of_wide = dealt(deal_of(PLAN, rank, torch.device("cpu")), sent[rank], probs[rank])
        assert wide.shape == of_wide.shape == (24, 16)
        for expert in range(8):
            slots = [slot_of(PLAN, expert, host) for host in PLAN.hosts(expert)]
            assert torch.equal(wide[:, slots].sum(1), sent[rank][:, expert].long())
            assert torch.equal(of_wide[:, slots].sum(1), probs[rank][:, expert])
        for host in range(4):
            rows[host] += int(wide[:, 4 * host : 4 * host + 4].sum())
        of_wide.sum().backward()
        assert torch.equal(probs[rank].grad, torch.ones_like(probs[rank]))
    assert tuple(rows) == load.rows


def parameters_of(expert):
    draw = torch.Generator().manual_seed(expert)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def lent(fabric, microbatches, keeps):
    """Gradients of this rank's experts, what it has sent, and where gradients were kept."""
    rank, lending, kept = fabric.rank, Lending(fabric), []
    own = {expert: parameters_of(expert) for expert in range(2 * rank, 2 * rank + 2)}
    loan = loan_of(PLAN, rank)
    given = [own[expert] for experts in loan.lends for expert in experts]
    copies = lending.weights(loan, as_rows(given, own[2 * rank])).landed()
    parameters = [own[expert] for expert in loan.lent]
    keep = (lambda weights, found: kept.append((weights, found))) if keeps else None
    for _ in range(microbatches):
        # a rank without rows takes part too
        rows, probs = torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        borrowed = Borrowed(lending, loan, parameters, keep)
        mark = lent_here(borrowed, copies.device)
        rows, probs, here = borrowed_here(borrowed, mark, rows, probs, copies)
        for expert, row in zip(PLAN.hosted[rank], here, strict=True):
            assert all(map(torch.equal, in_shapes(row, SHAPES), parameters_of(expert)))
        used = sum((rank + 1) * (row**2).sum() for row in here)
        (used + rows.sum() + probs.sum()).backward()
    return {expert: [weight.grad for weight in weights] for expert, weights in own.items()}, lending, kept


@pytest.mark.parametrize("keeps", [False, True], ids=["by autograd", "kept elsewhere"])
def test_gradients_of_copies_come_home_and_as_many_bytes_travel_as_the_formula_says(keeps):
    found = in_process(4, lambda fabric: lent(fabric, 2, keeps))
    of_expert = 8 * sum(shape.numel() for shape in SHAPES)
    assert sum(lending.bytes for _, lending, _ in found) == lent_bytes(PLAN, of_expert, 2)
    assert [(lending.there, lending.home) for _, lending, _ in found] == [(3, 0), (0, 4), (0, 2), (1, 2)]
    # of 2 microbatches and a square, times the number of the ranks that have it
    factors = {0: 4 * (2 + 3 + 4), 7: 4 * 2}
    for rank, (gradients, _, kept) in enumerate(found):
        for expert, of_weights in gradients.items():
            for weight, gradient in zip(parameters_of(expert), of_weights, strict=True):
                if keeps or expert not in factors:
                    assert gradient is None
                else:
                    assert torch.allclose(gradient, factors[expert] * weight, rtol=1e-12)
        assert len(kept) == 2 * keeps
        assert all(len(weights) == len(grads) == (2 if rank in (0, 3) else 0) for weights, grads in kept)


def test_plans_that_differ_are_named_on_every_rank_in_one_line():
    plans = [PLAN, PLAN, PLAN.without_copy(7, 1), PLAN]

    def check(fabric, plans):
        check_plans(fabric, torch.device("cpu"), plans[fabric.rank], "the experts of layer 3")

    with pytest.raises(RuntimeError, match="ranks 0 and 2 of those that share the experts of layer 3 have") as refused:
        in_process(4, lambda fabric: check(fabric, plans))
    assert "\n" not in str(refused.value)
    in_process(4, lambda fabric: check(fabric, [PLAN] * 4))


@pytest.mark.parametrize("name", PLACEMENTS.names)
def test_a_layer_gets_a_plan_every_interval_from_what_it_saw(name):
    placing = ChangingPlan(PLACEMENTS.get(name), Slots(4, 2, 2), interval=3)
    assert [placing.due(steps) for steps in range(5)] == [False, False, False, True, True]
    before = placing.plan
    counts = [[80.0, 40.0, 8.0, 4.0]] * 2
    assert placing.change(counts, SlotCosts(1.0, 0.1, 1.0)) is placing.plan
    assert load_of(placing.plan, counts).uneven < load_of(before, counts).uneven
