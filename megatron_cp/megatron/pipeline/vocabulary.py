"""Share output layer and embedding of a model out over the ranks of its pipeline (arXiv:2411.05288).

Each rank gets a part of the rows of both as parameters when the model is built, so that gradients, norm, optimizer and
checkpoints are Megatron's own; where the two are tied one part serves as both. The model's last stage hands its hidden
states out where it had losses; the losses are found while the step runs on. The first stage is given its embedding.
"""

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.utils import get_pg_rank, unwrap_model
from torch import Tensor, nn

from megatron_cp.comm import Collectives, GroupFabric, Transfer, Wire, collectives
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline.action import SHARE, SHARE_E, SUM_E, SUM_S, SUM_T
from megatron_cp.pipeline.vocabulary_embedding import FIRST, VocabularyEmbedding
from megatron_cp.pipeline.vocabulary_head import Targets, TensorRanks, VocabularyHead

KINDS = (SHARE, SUM_S, SUM_T, SUM_E, SHARE_E)
"""Messages that have a communicator of their own."""


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

    def __init__(self, rows: EmbeddingRows) -> None:
        nn.Module.__init__(self)
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
    """Build a model as Megatron does; the ranks that have drawn its embedding and its output layer give rows away.

    All ranks of the pipeline build their part of the model together.
    """
    old(model, *args, **kwargs)
    if not settings.pipeline.vocab_parallel:
        return
    in_parts = model.config.sequence_parallel and model.position_embedding_type != "learned_absolute"
    drawn = model.embedding.word_embeddings if model.pre_process else None
    assert drawn is None or drawn.reduce_scatter_embeddings == in_parts
    embedding = EmbeddingRows(*_my_rows(model, FIRST, drawn), in_parts)
    if model.share_embeddings_and_output_weights:
        output: OutputRows = TiedRows(embedding)
        # what Megatron does for the copies on two ranks
        model.share_embeddings_and_output_weights = False
    else:
        last = model.pg_collection.pp.size() - 1
        output = OutputRows(*_my_rows(model, last, model.output_layer if model.post_process else None))
    if model.pre_process:
        model.embedding.word_embeddings = embedding
    else:
        model.embedding = EmbeddingPart(embedding)
    model.output_layer, model.compute_language_model_loss = output, output.note


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


class PipelineCollectives:
    """Collectives of the pipeline's ranks, with a communicator for each kind; all ranks of the run connect together."""

    def __init__(self, group: Any, minutes: int | None) -> None:
        made = collectives(group, len(KINDS), timedelta(minutes=minutes) if minutes else None)
        self._of: dict[str, Collectives] = dict(zip(KINDS, made, strict=True))
        # NCCL connects ranks at their first message, where the host waits: a step comes to these in any order
        token = torch.zeros(1, device=torch.cuda.current_device())
        for each in made:
            each.gather(token)[0].wait()

    def broadcast(self, kind: str, tensor: Tensor, source: int) -> Transfer:
        return self._of[kind].broadcast(tensor, source)

    def gather(self, kind: str, tensor: Tensor) -> tuple[Transfer, list[Tensor]]:
        return self._of[kind].gather(tensor)

    def gather_on(self, kind: str, tensor: Tensor, target: int) -> tuple[Transfer, list[Tensor]]:
        return self._of[kind].gather_on(tensor, target)

    def sum_on(self, kind: str, tensor: Tensor, target: int) -> Transfer:
        return self._of[kind].sum_on(tensor, target)


class _LossOfMicro(NamedTuple):
    """The shape of a microbatch's labels, its loss function, and the gradient of each token's loss."""

    shape: torch.Size
    function: Callable[..., Any]
    gradients: Tensor


class StepLosses:
    """Targets and losses of one step, or of a batch of an evaluation, on the last rank of the pipeline.

    The loss function runs twice on each microbatch: before its losses are known for the gradient of each of them, and
    on them for what is logged.

    call:  the Call of the pipeline's forward-backward function
    check: True to compare that gradient with the one at the losses, on the first microbatch
    """

    def __init__(self, call: Any, rows: OutputRows, check: bool) -> None:
        self._call, self._rows, self._check = call, rows, check
        self._inner, self._latest = call.forward_step_func, None
        self._micros: dict[int, _LossOfMicro] = {}
        call.forward_step_func = self._forward_step

    def _forward_step(self, *args: Any) -> Any:
        output, self._latest = self._inner(*args)
        return output, self._latest

    def targets(self, micro: int) -> Targets:
        """Return the targets of the microbatch whose forward has run last."""
        labels, function = self._rows.labels, self._latest
        assert labels is not None, "the last stage's forward has run"
        assert function is not None
        self._rows.labels = self._latest = None
        gradients = torch.zeros(labels.shape, device=labels.device)
        if self._call.training:
            gradients = self._gradients(function, gradients)
        self._micros[micro] = _LossOfMicro(labels.shape, function, gradients)
        return Targets(_tokens_first(labels), _tokens_first(gradients))

    def found(self, micro: int, losses: Tensor) -> None:
        """Take the loss of each token.

        Raises RuntimeError for a loss function that is no weighted sum of them.
        """
        shape, function, gradients = self._micros.pop(micro)
        # (s b) -> b s
        of_batch = losses.view(shape[1], shape[0]).T.contiguous()
        if self._check and not torch.equal(gradients, self._gradients(function, of_batch)):
            raise CannotRun(
                "--pp-vocab-parallel needs a loss that is a weighted sum of the tokens' losses, and the gradients of "
                "this loss function change with them; leave --pp-vocab-parallel out"
            )
        self._check = False
        with torch.no_grad():
            _, tokens, logged = self._loss(function, of_batch)
        self._call.tokens += tokens
        self._call.store.append(logged)

    def _gradients(self, function: Callable[..., Any], losses: Tensor) -> Tensor:
        """Return the gradient of each token's loss, as the backward pass of a step begins with it."""
        scale = self._call.config.grad_scale_func
        with torch.enable_grad():
            leaf = losses.detach().requires_grad_()
            total = self._loss(function, leaf)[0]
            (found,) = torch.autograd.grad(total if scale is None else scale(total), leaf)
        return found

    def _loss(self, function: Callable[..., Any], losses: Tensor) -> tuple[Tensor, Tensor | int, Any]:
        """Return loss, tokens and what is logged, divided as Megatron divides them."""
        call, outputs = self._call, function(losses)
        if len(outputs) == 2:
            total, logged = outputs
            return total * call.groups.cp.size() / call.micros, 0, logged
        total, tokens, logged = outputs
        if not call.config.calculate_per_token_loss:
            total = total / tokens.clamp(min=1) / call.micros
        return total, tokens, logged


