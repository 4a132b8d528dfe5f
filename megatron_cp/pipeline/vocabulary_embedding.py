"""One rank's share of an embedding that lies on all ranks of a pipeline (arXiv:2411.05288).

SUM_E    each rank looks up the tokens of its rows, and the sum over ranks is what the first stage gets
SHARE_E  the gradient of that goes to all ranks, and each adds it to the rows of its tokens
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_cp.comm import Transfer
from megatron_cp.pipeline.action import SHARE_E, SUM_E
from megatron_cp.pipeline.vocabulary_head import AllRanks, TensorRanks

FIRST = 0


class VocabularyEmbedding:
    """Lookups, their gradients and the sums of both on one rank.

    weight: (rows, h), this rank's rows, from row `first` of the vocabulary on; ranks may have different numbers, or 0
    tokens: returns those of a microbatch, of one dim, in the order of hidden states
    add:    adds gradients (tokens, h) to that of `weight`, in these rows
    ready:  is called before the weight is read
    tensor: ranks that have more rows of this rank of the pipeline
    """

    def __init__(
        self,
        weight: Tensor,
        first: int,
        ranks: AllRanks,
        rank: int,
        *,
        tokens: Callable[[int], Tensor],
        add: Callable[[Tensor, Tensor], None],
        ready: Callable[[], None] = lambda: None,
        tensor: TensorRanks | None = None,
    ) -> None:
        self._weight, self._first, self._ranks, self._rank = weight.detach(), first, ranks, rank
        self._tokens, self._add, self._ready = tokens, add, ready
        self._tensor = tensor or TensorRanks()
        self._arriving: dict[int, tuple[Transfer, Tensor]] = {}
        self._sending: tuple[Transfer, Tensor] | None = None
        self._returning: tuple[Transfer, Tensor, int] | None = None

    def look_up(self, micro: int) -> None:
        """SUM_E: look up this rank's tokens of a microbatch, and add up those of all ranks on the first one."""
        self._ready()
        row, ours = self._rows(micro)
        # one rank alone has something other than zeros, so that the sum is exact
        found = self._weight[row] * ours[:, None] if len(self._weight) else self._zeros(len(row))
        transfer = self._ranks.sum_on(SUM_E, found, FIRST)
        if self._rank == FIRST:
            self._arriving[micro] = (transfer, found)
            return
        if self._sending:
            self._sending[0].wait()
        self._sending = (transfer, found)

    def embedded(self, micro: int) -> Tensor:
        """Return the embedding (tokens, h) of a microbatch on the first rank; of its own tokens where they are cut."""
        transfer, found = self._arriving.pop(micro)
        transfer.wait()
        return self._tensor.gradient(found)

    def share(self, micro: int, gradient: Tensor | None) -> None:
        """SHARE_E: bring the gradient of a microbatch's embedding to all ranks; None on all but the first."""
        self.settle()
        if gradient is None:
            gradient = self._zeros(len(self._tokens(micro)) // self._tensor.parts)
        gradient = gradient.contiguous()
        self._returning = (self._ranks.broadcast(SHARE_E, gradient, FIRST), gradient, micro)

    def settle(self) -> None:
        """Add the gradient that has been asked for last."""
        if self._returning is None:
            return
        transfer, gradient, micro = self._returning
        self._returning = None
        transfer.wait()
        gradient = self._tensor.whole(gradient)
        row, ours = self._rows(micro)
        if len(self._weight):
            self._add(row, gradient * ours[:, None])

    def finish(self) -> None:
        """Wait for what is left, at the end of a step."""
        self.settle()
        if self._sending:
            self._sending[0].wait()
        self._sending = None
        assert not self._arriving, "an embedding was not used"

    def _rows(self, micro: int) -> tuple[Tensor, Tensor]:
        row = self._tokens(micro) - self._first
        ours = (row >= 0) & (row < len(self._weight))
        return row.where(ours, torch.zeros_like(row)), ours

    def _zeros(self, tokens: int) -> Tensor:
        return self._weight.new_zeros(tokens, self._weight.shape[1])
