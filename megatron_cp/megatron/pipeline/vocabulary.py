"""Share output layer and embedding of a model out over the ranks of its pipeline (arXiv:2411.05288).

Each rank gets a part of the rows of both as parameters when the model is built, so that gradients, norm, optimizer and
checkpoints are Megatron's own; where the two are tied one part serves as both. Of several chunks on a rank the first
one holds rows of the embedding and the last one those of the output layer, as first and last stage do. The model's last
stage hands its hidden states out where it had losses, which `vocabulary_step` finds.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn

from megatron_cp.comm import Wire
from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline.vocabulary_embedding import FIRST

TIES = "share_embeddings_and_output_weights"
"""Name of what ties embedding and output layer of a model."""


def rows_of(rank: int, p: int, rows: int) -> range:
    """Return which of so many rows a rank of the pipeline holds; parts differ by one at most."""
    return range(rows * rank // p, rows * (rank + 1) // p)


class VocabularyRows(nn.Module):
    """A pipeline rank's rows of a layer, in its place.

    weight: (rows, hidden size), from row `first` of a padded vocabulary of `vocabulary` rows
    """

    def __init__(self, weight: Tensor, first: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.first, self.vocabulary = first, vocabulary
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def ready(self) -> None:
        """Wait for the weight, where Megatron gathers it while something else runs."""
        self(None)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the rows as a part of the whole layer's weight, of the key and the shape that it has elsewhere."""
        replicas = (metadata or {}).get("dp_cp_group") or parallel_state.get_data_parallel_group(
            with_context_parallel=True
        )
        rows, width = self.weight.shape
        key = f"{prefix}weight"
        return {
            key: ShardedTensor(
                key,
                self.weight,
                self.weight.dtype,
                (rows, width),
                (self.vocabulary, width),
                (self.first, 0),
                # ranks may have different numbers of rows
                axis_fragmentations=None,
                replica_id=(0, 0, get_pg_rank(replicas)),
                allow_shape_mismatch=True,
            )
        }


class EmbeddingRows(VocabularyRows):
    """A pipeline rank's rows of the embedding.

    in_parts: True where tensor-parallel ranks have a part of the tokens each behind it
    given:    the embedding (tokens, hidden size) that the first stage's next forward begins with
    """

    def __init__(self, weight: Tensor, first: int, vocabulary: int, in_parts: bool) -> None:
        super().__init__(weight, first, vocabulary)
        self.in_parts = in_parts
        self.given: Tensor | None = None

    def forward(self, tokens: Tensor | None) -> Tensor | None:
        """Return what the first stage has been given for [b s] tokens; hooks before it see to it that it is there."""
        if tokens is None:
            return None
        assert self.given is not None, "an embedding comes before its forward"
        # (s b) h -> s b h
        found, self.given = self.given.unflatten(0, (-1, len(tokens))), None
        return found if self.in_parts else found.transpose(0, 1)

    def take(self, given: Tensor | None) -> None:
        """Keep what the first stage is given; Megatron's forward gets it from here."""
        self.given = given

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        total = self.weight.main_grad  # type: ignore[attr-defined]
        total.index_add_(0, rows, gradient.to(total.dtype))


class EmbeddingPart(nn.Module):
    """The embedding of a rank without a first stage: its rows, under the name that they have elsewhere."""

    def __init__(self, rows: EmbeddingRows) -> None:
        super().__init__()
        self.word_embeddings = rows

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self.word_embeddings.sharded_state_dict(f"{prefix}word_embeddings.", sharded_offsets, metadata)


class OutputRows(VocabularyRows):
    """A pipeline rank's rows of the output layer.

    labels: [b s], which the last stage's forward was given
    """

    labels: Tensor | None = None

    def forward(self, hidden: Tensor | None, *_: Any, **__: Any) -> tuple[Tensor | None, None]:
        """Return hidden states in the place of logits; hooks before it see to it that the weight has been gathered."""
        return hidden, None

    def note(self, labels: Tensor, hidden: Tensor) -> Tensor:
        """Keep the labels; return hidden states in the place of losses."""
        self.labels = labels
        return hidden

    def add(self, gradient: Tensor) -> None:
        self.weight.main_grad.add_(gradient)  # type: ignore[attr-defined]