def head_of(call: Any, barriers: int, ranks: PipelineCollectives, check: bool) -> VocabularyHead:
    """Return the rank's share of the output layer for a call, whose last stage it then lets hand out hidden states.

    Raises RuntimeError where the model was not built with its output layer on all ranks.
    """
    if call.collect_non_loss_data:
        raise Refused(
            "--pp-vocab-parallel does not do data other than losses, for no rank has all logits; leave it out"
        )
    rows = getattr(unwrap_model(call.model[0]), "output_layer", None)
    if not isinstance(rows, OutputRows):
        raise CannotRun("the output layer does not lie on all ranks: the hook shared-vocabulary is not in force")
    rank, last = call.groups.pp.rank(), call.groups.pp.size() - 1
    dtype = rows.weight.dtype
    return VocabularyHead(
        rows.weight,
        rows.first,
        barriers,
        ranks,
        (rank, last),
        add=rows.add,
        buffer=lambda micro: call.buffer(micro).to(dtype),
        losses=StepLosses(call, rows, check) if rank == last else None,
        training=call.training,
        ready=rows.ready,
        tensor=TensorRanks(GroupFabric(call.groups.tp), call.config.sequence_parallel),
    )


class _Noting:
    """A model that only notes what it is called with, in the place of the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given = (args, kwargs)
        return torch.empty(0)


class StepTokens:
    """Tokens of all microbatches of a step, which the first rank reads before it: other ranks look them up early.

    call: the Call of the pipeline's forward-backward function, whose forward steps then take what has been read
    """

    def __init__(self, call: Any, ranks: "PipelineCollectives") -> None:
        self._forwards: deque[tuple[Any, Any]] = deque()
        length, batch, _ = call.shape
        tokens = length * batch * (call.groups.tp.size() if call.config.sequence_parallel else 1)
        if call.groups.pp.rank() == FIRST:
            self._of_micros = torch.stack(list(self._read(call)))
        else:
            self._of_micros = torch.empty(call.micros, tokens, dtype=torch.int64, device=call.tokens.device)
        ranks.broadcast(SUM_E, self._of_micros, FIRST).wait()

    def _read(self, call: Any) -> Any:
        inner, noting = call.forward_step_func, _Noting(call.model[0])
        call.forward_step_func = self._forward_step
        for _ in range(call.micros):
            _, loss = inner(call.data_iterator[0], noting)
            args, kwargs = noting.given
            self._forwards.append((noting.given, loss))
            yield _tokens_first(args[0] if args else kwargs["input_ids"])

    def _forward_step(self, _: Any, model: Any, *__: Any) -> Any:
        (args, kwargs), loss = self._forwards.popleft()
        return model(*args, **kwargs), loss

    def of(self, micro: int) -> Tensor:
        """Return those of a microbatch in the order of hidden states, (s b)."""
        return self._of_micros[micro]


def embedding_of(call: Any, ranks: PipelineCollectives) -> VocabularyEmbedding:
    """Return the rank's share of the embedding for a call, whose first stage it then gives what was looked up."""
    rows = unwrap_model(call.model[0]).embedding.word_embeddings
    if call.groups.pp.rank() == FIRST:
        call.embed = rows.take
    return VocabularyEmbedding(
        rows.weight,
        rows.first,
        ranks,
        call.groups.pp.rank(),
        tokens=StepTokens(call, ranks).of,
        add=rows.add,
        ready=rows.ready,
        tensor=TensorRanks(GroupFabric(call.groups.tp), rows.in_parts),
    )


def _tokens_first(of_batch: Tensor) -> Tensor:
    """Return [b s] in the order of hidden states, (s b)."""
    return of_batch.T.flatten().contiguous()
