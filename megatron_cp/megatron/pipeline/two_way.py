"""Train two copies of the model in Megatron, one down the pipeline's ranks and one up them.

A rank holds two model chunks, the stage of its own number and that of the rank as far from the other end, its peer. The
second is built, fed and run as on the V, under that rank's number. To Megatron the run has one chunk per rank: it knows
no virtual pipeline, and both copies are in one list of chunks, as optimizer and gradient buffers take them.

What makes two copies one model is here: they start out equal, their gradients are added up between the two ranks before
every update, and only one of them counts in the gradients' norm and goes to a checkpoint.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_cp.comm import GroupFabric, Wire, backwards
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.megatron.pipeline import v_placement
from megatron_cp.megatron.pipeline.v_placement import OnV, seen_as
from megatron_cp.megatron.run import Settings

PIECE = 1 << 24
"""Elements of a gradient buffer that travel at once, so that the room for the peer's stays small."""


class TwoWay(OnV):
    """Stages of two copies, whose losses are on the pipeline's first and last rank."""

    pipes = 2

    def seen(self, chunk: Any) -> AbstractContextManager[None]:
        """Let Megatron take this process for the rank that has this chunk's stage in the pipe down."""
        return seen_as(get_attr_wrapped_model(chunk, "pg_collection").pp.rank())

    def groups_to_finalize(self, groups: Any, chunks: list[Any]) -> Any:
        """Return Megatron's own groups: the last rank knows the tokens of both pipes by then."""
        return groups

    def first_micro(self, chunk: int, micros: int) -> int:
        """Return 0 down the ranks, and the first of the second half up them."""
        return chunk * (micros // self.pipes)

    def feed(self, iterators: list[Any], chunks: list[Any], micros: int) -> list[Any]:
        """Return an iterator for each chunk: the first half of the microbatches goes down, the second up.

        Raises RuntimeError for a model that `build_stages` did not build, ValueError for an odd number of microbatches.
        """
        if len(chunks) != self.pipes:
            raise CannotRun(
                "a schedule with two copies of the model needs the model of a config's builder, and this script hands "
                "a model provider to pretrain(); hand it a model config, or take zb-v"
            )
        if micros % 2:
            raise Refused(f"half of the microbatches go down the ranks and half up, got {micros}; take {micros + 1}")
        (iterator,) = iterators
        if iterator is None:
            return [None, None]
        # the two chunks come to their microbatches in an order of their own
        batches = [next(iterator) for _ in range(micros)]
        return [iter(batches[: micros // 2]), iter(batches[micros // 2 :])]

    def add_tokens(self, tokens: Tensor, group: Any) -> None:
        """Add up the tokens of both pipes, which their last stages have counted."""
        tokens.copy_(GroupFabric(group).all_gather(tokens.view(1)).sum())

    def add_gradients(self, chunks: list[Any], group: Any, whole: bool) -> None:
        """Give both copies of each stage the sum of their gradients; all ranks of the pipeline come to this together.

        Both are added by the same sum of two terms, so that they stay equal bit for bit. At the ends of the pipeline a
        tied embedding is in both chunks, and gets the sum of the two sums.

        whole: True if data-parallel ranks hold all of the reduced gradients in spite of a distributed optimizer
        """
        fabric, peer = GroupFabric(group), _peer(group)
        in_order = list(_by_stage(chunks, group))
        for reduced in (part for chunk in in_order for part in _reduced(chunk, whole)):
            for ours in reduced.split(PIECE):
                theirs = torch.empty_like(ours)
                fabric.exchange([(ours, peer)], [(theirs, peer)]).wait()
                ours.add_(theirs)
        v_placement.add_up_tied(in_order)

    def to_last_rank(self, store: list[Any], group: Any, micros: int | None) -> list[Any]:
        """Send what the last stage of the pipe up left behind to the pipeline's last rank, behind its own."""
        found = super().to_last_rank(store, group, micros)
        return store + found if group.rank() == group.size() - 1 else found


def build_stages(
    old: Callable[..., Any], settings: Settings, build: Callable[..., Any], groups: Any, vp_size: int | None, *args: Any
) -> Any:
    """Build this rank's stages of both copies, with the same weights as on its peer; or the stages of one copy."""
    if not settings.pipeline.two_copies:
        return v_placement.build_stages(old, settings, build, groups, vp_size, *args)
    mine = copy.copy(groups)
    mine.pp = backwards(groups.pp)
    down = old(build, groups, vp_size, *args)
    with seen_as(mine.pp.rank()):
        up = old(build, mine, vp_size, *args)
    chunks = [*down, *up]
    start_equal(chunks, groups.pp)
    for parameter in chunks[1].parameters():
        # so Megatron marks a weight of which another rank has the one that counts in norms
        parameter.shared = True
    save_as_replica(chunks[1])
    return chunks


def _peer(group: Any) -> int:
    return int(group.size() - 1 - group.rank())


def _by_stage(chunks: list[Any], group: Any) -> Iterator[Any]:
    """Yield the chunk down the ranks and the one up them, the earlier stage first: the peer has them in this order."""
    yield from chunks if group.rank() < _peer(group) else reversed(chunks)


def _reduced(chunk: Any, whole: bool) -> Iterator[Tensor]:
    """Yield the gradients of a chunk that this rank holds reduced: all, or with a distributed optimizer its shards.

    The peer's are the same parameters: each chunk has one bucket, and a tied embedding one of its own.
    """
    for buffers, groups in (
        (chunk.buffers, chunk.bucket_groups),
        (chunk.expert_parallel_buffers, chunk.expert_parallel_bucket_groups),
    ):
        for buffer in buffers:
            if whole or not chunk.ddp_config.use_distributed_optimizer:
                yield buffer.grad_data
                continue
            shards = groups[0].intra_distributed_optimizer_instance_size
            for bucket in buffer.buckets:
                yield shard_buffer(bucket.grad_data, shards)[groups[0].intra_distributed_optimizer_instance_rank]


def start_equal(chunks: list[Any], group: Any) -> None:
    """Copy the weights of the pipe down to the pipe up; each rank of Megatron's draws its own."""
    wire, peer, device = Wire(group), _peer(group), torch.cuda.current_device()
    for chunk in _by_stage(chunks, group):
        for parameter in chunk.parameters():
            value = parameter.detach().to(device).contiguous()
            if chunk is chunks[0]:
                wire.send(value, peer).wait()
            else:
                wire.receive(value, peer).wait()
                with torch.no_grad():
                    parameter.copy_(value)


def save_as_replica(module: Any) -> None:
    """Let a chunk's part of a checkpoint be a replica of what its peer saves."""
    stock = module.sharded_state_dict

    def of_a_copy(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        for part in nested_values(found):
            if isinstance(part, ShardedBase):
                number = part.replica_id
                first, *rest = number if isinstance(number, tuple) else (number,)
                part.replica_id = (first + 1, *rest)
        return found

    module.sharded_state_dict = of_a_copy
