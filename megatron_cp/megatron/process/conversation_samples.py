"""Packed samples of conversations with a loss on the answers, for `--sft`.

A line of the file is one sample: its conversations are documents that see only themselves, cut at the sequence length
or filled up with a document of pads. Documents have any length, for the ranks of a context-parallel group cut the
sample as one stream.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from torch import Tensor

from megatron_cp.corpus.conversations import ConversationFile, Encode, Encoded, split_at_system
from megatron_cp.errors import Refused


@dataclass
class ConversationsConfig(GPTDatasetConfig):
    """Megatron's config of a dataset, with the function that turns a conversation into tokens."""

    encode: Encode | None = None


class Conversations(MegatronDataset):
    """Packed samples of conversations, in the order of the file and again from its start."""

    dataset: ConversationFile
    config: ConversationsConfig

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        return ConversationFile(dataset_path)

    def __len__(self) -> int:
        return len(self.indices) if self.num_samples is None else self.num_samples

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        if not len(self.indices):
            raise Refused(
                f"--split {self.config.split} leaves the {self.index_split.name} dataset no conversation of "
                f"{self.dataset_path}; give --split 100,0,0 --eval-iters 0, or more lines"
            )
        encode = self.config.encode
        assert encode is not None
        messages = self.dataset[int(self.indices[idx % len(self.indices)])]
        return packed_sample(map(encode, split_at_system(messages)), self.config.sequence_length, self._pad())

    def _pad(self) -> int:
        """Return a token for places without a loss; a tokenizer may have none for them."""
        pad = getattr(self.config.tokenizer, "pad", None)
        return pad if isinstance(pad, int) and pad >= 0 else int(self.config.tokenizer.eod)


def packed_sample(conversations: Iterable[Encoded], length: int, pad: int) -> dict[str, Tensor]:
    """Return tokens, labels, loss mask, positions and document ends of one sample of `length` tokens.

    A document's last token has no label. `cu_seqlens` is filled up with `length`, so that samples can be stacked.
    """
    tokens, labels, mask, positions, ends = list[int](), list[int](), list[bool](), list[int](), [0]
    for each in conversations:
        if not each.tokens:
            continue
        tokens += each.tokens
        labels += [*each.tokens[1:], pad]
        mask += [*each.answers[1:], False]
        positions += range(len(each.tokens))
        ends.append(min(len(tokens), length))
        if len(tokens) >= length:
            break
    if (left := length - len(tokens)) > 0:
        tokens += [pad] * left
        labels += [pad] * left
        mask += [False] * left
        positions += range(left)
        ends.append(length)
    filled = torch.full((length + 1,), length, dtype=torch.int32)
    filled[: len(ends)] = torch.tensor(ends, dtype=torch.int32)
    return {
        "tokens": torch.tensor(tokens[:length]),
        "labels": torch.tensor(labels[:length]),
        "loss_mask": torch.tensor(mask[:length], dtype=torch.float32),
        "position_ids": torch.tensor(positions[:length]),
        "cu_seqlens": filled,
        "max_seqlen": filled.diff().max(),
    }
