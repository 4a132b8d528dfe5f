"""Samples of packed documents that bring the layout by which the ranks of a context-parallel group cut them.

The data loader reads samples ahead, with --num-workers in processes beside the training process, and plans the layout
of each there: the training process of a rank only reads it. Ranks that read the same sample plan the same layout.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_cp.context.document_layouts import as_numbers
from megatron_cp.context.documents import documents
from megatron_cp.megatron.layers.batches import PLANNED, DocumentPlanner


class PlannedSamples(Dataset[dict[str, Tensor]]):
    """A dataset of Megatron's whose samples bring their layouts, in an entry of int32 [n]: see `PLANNED`."""

    def __init__(self, samples: Any, planner: DocumentPlanner) -> None:
        self._samples, self._planner = samples, planner
        # by which Megatron takes the batch sizes of evaluations; a blend has another name for it
        self.split = samples.split if hasattr(samples, "split") else samples.index_split

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self._samples[index]
        layout = self._planner.layout(documents(_without_padding(sample["cu_seqlens"])))
        return {**sample, PLANNED: torch.tensor(as_numbers(layout), dtype=torch.int32)}


def with_layouts(built: list[Any], planner: DocumentPlanner) -> list[Any]:
    """Return the datasets that Megatron built, each as PlannedSamples; None stays, and so do lists of datasets."""
    found: list[Any] = []
    for each in built:
        if isinstance(each, list):
            found.append(with_layouts(each, planner))
        else:
            found.append(None if each is None else PlannedSamples(each, planner))
    return found


def _without_padding(ends: Tensor) -> Tensor:
    """Return the ends of documents up to the first at the sample's length, with which they are filled up."""
    return ends[: int((ends < ends[-1]).sum()) + 1]
