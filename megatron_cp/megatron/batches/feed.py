"""The steps of a run as Megatron's data iterator: each with its plan, and this rank's part of every microbatch."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from megatron_cp.batches import ALGORITHMS
from megatron_cp.batches.order import DocumentOrder, steps
from megatron_cp.batches.plan import BatchPlan, RankGroup
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.steps import plan_batch
from megatron_cp.comm import Fabric, Members, SingleFabric, values_of_all
from megatron_cp.context.documents import documents
from megatron_cp.errors import Refused
from megatron_cp.megatron.batches.documents import CorpusDocuments
from megatron_cp.megatron.layers.packed import positions, shared_stream


@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """Settings of every step.

    problem:  of a step, but for its documents
    longest:  tokens to which documents are cut
    layout:   of the documents of a group: stream, document or blocks
    tensor:   tensor-parallel ranks, of which the tokens of a microbatch are a multiple
    split:    tensor-parallel ranks that share the tokens between layers
    device:   of the microbatches
    """

    algorithm: str
    problem: BatchProblem
    longest: int
    layout: str
    tensor: int = 1
    split: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class DocumentStep:
    """One step: the plan of its documents, or why there is none.

    documents: by their number in the corpus; the plan numbers them from 0
    """

    feed: "DocumentFeed"
    documents: tuple[int, ...]
    plan: BatchPlan | None
    refusal: str = ""

    @cached_property
    def text(self) -> str:
        """Describe the step so that two ranks have the same text if and only if they run the same step."""
        assert self.plan
        numbers = blake2b(repr(self.documents).encode(), digest_size=8).hexdigest()
        return (
            f"{len(self.documents)} documents ({numbers}) of {self.plan.problem.tokens} tokens by plan "
            f"{self.plan.algorithm} {self.plan.digest[:16]} in layout {self.feed.settings.layout}"
        )

    @cached_property
    def tokens_of(self) -> tuple[int, ...]:
        """This rank's tokens of each slot between layers."""
        return tuple(self._tokens(group) // group.degree // self.feed.settings.split for group in self._groups)

    def microbatches(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's part of each slot: tokens, labels, loss mask and positions [1 t], and its stream."""
        self.feed.meet()
        for group in self._groups:
            yield self._part(group)

    @cached_property
    def _groups(self) -> tuple[RankGroup, ...]:
        assert self.plan
        return tuple(self.plan.group_of(slot, self.feed.fabric.rank) for slot in range(len(self.plan.slots)))

    def _tokens(self, group: RankGroup) -> int:
        """Return the tokens of a group with pads: 2 for each rank of it, times the tensor-parallel ranks, at least."""
        unit = 2 * group.degree * self.feed.settings.tensor
        own = sum(int(self.feed.corpus.lengths[self.documents[at]]) for at in group.documents)
        return max(unit, -(-own // unit) * unit)

    def _part(self, group: RankGroup) -> dict[str, Any]:
        feed = self.feed
        texts = [feed.corpus.tokens(self.documents[at]) for at in group.documents]
        lengths = [len(text) - 1 for text in texts]
        pads = self._tokens(group) - sum(lengths)
        # t of the whole group; pads are one more document, without loss
        columns: dict[str, list[Any]] = {
            "tokens": [text[:-1] for text in texts] + [np.zeros(pads, np.int64)],
            "labels": [text[1:] for text in texts] + [np.zeros(pads, np.int64)],
            "loss_mask": [np.ones(sum(lengths), np.float32), np.zeros(pads, np.float32)],
            "position_ids": [*map(np.arange, lengths), np.zeros(pads, np.int64)],
        }
        made = documents([0, *accumulate([*lengths, pads])])
        layout, fabric = made.planned(feed.settings.layout, group.degree), feed.group(group.ranks)
        mine = positions(layout[fabric.rank])
        # t -> 1 t
        part: dict[str, Any] = {
            name: torch.from_numpy(np.concatenate(column))[mine][None].to(feed.settings.device, non_blocking=True)
            for name, column in columns.items()
        }
        return {**part, "attention_mask": None, "stream": shared_stream(made, layout, fabric, part["position_ids"][0])}


class DocumentFeed:
    """The steps of a run from a place of the order on, one after the other without an end.

    corpus: of all documents
    order:  in which they are read
    start:  documents read so far
    batch:  documents read in each step
    fabric: the data-parallel ranks of this pipeline stage
    """

    def __init__(
        self,
        corpus: CorpusDocuments,
        order: DocumentOrder,
        start: int,
        batch: int,
        settings: FeedSettings,
        fabric: Fabric,
    ) -> None:
        self.corpus, self.settings, self.fabric = corpus, settings, fabric
        self._algorithm = ALGORITHMS.get(settings.algorithm)
        # a limit that no number of ranks changes, so that a resumed run keeps the same documents waiting
        holds = settings.longest if self._algorithm.delays else None
        self._steps = steps(order, corpus.lengths, start, batch, holds)
        self._met = False

    def __iter__(self) -> Iterator[DocumentStep]:
        return self

    def __next__(self) -> DocumentStep:
        found = tuple(next(self._steps))
        lengths = tuple(self.corpus.lengths[list(found)].tolist())
        try:
            return DocumentStep(
                self, found, plan_batch(self._algorithm, replace(self.settings.problem, lengths=lengths))
            )
        except (Refused, AssertionError) as error:
            # the ranks compare refusals, and what is wrong with a plan, too
            return DocumentStep(self, found, None, str(error))

    def meet(self) -> None:
        """Connect all ranks of the fabric once, before some of them send messages to each other alone."""
        if not self._met:
            values_of_all(self.fabric, self.settings.device, [0])
            self._met = True

    def group(self, ranks: range) -> Fabric:
        """Return these ranks of the fabric, which include this one."""
        if len(ranks) == 1:
            return SingleFabric()
        return Members(self.fabric, ranks)
