"""A step of a model whose output layer and embedding lie on all ranks of its pipeline (arXiv:2411.05288).

Losses are found while the step runs on, behind the last stage's forward; the first stage's embeddings are looked up
ahead of its forwards.
"""

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_cp.comm import Collectives, GroupFabric, Transfer, collectives
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.megatron.pipeline.vocabulary import OutputRows, TiedRows
from megatron_cp.pipeline.action import SHARE, SHARE_E, SUM_E, SUM_S, SUM_T
from megatron_cp.pipeline.vocabulary_embedding import FIRST, VocabularyEmbedding
from megatron_cp.pipeline.vocabulary_head import Targets, TensorRanks, VocabularyHead

KINDS = (SHARE, SUM_S, SUM_T, SUM_E, SHARE_E)
"""Messages that have a communicator of their own."""


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

    def _forward_step(self, iterator: Any, model: Any, *rest: Any) -> Any:
        output, function = self._inner(iterator, model, *rest)
        if model is self._call.model[-1]:
            self._latest = function
        return output, function

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


def head_of(call: Any, last: int, barriers: int, ranks: PipelineCollectives, check: bool) -> VocabularyHead:
    """Return the rank's share of the output layer for a call, whose last stage it then lets hand out hidden states.

    last: the rank with the last stage
    Raises RuntimeError where the model was not built with its output layer on all ranks.
    """
    if call.collect_non_loss_data:
        raise Refused(
            "--pp-vocab-parallel does not do data other than losses, for no rank has all logits; leave it out"
        )
    rows = getattr(unwrap_model(call.model[-1]), "output_layer", None)
    if not isinstance(rows, OutputRows):
        raise CannotRun("the output layer does not lie on all ranks: the hook shared-vocabulary is not in force")
    if isinstance(rows, TiedRows):
        rows.join(unwrap_model(call.model[0]).embedding.word_embeddings)
    rank = call.groups.pp.rank()
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

    def __init__(self, call: Any, ranks: PipelineCollectives) -> None:
        self._forwards: deque[tuple[Any, Any]] = deque()
        length, batch, _ = call.shape
        tokens = length * batch * (call.groups.tp.size() if call.config.sequence_parallel else 1)
        if call.groups.pp.rank() == FIRST:
            self._of_micros = torch.stack(list(self._read(call)))
        else:
            self._of_micros = torch.empty(call.micros, tokens, dtype=torch.int64, device=call.tokens.device)
        ranks.broadcast(SUM_E, self._of_micros, FIRST).wait()

    def _read(self, call: Any) -> Any:
        self._first, noting = call.model[0], _Noting(call.model[0])
        self._inner, call.forward_step_func = call.forward_step_func, self._forward_step
        for _ in range(call.micros):
            _, loss = self._inner(call.data_iterator[0], noting)
            args, kwargs = noting.given
            self._forwards.append((noting.given, loss))
            yield _tokens_first(args[0] if args else kwargs["input_ids"])

    def _forward_step(self, iterator: Any, model: Any, *rest: Any) -> Any:
        if model is not self._first:
            return self._inner(iterator, model, *rest)
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
