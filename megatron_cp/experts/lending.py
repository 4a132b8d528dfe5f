"""Weights of experts travel to the ranks that host copies of them, and gradients home, where they are added up.

One exchange each way for all copies of a layer (FasterMoE, PPoPP 2022, section 4.1, sends weights and gradients of
shadows in every step), beside what is computed: weights may leave while an earlier layer computes, and their gradients
are waited for where the weights left in forward, which backward comes to after the layer's own experts. A copy is a
row: the parameters of its expert one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.comm import Fabric, Handle, Scattering, values_of_all, word_of
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


class CopiesOnTheWay(NamedTuple):
    """Copies that will have arrived once the transfer is over."""

    rows: Tensor
    transfer: Handle

    def landed(self) -> Tensor:
        """Return the copies; on a GPU what is computed with them waits for them, and the host does not."""
        self.transfer.wait()
        return self.rows


class Lending:
    """Copies of one layer's experts on their way.

    fabric:      of the ranks that share the experts; over a communicator of its own copies overtake rows of experts
    there, home: copies of weights that this rank has sent, and of gradients
    bytes:       that it has sent
    """

    def __init__(self, fabric: Scattering) -> None:
        self.fabric, self.there, self.home, self.bytes = fabric, 0, 0, 0

    def weights(self, loan: LentCopies, rows: Tensor) -> CopiesOnTheWay:
        """Send the copies for each rank in order; return those for this rank, in order of their experts."""
        self.there += len(rows)
        return self._sent(rows, loan.sent, loan.got)

    def gradients(self, loan: LentCopies, rows: Tensor) -> CopiesOnTheWay:
        """Send the gradients of the copies here; return those of copies of this rank's experts, in order of rank."""
        self.home += len(rows)
        return self._sent(rows, loan.got, loan.sent)

    def _sent(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> CopiesOnTheWay:
        before = self.fabric.sent
        arriving = CopiesOnTheWay(*self.fabric.start_all_to_all(rows, sends, recvs))
        self.bytes += self.fabric.sent - before
        return arriving


class Borrowed:
    """Copies of a layer on this rank and those that it lent, for one microbatch; autograd does not see it.

    parameters: of each lent expert of this rank, in order of `loan.lent`
    keep:       takes the gradients that came home; None where autograd does
    """

    def __init__(
        self, lending: Lending, loan: LentCopies, parameters: Sequence[Sequence[Tensor]], keep: Keep | None = None
    ) -> None:
        self.loan, self.parameters, self.keep = loan, parameters, keep
        self._lending = lending
        self._coming: CopiesOnTheWay | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Parameters of all lent experts, one after the other."""
        return [weight for weights in self.parameters for weight in weights]

    def send(self, gradient: Tensor) -> None:
        """Start the way home of the copies' gradients."""
        self._coming = self._lending.gradients(self.loan, gradient.contiguous())

    def came(self) -> list[list[Tensor]]:
        """Return the gradients of lent experts, the sum over their copies in order of rank."""
        assert self._coming is not None, "gradients come home after they were sent"
        rows, self._coming = self._coming.landed().unbind(), None
        of_experts: dict[int, Tensor] = {}
        for expert, row in zip((each for experts in self.loan.lends for each in experts), rows, strict=True):
            of_experts[expert] = of_experts[expert] + row if expert in of_experts else row
        pairs = zip(self.loan.lent, self.parameters, strict=True)
        return [in_shapes(of_experts[expert], [weight.shape for weight in weights]) for expert, weights in pairs]


class _Lent(torch.autograd.Function):
    """The mark of a loan; in backward the gradients that came home are waited for.

    Autograd takes the node that was made last of those that are ready: this one waits after all that forward has
    computed since. It has a leaf of its own, so that every rank waits.
    """

    @staticmethod
    def forward(ctx: Any, borrowed: Borrowed, leaf: Tensor, *_: Tensor) -> Tensor:
        ctx.borrowed = borrowed
        return leaf.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        borrowed = ctx.borrowed
        found = [gradient for gradients in borrowed.came() for gradient in gradients]
        if borrowed.keep is None:
            return None, None, *found
        borrowed.keep(borrowed.weights, found)
        return None, None


class _Borrowed(torch.autograd.Function):
    """Rows, probabilities and copies as they are; in backward the gradients of the copies leave first.

    Every rank has rows, be they none at all, so that every rank takes part.
    """

    @staticmethod
    def forward(
        ctx: Any, borrowed: Borrowed, rows: Tensor, probs: Tensor, copies: Tensor, mark: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.borrowed, ctx.mark = borrowed, torch.zeros_like(mark)
        return rows.view_as(rows), probs.view_as(probs), copies.view_as(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor, copies: Tensor) -> tuple[Tensor | None, ...]:
        ctx.borrowed.send(copies)
        return None, rows, probs, None, ctx.mark


def lent_here(borrowed: Borrowed, device: torch.device) -> Tensor:
    """Return a mark of the place in forward where backward is to wait for the gradients that come home."""
    leaf = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    result: Tensor = _Lent.apply(borrowed, leaf, *([] if borrowed.keep else borrowed.weights))
    return result


def borrowed_here(
    borrowed: Borrowed, mark: Tensor, rows: Tensor, probs: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and probabilities that the experts get, and copies [C, P] whose gradients go home in backward.

    mark: of `lent_here`, made with autograd wherever this is called with it
    """
    if not torch.is_grad_enabled():
        return rows, probs, copies
    assert mark.requires_grad, "the mark of a loan takes part in autograd"
    if not rows.requires_grad:
        # a rank that only lends would have no backward
        rows = rows.detach().requires_grad_()
    result: tuple[Tensor, Tensor, Tensor] = _Borrowed.apply(borrowed, rows, probs, copies, mark)
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
