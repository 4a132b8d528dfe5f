"""Head and embedding over all ranks give losses and gradients of whole ones, in the order of every table with them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_cp.comm import SingleFabric
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.execute import lower
from megatron_cp.pipeline.simulate import peaks
from megatron_cp.pipeline.vocabulary_embedding import VocabularyEmbedding
from megatron_cp.pipeline.vocabulary_head import Targets, TensorRanks, VocabularyHead
from tests.pipeline.executed import PATIENCE, WIDTH, Exchange, Message, Peer, execute, inputs_of, layer, weight_of
from tests.pipeline.test_vocabulary import costs_of

ROWS = {2: [7, 4], 3: [4, 0, 7], 4: [3, 3, 3, 2]}
VOCABULARY, TOKENS = 11, 2


def whole_head() -> Tensor:
    # large, so that no exponential may be taken of a logit itself
    return 60 * torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def targets(micro: int) -> Targets:
    generator = torch.Generator().manual_seed(1000 + micro)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return Targets(labels, torch.rand(TOKENS, dtype=torch.float64, generator=generator))


class Both:
    """Several messages, and what becomes of them once they are there."""

    def __init__(self, messages: list[Message], then=lambda: None) -> None:
        self._messages, self._then = messages, then

    def done(self) -> bool:
        return all(message.done() for message in self._messages)

    def wait(self) -> None:
        for message in self._messages:
            message.wait()
        self._then()
        self._then = lambda: None


class Threads:
    """Collectives of messages between ranks that are threads."""

    def __init__(self, exchange: Exchange, rank: int, p: int) -> None:
        self._exchange, self._rank, self._p = exchange, rank, p

    def _messages(self, kind: str, tensor: Tensor, into: list[Tensor], targets: range | list[int], sources) -> list:
        peer, found = Peer(self._exchange, kind, self._rank), []
        for source in sources:
            for target in targets:
                if source != target and self._rank in (source, target):
                    own = source == self._rank
                    found.append(peer.send(tensor, target) if own else peer.receive(into[source], source))
        return found

    def broadcast(self, kind: str, tensor: Tensor, source: int) -> Both:
        return Both(self._messages(kind, tensor, [tensor] * self._p, range(self._p), [source]))

    def gather(self, kind: str, tensor: Tensor) -> tuple[Both, list[Tensor]]:
        parts = [tensor if rank == self._rank else torch.empty_like(tensor) for rank in range(self._p)]
        return Both(self._messages(kind, tensor, parts, range(self._p), range(self._p))), parts

    def gather_on(self, kind: str, tensor: Tensor, target: int) -> tuple[Both, list[Tensor]]:
        parts = [tensor if rank == self._rank else torch.empty_like(tensor) for rank in range(self._p)]
        return Both(self._messages(kind, tensor, parts, [target], range(self._p))), parts

    def sum_on(self, kind: str, tensor: Tensor, target: int) -> Both:
        parts = [tensor.clone() if rank == self._rank else torch.empty_like(tensor) for rank in range(self._p)]
        messages = self._messages(kind, tensor, parts, [target], range(self._p))
        return Both(messages, lambda: tensor.copy_(torch.stack(parts).sum(0)) if self._rank == target else None)


class Pair(SingleFabric):
    """One of two ranks that are threads, which meet for every collective."""

    def __init__(self, met: Barrier, given: list[Tensor], rank: int) -> None:
        super().__init__()
        self.rank, self.size, self._met, self._given = rank, 2, met, given

    def all_gather(self, local: Tensor) -> Tensor:
        self._given[self.rank] = local
        self._met.wait(PATIENCE)
        found = torch.stack(self._given)
        self._met.wait(PATIENCE)
        return found

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        return self.all_gather(whole).sum(0)[self.rank]


class Noted:
    """The last rank's targets, and the losses that it is given."""

    def __init__(self) -> None:
        self.losses: dict[int, Tensor] = {}

    def targets(self, micro: int) -> Targets:
        return targets(micro)

    def found(self, micro: int, losses: Tensor) -> None:
        assert micro not in self.losses
        self.losses[micro] = losses


def whole_embedding() -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def tokens_of(micro: int) -> Tensor:
    return torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2000 + micro))


