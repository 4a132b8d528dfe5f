"""Documents of a packed batch on their way from Megatron's batch to the attention of every layer.

Megatron cuts the tokens of `--dataloader-inter-document-masking` for the ranks of a context-parallel group as one
stream, but rotates them, and rolls those of multi-token prediction, as if each document had been cut. A hook on the
model hands on one document of the whole stream, so that all of it follows the cut, with the real ends beside it for
attention. Rotary positions count from the start of the stream then, which changes no score but in rounding. A batch
that our own data path cuts by its documents brings the order of these positions, too.

Several samples are one stream, t 1 h in the model, while the buffers of every pipeline schedule are s b h. Both are the
same memory, so that the hook views what comes from the stage before as the one, and what leaves as the other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_cp.comm import Fabric
from megatron_cp.context.documents import Documents, documents
from megatron_cp.context.layouts import Layout, Runs, zigzag
from megatron_cp.context.slices import PackedSlice, SlicesInFlight
from megatron_cp.errors import Refused

_MARK = "_megatron_cp_documents"


@dataclass
class PackedStream(PackedSeqParams):
    """Parameters of one document as long as the stream, with the documents that the stream is made of.

    rows:    for a batch cut by its documents, the position of each row of Megatron's cut of the stream over all ranks
    samples: of the microbatch, one after the other in the stream
    in_slice: the documents of a slice beside those of the slices before it
    group:   the ranks that share the stream, where they are not the context-parallel group; `rows` is then the position
             of each of this rank's tokens in its document
    """

    documents: Documents | None = None
    rows: Tensor | None = None
    samples: int = 1
    in_slice: PackedSlice | None = None
    group: Fabric | None = None


def built_on_all_stages(
    old: Callable[..., None], builder: Any, cls: Any, sizes: Any, is_built_on_rank: Callable[[], bool], config: Any
) -> None:
    """Make Megatron's builder of datasets, which builds those of packed documents on every pipeline stage."""

    def anywhere() -> bool:
        return is_built_on_rank() or bool(parallel_state.get_tensor_model_parallel_rank() == 0)

    old(builder, cls, sizes, anywhere if getattr(config, "inter_document_masking", False) else is_built_on_rank, config)


def hand_on_documents[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Give every layer of the model chunks the documents of its microbatch; a post-wrap hook for Megatron."""
    for model in _unwrapped(models):
        if not hasattr(model, _MARK):
            hooks = _Hooks()
            setattr(model, _MARK, model.register_forward_pre_hook(hooks.hand_on, with_kwargs=True))
            model.register_forward_hook(hooks.as_samples)
            # set by a pipeline schedule that runs sequences in slices
            setattr(model, "in_slices", None)  # noqa: B010
            if isinstance(rotary := getattr(model, "rotary_pos_emb", None), nn.Module):
                rotary.register_forward_hook(hooks.in_rows)
    return models


class _Hooks:
    """Hooks of one model chunk; the rotary positions of a microbatch are made while the chunk runs, for all layers."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._samples = 1

    def hand_on(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        packed = kwargs.get("packed_seq_params")
        stream = stream_of(packed) if packed is not None and not isinstance(packed, PackedStream) else packed
        if stream is not None and (slices := getattr(model, "in_slices", None)):
            stream = _in_slice(stream, slices)
        self._rows, self._samples = (None, 1) if stream is None else (stream.rows, stream.samples)
        if stream is not None:
            _as_stream(model, stream.samples)
        return None if stream is packed else (args, {**kwargs, "packed_seq_params": stream})

    def as_samples(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """View what goes to the next stage as the samples of the microbatch, t 1 h -> s b h."""
        if self._samples == 1 or getattr(model, "post_process", True):
            return None
        # Megatron frees what it has sent, but refuses to free a view
        return torch.ops.aten._unsafe_view(out, (out.shape[0] // self._samples, self._samples, out.shape[2]))

    def in_rows(self, module: nn.Module, args: tuple[Any, ...], angles: Tensor) -> Tensor:
        """Order the rotary angles so that the rows which Megatron's cut takes are those of the rank's tokens."""
        return angles if self._rows is None else angles[self._rows]


def _as_stream(model: nn.Module, samples: int) -> None:
    """View what came from the stage before as one stream, s b h -> t 1 h."""
    decoder: Any = getattr(model, "decoder", None)
    given = getattr(decoder, "input_tensor", None)
    if given is None or given.shape[1] == 1:
        return
    if given.shape[1] != samples:
        raise Refused(
            f"packed documents of {given.shape[1]} samples between pipeline stages need PackedSeqParams with "
            "tokens_per_sample, got none; pass --micro-batch-size 1"
        )
    decoder.input_tensor = given.reshape(-1, 1, given.shape[2])


def _in_slice(stream: PackedStream, slices: SlicesInFlight) -> PackedStream:
    """Return the stream of the slice that runs, with the positions that its samples have in the slice."""
    assert stream.documents is not None, "a stream has documents"
    made = slices.packed(stream.documents)
    rows = None if stream.samples == 1 else torch.arange(slices.length).repeat(stream.samples)
    device = stream.cu_seqlens_q.device
    return replace(stream, in_slice=made, rows=rows if rows is None else rows.to(device, non_blocking=True))


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
    return _stream(made, of_queries.device, samples=made.tokens // (packed.tokens_per_sample or made.tokens))


def cut_stream(made: Documents, layout: Layout, device: torch.device, samples: int = 1) -> PackedStream:
    """Return the stream of a batch whose ranks hold the tokens at the positions of a layout."""
    taken = zigzag(made.tokens, len(layout))
    rows = torch.empty(made.tokens, dtype=torch.int64)
    for theirs, ours in zip(taken, layout, strict=True):
        rows[positions(theirs)] = positions(ours)
    return _stream(made.cut_by(layout), device, rows.to(device, non_blocking=True), samples)


def shared_stream(made: Documents, layout: Layout, group: Fabric, within: Tensor) -> PackedStream:
    """Return the stream of a microbatch that a group of ranks shares.

    layout: positions of the tokens of each rank of the group
    within: position of each of this rank's tokens in its document
    """
    own = torch.tensor([0, len(within)], dtype=torch.int32, device=within.device)
    longest = max(len(each.q) for each in made.sets)
    return PackedStream(
        qkv_format="thd",
        cu_seqlens_q=own,
        cu_seqlens_kv=own,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        documents=made.cut_by(layout),
        rows=within,
        group=group,
    )


def positions(runs: Runs) -> Tensor:
    """Return the positions of a rank's tokens."""
    return torch.cat([torch.arange(run.start, run.stop, run.step) for run in runs])


def _stream(made: Documents, device: torch.device, rows: Tensor | None = None, samples: int = 1) -> PackedStream:
    whole = torch.tensor([0, made.tokens], dtype=torch.int32).to(device, non_blocking=True)
    return PackedStream(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        max_seqlen_q=made.tokens,
        max_seqlen_kv=made.tokens,
        documents=made,
        rows=rows,
        samples=samples,
    )


def _unwrapped(models: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for model in models:
        inner: Any = model
        while hasattr(inner, "module"):
            inner = inner.module
        yield inner
