"""One rank's share of an LM head that lies on all ranks of a pipeline, and of its loss (arXiv:2411.05288).

With x the output of the last stage and W a rank's rows of the head's weight, of each token

    S      l = x W^T, m = max l, e = exp(l - m), z = sum e, t = the label's l; with one barrier also W[label], and e W
           without the label, so that the two do not cancel out in a low precision
    SUM_S  M = max m over ranks, Z = sum z exp(m - M): loss = M + log Z - sum t; with one barrier also
           dx = g (sum e W exp(m - M) / Z + (exp(t - M) / Z - 1) W[label])
    T      dl = g (e exp(m - M) / Z - 1 at the label), dW = dl^T x; with two barriers also dl W
    SUM_T  dx = sum dl W

where g is the gradient of a token's loss. It is known with the labels, since a loss is a weighted sum over tokens.

Tensor-parallel ranks cut W once more (arXiv:1909.08053): m, z and t are then of all of them, and so is the sum dx.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_cp.comm import Fabric, SingleFabric, Transfer
from megatron_cp.pipeline.action import SHARE, SUM_S, SUM_T


class AllRanks(Protocol):
    """Collectives of all ranks of a pipeline; `kind` names the communicator, with an order of its own."""

    def broadcast(self, kind: str, tensor: Tensor, source: int) -> Transfer: ...

    def gather(self, kind: str, tensor: Tensor) -> tuple[Transfer, list[Tensor]]:
        """Return the tensors of all ranks, once the transfer is over."""
        ...

    def gather_on(self, kind: str, tensor: Tensor, target: int) -> tuple[Transfer, list[Tensor]]:
        """Return the tensors of all ranks on `target`, and none elsewhere."""
        ...

    def sum_on(self, kind: str, tensor: Tensor, target: int) -> Transfer:
        """Add up the tensors of all ranks in that of `target`."""
        ...


class TensorRanks:
    """Tensor-parallel ranks, among which the rows of one rank of the pipeline are cut; they compute together.

    in_parts: True where each has a part of the tokens between layers (sequence parallelism, arXiv:2205.05198)
    """

    def __init__(self, fabric: Fabric | None = None, in_parts: bool = False) -> None:
        self._fabric: Fabric = fabric or SingleFabric()
        self.parts = self._fabric.size if in_parts else 1

    def whole(self, tokens: Tensor) -> Tensor:
        """Return the hidden states (tokens, h) of all ranks' tokens, for those of this one."""
        return self._fabric.all_gather(tokens).flatten(0, 1) if self.parts > 1 else tokens

    def largest(self, values: Tensor) -> Tensor:
        return self._fabric.all_gather(values).amax(0)

    def total(self, values: Tensor) -> Tensor:
        return self._fabric.all_gather(values).sum(0)

    def gradient(self, partial: Tensor) -> Tensor:
        """Add up all ranks' gradients (tokens, h) of the whole hidden states; return what this rank has of the sum."""
        ranks = self._fabric.size
        if ranks == 1:
            return partial
        if self.parts > 1:
            return self._fabric.reduce_scatter(partial.unflatten(0, (ranks, -1)))
        even = pad(partial.flatten(), (0, -partial.numel() % ranks)).view(ranks, -1)
        total = self._fabric.all_gather(self._fabric.reduce_scatter(even))
        return total.flatten()[: partial.numel()].view_as(partial)


class Targets(NamedTuple):
    """Labels of a microbatch, and the gradient of each token's loss; both of one dim, in the order of the output."""

    labels: Tensor
    gradients: Tensor


class Losses(Protocol):
    """The targets and the losses of the last rank."""

    def targets(self, micro: int) -> Targets: ...

    def found(self, micro: int, losses: Tensor) -> None:
        """Take the loss of each token."""
        ...


@dataclass
class _Micro:
    """One microbatch on its way: its input on all ranks, and what S and T made of it here."""

    arriving: list[Transfer]
    given: Tensor
    targets: Targets
    shape: torch.Size
    dtype: torch.dtype
    exponentials: Tensor | None = None
    statistics: Tensor | None = None
    partial: Tensor | None = None
    gathered: tuple[Transfer, list[Tensor]] | None = None
    partials: tuple[Transfer, list[Tensor]] | None = None
    joined: Tensor | None = None
    scales: Tensor | None = None
    of_label: Tensor | None = None
    summing: Transfer | None = None
    left: int = 1


