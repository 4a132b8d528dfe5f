"""Stages on a V inside Megatron, which knows the loop only.

Megatron numbers stages along the loop: chunk c of rank r is stage c * p + r, and whatever it decides for a chunk
(layers and their numbers, embedding, head, loss, data) it decides from (r, c). On the V every other chunk runs up the
ranks: chunk c of rank r is the stage that the loop has on rank p - 1 - r. Such a chunk is built, fed and run as if its
rank were that one: it is given the pipeline's group numbered from the other end, and meanwhile Megatron's own rank is
set to it.

Two things are left that follow from first and last stage being on one rank: tied embeddings are two weights of rank 0,
and Megatron looks for losses on the last rank.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_cp.comm import backwards, hand_over
from megatron_cp.errors import CannotRun
from megatron_cp.megatron.run import global_args
from megatron_cp.pipeline import on_v
from megatron_cp.pipeline.placement import vee


def v_in_force() -> bool:
    """Whether the arguments name a schedule on the V."""
    args = global_args()
    return on_v(getattr(args, "pp_schedule", None), getattr(args, "pp_placement", None))


def rank_on_loop(rank: int, chunk: int, p: int) -> int:
    """The rank that the loop has this stage on; the chunk is the same there."""
    return vee(p, chunk + 1).of_rank[rank][chunk] % p


@contextmanager
def seen_as(rank: int) -> Iterator[None]:
    """Megatron takes this process for that rank of the pipeline."""
    parallel_state.set_pipeline_model_parallel_rank(rank)
    try:
        yield
    finally:
        # from then on the group is asked again
        parallel_state.set_pipeline_model_parallel_rank(None)


@contextmanager
def seen_on_loop(chunk: Any) -> Iterator[None]:
    """Megatron takes this process for the rank that holds this model chunk's stage on the loop."""
    if not v_in_force():
        yield
        return
    with seen_as(pipeline_of(chunk).rank()):
        yield


def pipeline_of(chunk: Any) -> Any:
    """The pipeline's group as a model chunk was given it.

    Raises RuntimeError where the model was not built by `build_stages`.
    """
    group = get_attr_wrapped_model(chunk, "pg_collection").pp
    vp_stage = get_attr_wrapped_model(chunk, "vp_stage")
    own = parallel_state.get_pipeline_model_parallel_group()
    if v_in_force() and group.rank() != rank_on_loop(own.rank(), vp_stage, own.size()):
        raise CannotRun(
            "a schedule on the V needs the model of a config's builder, and this script hands a model provider to "
            "pretrain(); hand it a model config, or take a schedule on the loop"
        )
    return group


def build_stages(old: Callable[..., Any], build: Callable[..., Any], groups: Any, vp_size: int, *args: Any) -> Any:
    """Build this rank's chunks as stages on the V; tied embeddings start out equal."""
    if not v_in_force():
        return old(build, groups, vp_size, *args)
    other_way = backwards(groups.pp)
    own, p = groups.pp.rank(), groups.pp.size()

    def build_on_v(_: Any, *, vp_stage: int, **processes: bool) -> Any:
        rank = rank_on_loop(own, vp_stage, p)
        mine = copy.copy(groups)
        # the two ends of the model are on one rank: no group exchanges embeddings
        mine.pp, mine.embd = other_way if vp_stage % 2 else groups.pp, None
        stage = vp_stage * p + rank
        with seen_as(rank):
            return build(mine, pre_process=stage == 0, post_process=stage == vp_size * p - 1, vp_stage=vp_stage)

    chunks = old(build_on_v, groups, vp_size, *args)
    if pair := tied(chunks):
        with torch.no_grad():
            pair[1].copy_(pair[0])
    return chunks


def tied(chunks: list[Any]) -> tuple[Tensor, Tensor] | None:
    """The embedding and its copy in the last stage, where both are here and are one weight of the model."""
    first, last = (
        get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True) for chunk in (chunks[0], chunks[-1])
    )
    if not (first.pre_process and last.post_process and last.share_embeddings_and_output_weights):
        return None
    return first.shared_embedding_or_output_weight(), last.shared_embedding_or_output_weight()


def add_tied_gradients(old: Callable[..., Any], chunks: list[Any], *args: Any, **kwargs: Any) -> None:
    """Give both tied weights the sum of their gradients, which the loop's first and last rank reduce to each other."""
    if not v_in_force():
        return old(chunks, *args, **kwargs)
    if pair := tied(chunks):
        ours, copied = pair[0].main_grad, pair[1].main_grad  # type: ignore[attr-defined]
        ours.add_(copied)
        copied.copy_(ours)
    return None


def feed_stages(old: Callable[..., Any], provider: Any) -> Any:
    """Build the data iterators of one chunk where its stage needs data."""
    if not v_in_force():
        return old(provider)
    own = parallel_state.get_pipeline_model_parallel_group()
    with seen_as(rank_on_loop(own.rank(), provider.keywords["vp_stage"], own.size())):
        return old(provider)


def groups_to_finalize(groups: Any, chunks: list[Any]) -> Any:
    """The groups in which the pipeline's last rank is the one that has counted tokens."""
    if not v_in_force():
        return groups
    found = copy.copy(groups)
    found.pp = pipeline_of(chunks[-1])
    return found


def to_last_rank(store: list[Any], group: Any) -> list[Any]:
    """What the last stage left behind, also on the pipeline's last rank, which prints and logs it."""
    if not v_in_force():
        return store
    found = hand_over(group, 0, group.size() - 1, _moved(store, "cpu"))
    return store if group.rank() == 0 else _moved(found, torch.cuda.current_device())


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value