class TiedRows(OutputRows):
    """Rows of an output layer that are those of the embedding, which keeps and saves them."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._kept: tuple[EmbeddingRows, ...] = ()

    def join(self, rows: EmbeddingRows) -> None:
        """Take these rows, of the rank's first chunk, which has been built by itself."""
        # no child, whose parameter would be found twice
        self._kept = (rows,)
        self.first, self.vocabulary = rows.first, rows.vocabulary

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self._kept[0].weight

    def ready(self) -> None:
        self._kept[0].ready()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return nothing that is saved; Megatron's last stage looks for the key."""
        return {f"{prefix}weight": LocalNonpersistentObject(None)}

    def _load_from_state_dict(self, *_: Any) -> None: ...


def share_out(old: Callable[..., None], settings: Settings, model: Any, *args: Any, **kwargs: Any) -> None:
    """Build a chunk of a model as Megatron does; ranks that have drawn its embedding or output layer give rows away.

    All ranks of the pipeline build their chunks together, one after the other.
    """
    if not settings.pipeline.vocab_parallel:
        old(model, *args, **kwargs)
        return
    # not tied for Megatron, whose first chunk would wait for the last rank's last one to make copies equal
    given = signature(old).bind(model, *args, **kwargs)
    tied = given.arguments.get(TIES, False)
    given.arguments[TIES] = False
    old(*given.args, **given.kwargs)
    chunk, chunks = model.vp_stage or 0, model.config.virtual_pipeline_model_parallel_size or 1
    if chunk == 0:
        _share_out_embedding(model)
    if chunk == chunks - 1:
        # on the V too, where groups of chunks that run up the ranks are numbered from the other end
        last = model.pg_collection.pp.size() - 1
        drawn = model.output_layer if model.post_process else None
        output = TiedRows() if tied else OutputRows(*_my_rows(model, last, drawn))
        model.output_layer, model.compute_language_model_loss = output, output.note


def _share_out_embedding(model: Any) -> None:
    in_parts = model.config.sequence_parallel and model.position_embedding_type != "learned_absolute"
    drawn = model.embedding.word_embeddings if model.pre_process else None
    assert drawn is None or drawn.reduce_scatter_embeddings == in_parts
    embedding = EmbeddingRows(*_my_rows(model, FIRST, drawn), in_parts)
    if model.pre_process:
        model.embedding.word_embeddings = embedding
    else:
        model.embedding = EmbeddingPart(embedding)


def _my_rows(model: Any, source: int, drawn: Any) -> tuple[Tensor, int, int]:
    """Return the rank's part of the rows that one rank of its pipeline has drawn, its first row, and the vocabulary.

    Tensor-parallel ranks cut the vocabulary as ever, and pipeline ranks cut the rows of each of them.
    """
    group, tensor = model.pg_collection.pp, model.pg_collection.tp
    rank, p, config = group.rank(), group.size(), model.config
    vocabulary, rows = model.vocab_size, model.vocab_size // tensor.size()
    mine, wire = rows_of(rank, p, rows), Wire(group)
    first = rows * tensor.rank() + mine.start
    device = torch.cuda.current_device()
    if rank == source:
        whole = drawn.weight.detach()
        for other in range(p):
            if other != rank:
                wire.send(whole[rows_of(other, p, rows)].to(device).contiguous(), other).wait()
        return whole[mine].clone(), first, vocabulary
    weight = torch.empty(len(mine), config.hidden_size, dtype=config.params_dtype, device=device)
    wire.receive(weight, source).wait()
    return weight, first, vocabulary
