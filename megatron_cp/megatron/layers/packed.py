"""Documents of a packed batch on their way from Megatron's batch to the attention of every layer.

Megatron cuts the tokens of `--dataloader-inter-document-masking` for the ranks of a context-parallel group as one
stream, but rotates them, and rolls those of multi-token prediction, as if each document had been cut. A hook on the
model hands on one document of the whole stream, so that all of it follows the cut, with the real ends beside it for
attention. Rotary positions count from the start of the stream then, which changes no score but in rounding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import nn

from megatron_cp.context.documents import Documents, documents
from megatron_cp.errors import Refused

_MARK = "_megatron_cp_documents"


@dataclass
class PackedStream(PackedSeqParams):
    """Parameters of one document as long as the stream, with the documents that the stream is made of."""

    documents: Documents | None = None


def hand_on_documents[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Give every layer of the model chunks the documents of its microbatch; a post-wrap hook for Megatron."""
    for model in _unwrapped(models):
        if not hasattr(model, _MARK):
            setattr(model, _MARK, model.register_forward_pre_hook(_with_stream, with_kwargs=True))
    return models


def stream_of(packed: PackedSeqParams) -> PackedStream:
    """Return the stream that these parameters of documents are cut from; the ends are read once for all layers.

    Raises ValueError for what is cut in another way than as one stream.
    """
    if packed.cu_seqlens_q_padded is not None or packed.local_cp_size is not None:
        raise Refused(
            "megatron-cp's attention takes documents of one stream, got padded documents or a group of their own "
            "(cu_seqlens_q_padded, local_cp_size); use --dataloader-inter-document-masking"
        )
    of_queries = packed.cu_seqlens_q
    of_keys = None if packed.cu_seqlens_kv is of_queries else packed.cu_seqlens_kv
    made = documents(of_queries, of_keys)
    whole = torch.tensor([0, made.tokens], dtype=torch.int32).to(of_queries.device, non_blocking=True)
    return PackedStream(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        max_seqlen_q=made.tokens,
        max_seqlen_kv=made.tokens,
        documents=made,
    )


def _with_stream(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    packed = kwargs.get("packed_seq_params")
    if packed is None or isinstance(packed, PackedStream):
        return None
    return args, {**kwargs, "packed_seq_params": stream_of(packed)}


def _unwrapped(models: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for model in models:
        inner: Any = model
        while hasattr(inner, "module"):
            inner = inner.module
        yield inner
