"""Share the output layer of a model out over the ranks of its pipeline (arXiv:2411.05288).

Each rank gets a part of the layer's rows as a parameter when the model is built, so that gradients, norm, optimizer and
checkpoints are Megatron's own. The model's last stage hands its hidden states out where it had losses; the losses are
found while the step runs on.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.utils import get_pg_rank, unwrap_model
from torch import Tensor, nn

from megatron_cp.comm import Collectives, GroupFabric, Transfer, Wire, collectives
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline.action import SHARE, SUM_S, SUM_T
from megatron_cp.pipeline.vocabulary_head import Targets, TensorRanks, VocabularyHead

KINDS = (SHARE, SUM_S, SUM_T)
"""Messages that have a communicator of their own."""


def rows_of(rank: int, p: int, rows: int) -> range:
    """Return which of so many rows a rank of the pipeline holds; parts differ by one at most."""
    return range(rows * rank // p, rows * (rank + 1) // p)


class OutputRows(nn.Module):
    """A pipeline rank's rows of the output layer, in the place of the layer.

    weight: (rows, hidden size), from row `first` of a padded vocabulary of `vocabulary` rows
    labels: [b s], which the last stage's forward was given
    """

    def __init__(self, weight: Tensor, first: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.first, self.vocabulary = first, vocabulary
        self.labels: Tensor | None = None
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor | None, *_: Any, **__: Any) -> tuple[Tensor | None, None]:
        """Return hidden states in the place of logits; hooks before it see to it that the weight has been gathered."""
        return hidden, None

    def ready(self) -> None:
        """Wait for the weight, where Megatron gathers it while something else runs."""
        self(None)

    def note(self, labels: Tensor, hidden: Tensor) -> Tensor:
        """Keep the labels; return hidden states in the place of losses."""
        self.labels = labels
        return hidden

    def add(self, gradient: Tensor) -> None:
        self.weight.main_grad.add_(gradient)  # type: ignore[attr-defined]

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


def share_out(old: Callable[..., None], settings: Settings, model: Any, *args: Any, **kwargs: Any) -> None:
    """Build a model as Megatron does; the last rank of the pipeline, which has drawn its output layer, gives rows away.

    All ranks of the pipeline build their part of the model together.
    """
    old(model, *args, **kwargs)
    if not settings.pipeline.vocab_parallel:
        return
    model.output_layer = _my_rows(model)
    model.compute_language_model_loss = model.output_layer.note


def _my_rows(model: Any) -> OutputRows:
    """Return the rank's part of the rows that the last rank of its pipeline has drawn, and has sent.

    Tensor-parallel ranks cut the vocabulary as ever, and pipeline ranks cut the rows of each of them.
    """
    group, tensor = model.pg_collection.pp, model.pg_collection.tp
    rank, p, config = group.rank(), group.size(), model.config
    vocabulary, rows = model.vocab_size, model.vocab_size // tensor.size()
    mine, wire = rows_of(rank, p, rows), Wire(group)
    first = rows * tensor.rank() + mine.start
    device = torch.cuda.current_device()
    if rank == p - 1:
        whole = model.output_layer.weight.detach()
        for other in range(p - 1):
            wire.send(whole[rows_of(other, p, rows)].to(device).contiguous(), other).wait()
        return OutputRows(whole[mine].clone(), first, vocabulary)
    weight = torch.empty(len(mine), config.hidden_size, dtype=config.params_dtype, device=device)
    wire.receive(weight, p - 1).wait()
    return OutputRows(weight, first, vocabulary)


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


def _tokens_first(of_batch: Tensor) -> Tensor:
    """Return [b s] in the order of hidden states, (s b)."""
    return of_batch.T.flatten().contiguous()