class VocabularyHead:
    """S, T and their sums on one rank.

    weight:   (rows, h), this rank's rows, from row `first` of the vocabulary on; ranks may have different numbers, or 0
    add:      adds to the gradient of `weight`
    buffer:   returns an empty tensor for the output of the last stage for a microbatch, (…, h)
    losses:   on the last rank, none elsewhere
    training: False where a step has no T and no backward, and needs no gradients
    ready:    is called before S reads the weight
    tensor:   ranks that have more rows of this rank of the pipeline
    """

    def __init__(
        self,
        weight: Tensor,
        first: int,
        barriers: int,
        ranks: AllRanks,
        place: tuple[int, int],
        *,
        add: Callable[[Tensor], None],
        buffer: Callable[[int], Tensor],
        losses: Losses | None,
        training: bool = True,
        ready: Callable[[], None] = lambda: None,
        tensor: TensorRanks | None = None,
    ) -> None:
        self._weight, self._first, self._barriers, self._ranks = weight.detach(), first, barriers, ranks
        self._rank, self._last = place
        self._add, self._buffer, self._losses, self._training, self._ready = add, buffer, losses, training, ready
        self._tensor = tensor or TensorRanks()
        self._micros: dict[int, _Micro] = {}
        self._sending: tuple[Transfer, Tensor] | None = None
        self._evaluated: int | None = None

    def share(self, micro: int, output: Tensor | None) -> None:
        """SHARE: bring the output of the last stage to all ranks, with its labels and the gradients of its losses."""
        # a model may hand out its output in another precision than it has computed it in
        given = self._buffer(micro) if output is None else output.detach().to(self._weight.dtype).contiguous()
        tokens = given.shape[:-1].numel() * self._tensor.parts
        if self._losses:
            targets = self._losses.targets(micro)
        else:
            labels = torch.empty(tokens, dtype=torch.int64, device=given.device)
            targets = Targets(labels, torch.empty(tokens, dtype=_precise(given), device=given.device))
        sent = [self._ranks.broadcast(SHARE, tensor, self._last) for tensor in (given, *targets)]
        form = given if output is None else output
        uses = 1 + (self._rank == self._last)
        self._micros[micro] = _Micro(sent, given.flatten(0, -2), targets, form.shape, form.dtype, left=uses)

    def logits(self, micro: int) -> None:
        """S: the rank's logits and their statistics; with one barrier its part of the input's gradient."""
        kept = self._micros[micro]
        for transfer in kept.arriving:
            transfer.wait()
        self._ready()
        kept.given = self._tensor.whole(kept.given)
        weight, precise = self._weight, _precise(kept.given)
        logits = (kept.given @ weight.T).to(precise)
        # a rank without rows has no largest logit
        largest = logits.amax(1) if len(weight) else logits.new_full((len(logits),), -torch.inf)
        largest = self._tensor.largest(largest)
        kept.exponentials = (logits - largest[:, None]).exp()
        row, ours = self._rows(kept.targets.labels)
        own = logits.gather(1, row[:, None])[:, 0] * ours if len(weight) else torch.zeros_like(largest)
        sums = self._tensor.total(torch.stack([kept.exponentials.sum(1), own]))
        kept.statistics = torch.stack([largest, *sums])
        if not self._training:
            kept.exponentials = None
        elif self._barriers == 1:
            of_label = weight[row] * ours[:, None] if len(weight) else torch.zeros_like(kept.given)
            others = kept.exponentials.to(weight.dtype, copy=True)
            if len(weight):
                others[torch.arange(len(row), device=row.device), row] *= ~ours
            kept.partial = torch.stack([others @ weight, of_label])

    def sum_logits(self, micro: int) -> None:
        """SUM_S: bring the statistics to all ranks, and with one barrier the parts of the gradient to the last one."""
        kept = self._micros[micro]
        assert kept.statistics is not None
        kept.gathered = self._ranks.gather(SUM_S, kept.statistics)
        if kept.partial is not None:
            kept.partials = self._ranks.gather_on(SUM_S, kept.partial, self._last)
        if not self._training:
            self._evaluate()
            self._evaluated = micro

    def weights(self, micro: int) -> None:
        """T: the gradient of the rank's rows; with two barriers its part of the input's gradient."""
        kept = self._micros[micro]
        assert kept.exponentials is not None
        gradient = kept.exponentials * self._scales(micro)[self._rank][:, None]
        row, ours = self._rows(kept.targets.labels)
        if len(self._weight):
            gradient[torch.arange(len(row), device=row.device), row] -= ours.to(gradient.dtype)
        gradient = (gradient * kept.targets.gradients[:, None]).to(self._weight.dtype)
        kept.exponentials = None
        self._add(gradient.T @ kept.given)
        if self._barriers == 2:
            kept.partial = (gradient @ self._weight).to(_precise(kept.given))
        else:
            if self._rank == self._last:
                # they are as large as all ranks' hidden states, and the backward may be some time away
                self._join(micro)
            elif kept.partials:
                kept.partials[0].wait()
            self._leave(micro)

    def sum_gradients(self, micro: int) -> None:
        """SUM_T: add up the parts of the input's gradient on the last rank."""
        kept = self._micros[micro]
        assert kept.partial is not None
        kept.summing = self._ranks.sum_on(SUM_T, kept.partial, self._last)
        if self._rank != self._last:
            # the one before has been sent long ago
            if self._sending:
                self._sending[0].wait()
            self._sending = (kept.summing, kept.partial)
            self._leave(micro)

    def finish(self) -> None:
        """Wait for the last sum, at the end of a step."""
        self._evaluate()
        if self._sending:
            self._sending[0].wait()
        self._sending = None
        assert not self._micros, "a microbatch is without its T"

    def gradient(self, micro: int) -> Tensor:
        """Return the gradient of the last stage's output, on the last rank."""
        kept = self._micros[micro]
        if self._barriers == 2:
            assert kept.summing is not None
            assert kept.partial is not None
            kept.summing.wait()
            found = kept.partial
            kept.left = 1
        else:
            self._join(micro)
            assert kept.joined is not None
            found, kept.joined = kept.joined, None
        self._leave(micro)
        return self._tensor.gradient(found.to(kept.dtype)).view(kept.shape)

    def _join(self, micro: int) -> None:
        """Make one gradient of all ranks' parts, on the last rank."""
        kept = self._micros[micro]
        if kept.partials is None:
            return
        transfer, parts = kept.partials
        scales = self._scales(micro)
        transfer.wait()
        assert kept.of_label is not None
        found = sum(
            scale[:, None] * part[0] + (kept.of_label - 1)[:, None] * part[1]
            for scale, part in zip(scales, parts, strict=True)
        )
        kept.joined = (found * kept.targets.gradients[:, None]).to(kept.dtype)
        kept.partials = kept.partial = None

    def _evaluate(self) -> None:
        """Find the losses of the microbatch whose statistics are on their way, where nothing else needs them."""
        if self._evaluated is not None:
            self._scales(self._evaluated)
            del self._micros[self._evaluated]
        self._evaluated = None

    def _scales(self, micro: int) -> Tensor:
        """Return exp(m - M) / Z of each rank and token; the last rank finds the losses on the way."""
        kept = self._micros[micro]
        if kept.scales is None:
            assert kept.gathered is not None
            transfer, parts = kept.gathered
            transfer.wait()
            largest, sums, own = torch.stack(parts).unbind(1)
            whole = largest.amax(0)
            scales = (largest - whole).exp()
            total = (sums * scales).sum(0)
            kept.scales = scales / total
            kept.of_label = (own.sum(0) - whole).exp() / total
            if self._losses:
                self._losses.found(micro, whole + total.log() - own.sum(0))
        return kept.scales

    def _rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of each label here, 0 for those elsewhere, and which are here."""
        row = labels - self._first
        ours = (row >= 0) & (row < len(self._weight))
        return row.where(ours, torch.zeros_like(row)), ours

    def _leave(self, micro: int) -> None:
        kept = self._micros[micro]
        kept.left -= 1
        if not kept.left:
            del self._micros[micro]


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
