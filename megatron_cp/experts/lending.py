"""Weights of experts travel to the ranks that host copies of them, and gradients home, where they are added up.

One exchange each way for all copies of a layer (FasterMoE, PPoPP 2022, section 4.1, sends weights and gradients of
shadows in every step). A copy is a row: the parameters of its expert one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.comm import Fabric, values_of_all, word_of
from megatron_cp.errors import CannotRun
from megatron_cp.experts.slots import SlotPlan

Keep = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""Adds gradients to the gradients of parameters."""


class LentCopies(NamedTuple):
    """Experts that one rank lends to, or borrows from, each rank; those it has itself from none.

    lends, borrows: for each rank, the experts in the order of their numbers
    """

    lends: tuple[tuple[int, ...], ...]
    borrows: tuple[tuple[int, ...], ...]

    @property
    def lent(self) -> tuple[int, ...]:
        """Experts of this rank that some other has a copy of, each once."""
        return tuple(sorted({expert for experts in self.lends for expert in experts}))

    @property
    def sent(self) -> list[int]:
        """Copies for each rank."""
        return [len(experts) for experts in self.lends]

    @property
    def got(self) -> list[int]:
        """Copies from each rank."""
        return [len(experts) for experts in self.borrows]


def loan_of(plan: SlotPlan, rank: int) -> LentCopies:
    """Return what a rank lends and borrows."""
    home, ranks = plan.slots.home, range(plan.slots.ranks)
    return LentCopies(
        lends=tuple(tuple(expert for expert in hosted if home(expert) == rank) for hosted in plan.hosted),
        borrows=tuple(tuple(expert for expert in plan.hosted[rank] if home(expert) == lender) for lender in ranks),
    )


class Lending:
    """Copies of one layer's experts on their way.

    there, home: copies of weights that this rank has sent, and of gradients
    bytes:       that it has sent
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.there, self.home, self.bytes = fabric, 0, 0, 0

    def weights(self, loan: LentCopies, rows: Tensor) -> Tensor:
        """Return the copies for this rank, in order of their experts, from those for each rank in order."""
        self.there += len(rows)
        return self._sent(rows, loan.sent, loan.got)

    def gradients(self, loan: LentCopies, rows: Tensor) -> Tensor:
        """Return the gradients of copies of this rank's experts, in order of rank, from those of the copies here."""
        self.home += len(rows)
        return self._sent(rows, loan.got, loan.sent)

    def _sent(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        before = self.fabric.sent
        arrived = self.fabric.all_to_all(rows, sends, recvs)
        self.bytes += self.fabric.sent - before
        return arrived


class Borrowed(NamedTuple):
    """Copies of a layer on this rank and those that it lent, in an object so that autograd does not see it.

    parameters: of each lent expert of this rank, in order of `loan.lent`
    keep:       takes the gradients that came home; None where autograd does
    """

    lending: Lending
    loan: LentCopies
    parameters: Sequence[Sequence[Tensor]]
    keep: Keep | None = None

    def home(self, gradient: Tensor) -> list[list[Tensor]]:
        """Return the gradients of lent experts, the sum over their copies in order of rank."""
        rows = self.lending.gradients(self.loan, gradient.contiguous()).unbind()
        of_experts: dict[int, Tensor] = {}
        for expert, row in zip((each for experts in self.loan.lends for each in experts), rows, strict=True):
            of_experts[expert] = of_experts[expert] + row if expert in of_experts else row
        pairs = zip(self.loan.lent, self.parameters, strict=True)
        return [in_shapes(of_experts[expert], [weight.shape for weight in weights]) for expert, weights in pairs]


class _Borrowed(torch.autograd.Function):
    """Rows, probabilities and copies as they are; in backward the gradients of the copies go home first.

    Every rank has rows, be they none at all, so that every rank takes part.
    """

    @staticmethod
    def forward(
        ctx: Any, borrowed: Borrowed, rows: Tensor, probs: Tensor, copies: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.borrowed, ctx.given = borrowed, len(weights)
        return rows.view_as(rows), probs.view_as(probs), copies.view_as(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor, copies: Tensor) -> tuple[Tensor | None, ...]:
        borrowed = ctx.borrowed
        found = [gradient for gradients in borrowed.home(copies) for gradient in gradients]
        if borrowed.keep is None:
            return None, rows, probs, None, *found
        borrowed.keep([weight for weights in borrowed.parameters for weight in weights], found)
        return None, rows, probs, None


def borrowed_here(borrowed: Borrowed, rows: Tensor, probs: Tensor, copies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and probabilities that the experts get, and copies [C, P] whose gradients go home in backward."""
    if not torch.is_grad_enabled():
        return rows, probs, copies
    if not rows.requires_grad:
        # a rank that only lends would have no backward
        rows = rows.detach().requires_grad_()
    weights = [] if borrowed.keep else [weight for weights in borrowed.parameters for weight in weights]
    result: tuple[Tensor, Tensor, Tensor] = _Borrowed.apply(borrowed, rows, probs, copies, *weights)
    return result


def check_plans(fabric: Fabric, device: torch.device, plan: SlotPlan, where: str) -> None:
    """Raise RuntimeError on every rank where ranks have come to different plans; sends a number of 8 bytes to each."""
    words = [word for (word,) in values_of_all(fabric, device, [word_of(plan.digest)])]
    if other := next((rank for rank, word in enumerate(words) if word != words[0]), None):
        raise CannotRun(
            f"--moe-placement: ranks 0 and {other} of those that share {where} have come to different plans of "
            f"copies, this rank's is {plan.digest}; pass --moe-placement none"
        )


def as_rows(experts: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> Tensor:
    """Return a row [P] for each expert, of its parameters; `like` are an expert's, for where there is none."""
    with torch.no_grad():
        rows = [torch.cat([weight.reshape(-1) for weight in weights]) for weights in experts]
        return torch.stack(rows) if rows else like[0].new_empty(0, sum(weight.numel() for weight in like))


def in_shapes(row: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the parameters that are in a row, views of it."""
    parts = row.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
