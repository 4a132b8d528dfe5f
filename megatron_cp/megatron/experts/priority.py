"""Reductions of Megatron's gradients that wait for exchanges of experts (Lina)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_cp.experts.priority import ExchangePriority
from megatron_cp.megatron.experts.dispatcher import PieceDispatcher
from megatron_cp.megatron.flags.experts import ExpertFlags


def put_exchanges_first[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Let reductions of wrapped chunks wait for exchanges, where the config asks for it; a post-wrap hook for Megatron.

    Megatron starts the reduction of a group in backward, as soon as its last gradient is there, with
    --overlap-grad-reduce alone; `finish_grad_sync` waits for all of them once the step has no more backwards.
    """
    dispatchers = [dispatcher for model in models for dispatcher in _asking(model)]
    chunks: list[Any] = [model for model in models if isinstance(model, DistributedDataParallel)]
    chunks = [chunk for chunk in chunks if chunk.ddp_config.overlap_grad_reduce]
    if dispatchers and chunks:
        priority = ExchangePriority()
        for dispatcher in dispatchers:
            dispatcher.priority = priority
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.start_grad_sync = partial(_start, priority, group.start_grad_sync)
            chunk.finish_grad_sync = partial(_finish, priority, chunk.finish_grad_sync)
    return models


def _asking(model: nn.Module) -> list[PieceDispatcher]:
    found = (getattr(module, "token_dispatcher", None) for module in model.modules())
    dispatchers = (each for each in found if isinstance(each, PieceDispatcher))
    return [each for each in dispatchers if ExpertFlags.of(each.config).exchange.first]


def _start(priority: ExchangePriority, start: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    priority.start(partial(start, *args, **kwargs))


def _finish(priority: ExchangePriority, finish: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    priority.finish()
    finish(*args, **kwargs)