def dense(stages: int, m: int) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of each microbatch, and gradients of all stages, of the head and of the embedding."""
    weights = [*map(weight_of, range(stages)), whole_head().requires_grad_(), whole_embedding().requires_grad_()]
    total, losses = torch.zeros((), dtype=torch.float64), []
    for micro in range(m):
        made = weights[-1][tokens_of(micro)]
        for weight in weights[:-2]:
            made = layer(made, weight)
        labels, gradients = targets(micro)
        losses.append(cross_entropy(made @ weights[-2].T, labels, reduction="none"))
        total = total + (losses[-1] * gradients).sum()
    return [loss.detach() for loss in losses], list(torch.autograd.grad(total, weights))


def shares(
    rows: list[range],
    barriers: int,
    noted: Noted,
    gradients: list[Tensor],
    tensor: Callable[[int], TensorRanks],
    last: int,
) -> Callable[[Exchange, int], VocabularyHead]:
    """What gives every rank its rows of the head, of which it adds up the gradients."""

    def head(exchange: Exchange, rank: int) -> VocabularyHead:
        own = rows[rank]
        return VocabularyHead(
            whole_head()[own.start : own.stop],
            own.start,
            barriers,
            Threads(exchange, rank, len(rows)),
            (rank, last),
            add=gradients[rank].add_,
            buffer=lambda micro: torch.empty(TOKENS // tensor(rank).parts, WIDTH, dtype=torch.float64),
            losses=noted if rank == last else None,
            tensor=tensor(rank),
        )

    return head


def lookups(
    rows: list[range], gradients: list[Tensor], tensor: Callable[[int], TensorRanks]
) -> Callable[[Exchange, int], VocabularyEmbedding]:
    """What gives every rank its rows of the embedding, of which it adds up the gradients."""

    def embedding(exchange: Exchange, rank: int) -> VocabularyEmbedding:
        own = rows[rank]
        return VocabularyEmbedding(
            whole_embedding()[own.start : own.stop],
            own.start,
            Threads(exchange, rank, len(rows)),
            rank,
            tokens=tokens_of,
            add=lambda row, gradient: gradients[rank].index_add_(0, row, gradient),
            tensor=tensor(rank),
        )

    return embedding


def ranges(lengths: list[int]) -> list[range]:
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def check_losses(noted: Noted, losses: list[Tensor]) -> None:
    assert sorted(noted.losses) == [*range(len(losses))]
    for micro, loss in enumerate(losses):
        torch.testing.assert_close(noted.losses[micro], loss, rtol=1e-12, atol=1e-12)


def check_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("name", "p"),
    [
        *(("1f1b", p) for p in ROWS),
        ("zb-h1", 3),
        ("interleaved", 3),
        ("gis", 2),
        ("zb-v", 4),
        ("1f1b-v", 2),
        ("gpipe", 2),
    ],
)
@pytest.mark.parametrize("barriers", [1, 2])
def test_losses_and_gradients_are_those_of_a_whole_head(barriers: int, name: str, p: int) -> None:
    m, noted = 7, Noted()
    gradients, of_rows = ([torch.zeros(rows, WIDTH, dtype=torch.float64) for rows in ROWS[p]] for _ in range(2))
    costs = costs_of(p, 1.0, name=name)
    schedule = build(name, p, m, costs=costs, barriers=barriers)
    last = schedule.placement.rank_of[-1]
    head = shares(ranges(ROWS[p]), barriers, noted, gradients, lambda rank: TensorRanks(), last)
    embedding = lookups(ranges(ROWS[p]), of_rows, lambda rank: TensorRanks())
    ranks = execute(lower(schedule), head=head, embedding=embedding)
    stages = len(schedule.placement.rank_of)
    losses, expected = dense(stages, m)
    check_losses(noted, losses)
    of_layers = [ranks[rank].gradients[stage] for stage, rank in enumerate(schedule.placement.rank_of)]
    check_gradients([*of_layers, torch.cat(gradients), torch.cat(of_rows)], expected)
    # chunks between their forward and their input gradient, as the simulator counts them
    most = peaks(schedule, replace(costs, held=(0.0,) * stages))
    for rank, layers in enumerate(ranks):
        alive = accumulate({"F": 1, "W": 0}.get(action.kind, -1) for action in layers.ran)
        assert max(alive) == round(most[rank] * schedule.placement.chunks)


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("barriers", [1, 2])
def test_rows_are_cut_over_tensor_parallel_ranks_too(barriers: int, in_parts: bool) -> None:
    """Two pipelines of two ranks, with whole hidden states or with a token each."""
    p, m, noted = 2, 5, [Noted(), Noted()]
    meetings = [(Barrier(2), [torch.empty(0)] * 2) for _ in range(p)]
    # each pipeline has its rows of the vocabulary, one rank of which none
    cuts = ranges([4, 2, 0, 5])
    gradients, of_rows = ([torch.zeros(len(cut), WIDTH, dtype=torch.float64) for cut in cuts] for _ in range(2))
    lowered = lower(build("1f1b", p, m, costs=costs_of(p, 1.0), barriers=barriers))

    def pipeline(number: int) -> list[Tensor]:
        fabrics = [Pair(*meeting, number) for meeting in meetings]
        mine = slice(2 * number, 2 * number + 2)
        each = [TensorRanks(fabric, in_parts) for fabric in fabrics]
        head = shares(cuts[mine], barriers, noted[number], gradients[mine], each.__getitem__, p - 1)
        embedding = lookups(cuts[mine], of_rows[mine], each.__getitem__)
        # as long as the hidden states of this rank
        inputs = inputs_of(m)[:, : TOKENS // each[0].parts]
        ranks = execute(lowered, head=head, inputs=inputs, embedding=embedding)
        return [layers.gradients[stage] for stage, layers in enumerate(ranks)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pipeline, range(2))
    losses, expected = dense(p, m)
    for each in noted:
        check_losses(each, losses)
    if in_parts:
        first = [sum(both) for both in zip(first, second, strict=True)]
    check_gradients([*first, torch.cat(gradients), torch.cat(of_rows)], expected)
