"""The stages of a rank as model chunks: each forward and backward is Megatron's own building block."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_cp.context.slices import SlicesInFlight
from megatron_cp.megatron.pipeline.te_weight_gradients import gradients_to_come
from megatron_cp.megatron.pipeline.v_placement import OnLoop
from megatron_cp.pipeline.split_backward import WeightQueue


@dataclass(kw_only=True)
class Call:
    """Arguments of one call of the forward-backward function, and what its actions leave behind.

    shape:     of what passes between stages
    tokens_of: each microbatch, in the first dim of the shape, where they differ
    show:      lets the weights be those of a microbatch, where they are kept in versions
    headless:  True if the last stage ends with hidden states, for the output layer lies on all ranks
    embed:     takes what the first stage is given and returns what Megatron gets of it: nothing where it is the
               embedding
    """

    forward_step_func: Callable[..., Any]
    data_iterator: list[Any]
    model: list[Any]
    micros: int
    config: Any
    groups: Any
    shape: tuple[int, ...]
    tokens_of: Sequence[int] | None
    training: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    force_all_reduce: bool
    tokens: Tensor
    slices: SlicesInFlight | None = None
    show: Callable[[int], None] = lambda micro: None
    headless: bool = False
    embed: Callable[[Tensor | None], Tensor | None] = lambda given: given
    window: int = 0
    forwards: int = 0
    store: list[Any] = field(default_factory=list)

    def buffer(self, micro: int = 0) -> Tensor:
        """Return an empty tensor for what passes between stages: a microbatch's, or that of its slice."""
        shape = self.shape
        if self.tokens_of:
            shape = (self.tokens_of[micro], *shape[1:])
        if self.slices:
            tokens = self.slices.tokens
            shape = (shape[0] * len(tokens[micro % len(tokens)]) // tokens[-1].stop, *shape[1:])
        return torch.empty(shape, dtype=self.config.pipeline_dtype, device=torch.cuda.current_device())


class ModelStages:
    """Stages of this rank as an executor runs them: the n-th of `stages` is the n-th model chunk."""

    def __init__(
        self,
        call: Call,
        placed: OnLoop,
        stages: tuple[int, ...],
        last: Callable[[int], bool],
        queue: WeightQueue | None,
    ) -> None:
        self._call, self._placed, self._last, self._queue = call, placed, last, queue
        self._chunk = {stage: chunk for chunk, stage in enumerate(stages)}

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        call, chunk = self._call, self._chunk[stage]
        call.show(micro)
        given = given if stage else call.embed(given)
        self._prefetch(chunk, micro)
        with self._placed.seen(call.model[chunk]), self._slice(stage, micro):
            output, tokens = schedules.forward_step(
                call.forward_step_func,
                call.data_iterator[chunk],
                call.model[chunk],
                call.micros,
                given,
                call.store,
                call.config,
                call.groups.cp.size(),
                call.collect_non_loss_data,
                self._checkpoints(),
                self._renews(chunk, micro),
                micro,
                # as Megatron's own driver without chunks
                chunk if len(call.model) > 1 else None,
                self._last(stage) and not call.headless,
            )
        call.tokens += tokens
        if call.slices and not call.training:
            call.slices.end(stage, micro, training=False)
        return output

    def _slice(self, stage: int, micro: int) -> AbstractContextManager[None]:
        return self._call.slices.at(stage, micro) if self._call.slices else nullcontext()

    def _renews(self, chunk: int, micro: int) -> bool:
        """True in the chunk's first microbatch of a step; in an evaluation of its first batch alone."""
        call, first = self._call, micro == self._placed.first_micro(chunk, self._call.micros)
        return bool(schedules.check_first_val_step(call.first_val_step, not call.training, first))

    def _prefetch(self, chunk: int, micro: int) -> None:
        """Gather the next chunk's parameters while this one's first microbatch runs, where Megatron aligns gathers."""
        call = self._call
        if call.config.param_sync_func is None or not call.training or micro or not 0 < chunk < len(call.model) - 1:
            return
        listed(call.config.param_sync_func, call.model)[chunk + 1](call.model[chunk + 1].parameters())

    def _checkpoints(self) -> bool | None:
        """True if this microbatch recomputes all layers, where only some of those in flight may keep activations."""
        call = self._call
        spared = call.config.num_microbatches_with_partial_activation_checkpoints
        if spared is None:
            return None
        call.forwards += 1
        return bool((call.forwards - 1) % call.window >= spared)

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        queue = self._queue if self._queue and (split or self._queue.always) else None
        self._call.show(micro)
        chunk = self._call.model[self._chunk[stage]]
        with (
            queue.put_off((stage, micro)) if queue else nullcontext(),
            gradients_to_come(chunk),
            self._slice(stage, micro),
        ):
            before: Tensor | None = schedules.backward_step(given, made, gradient, self._call.config)
        if self._call.slices:
            self._call.slices.end(stage, micro, training=True)
        if queue and not split:
            queue.run((stage, micro))
        return before

    def weight(self, stage: int, micro: int) -> None:
        assert self._queue, "a schedule with W runs with a queue"
        self._queue.run((stage, micro))

    def reduce(self, stage: int) -> None:
        """Start the reduction of the chunk's gradients, where Megatron overlaps it; elsewhere it comes at the end."""
        chunk = self._call.model[self._chunk[stage]]
        overlaps = getattr(chunk, "ddp_config", None) and chunk.ddp_config.overlap_grad_reduce
        # with several instances of the distributed optimizer Megatron keeps no handle, and would start it again
        if overlaps and chunk.ddp_config.num_distributed_optimizer_instances == 1 and not self._call.force_all_reduce:
            chunk.start_grad_sync()

    def buffer(self, micro: int) -> Tensor:
        return self._call.buffer(micro)

    def shrink(self, made: Tensor) -> None:
        schedules.deallocate_output_tensor(made, self._call.config.deallocate_pipeline_outputs)


def listed(functions: Any, model: list[Any]) -> list[Any]:
    return functions if isinstance(functions, list) else [functions] * len(model)
