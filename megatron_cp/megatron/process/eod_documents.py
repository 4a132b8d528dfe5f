"""Samples of texts whose documents end at EOD tokens, for `--reset-attention-mask`.

Megatron hides the tokens up to each EOD from those after it by a mask tensor of S x S for every sample. The ends of the
documents say the same, and pass through context and pipeline parallelism as those of other packed documents do.
"""

from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from torch import Tensor


class TextsCutAtEod(GPTDataset):
    """Megatron's samples of a corpus, with the ends of their documents."""

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        return _with_ends(super().__getitem__(idx), self.config.tokenizer.eod)


class MockTextsCutAtEod(MockGPTDataset):
    """Megatron's samples of mock data, with the ends of their documents."""

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        return _with_ends(super().__getitem__(idx), self.config.tokenizer.eod)


def _with_ends(sample: dict[str, Tensor], eod: Any) -> dict[str, Tensor]:
    ends = ends_at(sample["tokens"], int(eod))
    return {**sample, "cu_seqlens": ends, "max_seqlen": ends.diff().max()}


def ends_at(tokens: Tensor, eod: int) -> Tensor:
    """Return where the documents of S tokens start and end, EOD being the last of each, filled up with S to S + 1."""
    length = len(tokens)
    after = (tokens == eod).nonzero().flatten() + 1
    ends = torch.full((length + 1,), length, dtype=torch.int32)
    ends[0] = 0
    # samples can be stacked
    ends[1 : len(after) + 1] = after
    return ends
