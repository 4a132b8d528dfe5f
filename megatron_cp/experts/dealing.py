"""Which slot a token goes to: its expert's place on its own rank, or else one of all that the expert has, in turns."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.experts.slots import SlotPlan


class Deal(NamedTuple):
    """Slots that one rank's tokens go to. Those of a rank follow those of the ranks before, its own experts first.

    slots:  in all
    places: for each expert, its slots, [E, most], repeated where an expert has fewer
    ways:   of places for each expert, [E]
    first:  the place for the first token of each expert, [E], so that ranks do not all begin at the owner
    """

    slots: int
    places: Tensor
    ways: Tensor
    first: Tensor


def slot_of(plan: SlotPlan, expert: int, rank: int) -> int:
    """Return the slot of an expert on a rank that has it."""
    own = plan.slots.experts // plan.slots.ranks
    at = expert % own if plan.slots.home(expert) == rank else own + plan.hosted[rank].index(expert)
    return rank * (own + plan.slots.spare) + at


def deal_of(plan: SlotPlan, rank: int, device: torch.device) -> Deal:
    """Return where the tokens of a rank go: it keeps those of experts that it has, and deals out the others."""
    hosts = [plan.hosts(expert) for expert in range(plan.slots.experts)]
    near = [[rank] if rank in each else each for each in hosts]
    places = [[slot_of(plan, expert, host) for host in each] for expert, each in enumerate(near)]
    most = max(map(len, places))
    ways = torch.tensor([len(each) for each in places], device=device)
    return Deal(
        slots=plan.slots.experts + plan.slots.ranks * plan.slots.spare,
        places=torch.tensor([[each[at % len(each)] for at in range(most)] for each in places], device=device),
        ways=ways,
        first=(rank + torch.arange(len(ways), device=device)) % ways,
    )


def dealt(deal: Deal, sent: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of each slot, True where one is sent there, and their probabilities, both [T, slots].

    sent, probs: of each expert, [T, E]; gradients go back to the probabilities
    """
    # the tokens of an expert take its places in turns
    order = sent.long().cumsum(0) - 1 + deal.first
    at = order.remainder(deal.ways)
    slots = deal.places.gather(1, at.t()).t()
    shape = (len(sent), deal.slots)
    return sent.new_zeros(shape).scatter(1, slots, sent), probs.new_zeros(shape).scatter(1, slots, probs)
