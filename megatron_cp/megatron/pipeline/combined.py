"""Run forwards and backwards as Megatron's schedule plans, in which those of a pair hide each other's messages.

A plan is a model chunk's forward in nodes with a backward each: of every layer attention with the router, dispatch,
experts and combine. Megatron runs the nodes of one forward between those of another microbatch's backward, products on
one stream and messages between experts on another (`TransformerModelChunkSchedulePlan.run`). Its own drivers do so in
the interleaved 1F1B order; here every pair of a schedule's table does. The other forwards and backwards run through
plans too, for a backward needs that of its forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from inspect import signature
from typing import Any

from megatron.core.pipeline_parallel import combined_1f1b
from megatron.core.pipeline_parallel.utils import set_streams
from torch import Tensor

from megatron_cp.errors import Refused
from megatron_cp.megatron.pipeline.stages import Call, ModelStages
from megatron_cp.megatron.pipeline.te_weight_gradients import gradients_to_come
from megatron_cp.pipeline.execute import BackwardOf, ForwardOf

COMBINED, PLAN = "--overlap-moe-expert-parallel-comm", "return_schedule_plan"


class CombinedStages(ModelStages):
    """Stages of this rank whose forwards and backwards are plans."""

    def __init__(self, call: Call, *args: Any) -> None:
        super().__init__(call, *args)
        _refuse_without_plan(call.forward_step_func)

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        made, _ = self._step(ForwardOf(stage, micro, given), None)
        assert made is not None
        return made

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        return self._step(None, BackwardOf(stage, micro, given, made, gradient, split))[1]

    def overlap(self, forward: ForwardOf, backward: BackwardOf) -> tuple[Tensor, Tensor | None]:
        made, before = self._step(forward, backward)
        assert made is not None
        return made, before

    def _step(self, forward: ForwardOf | None, backward: BackwardOf | None) -> tuple[Tensor | None, Tensor | None]:
        """Run a forward, a backward, or both at the same time."""
        call, config = self._call, self._call.config
        set_streams(high_priority=config.high_priority_a2a_comm_stream)
        chunk = self._chunk[forward.stage] if forward else None
        renews = False
        if forward and chunk is not None:
            self._prefetch(chunk, forward.micro)
            renews = self._renews(chunk, forward.micro)
        with (
            self._placed.seen(call.model[chunk]) if chunk is not None else nullcontext(),
            self._gradients_of(backward),
        ):
            made, tokens, before = combined_1f1b.combined_forward_backward_step(
                _planned(call.forward_step_func, config),
                call.data_iterator[chunk] if chunk is not None else None,
                call.model[chunk] if chunk is not None else None,
                call.micros,
                forward and forward.given,
                call.store,
                call.model[self._chunk[backward.stage]] if backward else None,
                backward and backward.given,
                backward and backward.made,
                backward and backward.gradient,
                config,
                f_model_chunk_id=chunk if len(call.model) > 1 else None,
                collect_non_loss_data=call.collect_non_loss_data,
                is_first_microbatch=renews,
                current_microbatch=forward.micro if forward else None,
            )
        if forward:
            call.tokens += tokens
        return made, before

    @contextmanager
    def _gradients_of(self, backward: BackwardOf | None) -> Iterator[None]:
        """Let weight gradients of a backward wait where it is split, or where they know no whole backward."""
        if backward is None:
            yield
            return
        queue = self._queue if self._queue and (backward.split or self._queue.always) else None
        key = (backward.stage, backward.micro)
        with queue.put_off(key) if queue else nullcontext(), gradients_to_come(self._call.model[self._chunk[key[0]]]):
            yield
        if queue and not backward.split:
            queue.run(key)


def _refuse_without_plan(forward_step: Callable[..., Any]) -> None:
    known = signature(forward_step).parameters.values()
    if not any(each.name == PLAN or each.kind is each.VAR_KEYWORD for each in known):
        raise Refused(
            f"{COMBINED} needs a forward step that takes {PLAN}, and then returns model.build_schedule_plan(…) in the "
            "place of model(…), as that of megatron_cp.pretrain_gpt does; add it to the script, or leave the flag out"
        )


def _planned(forward_step: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """Return the forward step whose plans leave weight gradients to the schedule's queue."""

    @wraps(forward_step)
    def build(*args: Any, **kwargs: Any) -> Any:
        delayed, config.delay_wgrad_compute = config.delay_wgrad_compute, False
        try:
            return forward_step(*args, **kwargs)
        finally:
            config.delay_wgrad_compute = delayed

    return build
