"""Quantised messages of Megatron's distributed optimizer: gradients as they are reduced, and weights as gathered.

Each bucket of a buffer is marked with its parts once the buffer is built; those of experts are not, and travel as ever.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_cp.comm import Done, GroupFabric, Handle
from megatron_cp.megatron.run import Settings, say
from megatron_cp.replicas import INT8, QUANTISATIONS, Quantisation, two_hops
from megatron_cp.replicas.parts import ParameterSpan, RankPart, parts_of
from megatron_cp.replicas.two_hops import Hops, Left, all_gather, hops_of, nothing_left, reduce_scatter

BUCKET = "megatron_cp_bucket"
"""Attribute of a bucket's gradients that holds its Bucket."""

EXACT = ("embedding", "output_layer", "router")
"""Words in the names of matrices that are not quantised; vectors, such as norms and biases, never are."""


class Bucket(NamedTuple):
    """How a bucket of a replica travels.

    gradients: None where Megatron reduces them as ever
    weights:   None where it gathers them as ever
    left:      what the last reduction left over, where it is kept
    """

    parts: tuple[RankPart, ...]
    hops: Hops
    gradients: Quantisation | None
    weights: Quantisation | None
    left: Left | None


def mark_buckets(old: Callable[..., None], settings: Settings, buffer: Any, *args: Any, **kwargs: Any) -> None:
    """Build a buffer of a replica's weights and gradients, and mark its buckets."""
    old(buffer, *args, **kwargs)
    flags = settings.quantised
    if not flags.asked or not all(getattr(parameter, "allreduce", True) for parameter in buffer.params):
        return
    given = inspect.signature(old).bind(buffer, *args, **kwargs).arguments
    gradients = flags.of_gradients
    # where weights are float32, the optimizer has no others beside
    weights = QUANTISATIONS.get(INT8) if flags.weights and buffer.param_dtype == torch.bfloat16 else None
    group = buffer.data_parallel_group
    hops = connect(group, flags.ranks_per_node)
    for bucket in buffer.buckets:
        grads = bucket.grad_data
        parts = parts_of(list(_spans(bucket, given["param_to_name"])), grads.numel(), group.size())
        left = nothing_left(parts, hops, gradients, grads.device) if gradients and gradients.keeps else None
        # Megatron hands on this very tensor, and nothing else of the bucket
        setattr(grads, BUCKET, Bucket(parts, hops, gradients, weights, left))


def is_exact(name: str, parameter: Tensor) -> bool:
    """Return True if elements of a parameter are not quantised, by its name and number of dims."""
    return parameter.dim() < 2 or any(word in EXACT for word in name.split("."))


def _spans(bucket: Any, names: dict[Any, str]) -> Iterator[ParameterSpan]:
    for parameter, (start, stop) in sorted(bucket.param_to_index.items(), key=lambda item: item[1]):
        yield ParameterSpan(start, stop, is_exact(names[parameter], parameter))


def _buckets_of(optimizer: Any) -> Iterator[Any]:
    """Yield the buckets of a distributed optimizer; one without parameters has none."""
    for buffer in getattr(optimizer, "buffers", ()):
        yield from buffer.buckets


def keeps_any(optimizer: Any) -> bool:
    """Return True if something is left over of the gradients of a distributed optimizer, on whichever rank."""
    marked = (getattr(each.grad_data, BUCKET, None) for each in _buckets_of(optimizer))
    return any(bucket is not None and bucket.left is not None for bucket in marked)


def collect_left(optimizer: Any) -> None:
    """Hand what is left over of each of an optimizer's shards to the rank that owns it; its ranks call it together."""
    for each in _buckets_of(optimizer):
        bucket: Bucket | None = getattr(each.grad_data, BUCKET, None)
        if bucket is not None and bucket.left is not None:
            assert bucket.gradients is not None
            two_hops.collect_left(bucket.left, each.grad_data.numel(), bucket.parts, bucket.hops, bucket.gradients)


def own_left(optimizer: Any) -> Iterator[Tensor | None]:
    """Yield what this rank has left over of each of its shards, in Megatron's order; None where nothing is kept."""
    for ranges, buffer in zip(optimizer.gbuf_ranges, optimizer.buffers, strict=True):
        for of_buckets in ranges.values():
            for of_bucket, each in zip(of_buckets, buffer.buckets, strict=True):
                kept = _own_left(getattr(each.grad_data, BUCKET, None))
                for where in of_bucket["param_map"].values():
                    shard = where["gbuf_world_in_bucket"]
                    yield kept.get((shard.start, shard.end))


def _own_left(bucket: Bucket | None) -> dict[tuple[int, int], Tensor]:
    """Return what this rank has left over of its part of a bucket, by its first and last element."""
    if bucket is None or bucket.left is None:
        return {}
    slices = bucket.parts[bucket.hops.own].coded
    views = two_hops.own_left(bucket.left, bucket.parts, bucket.hops)
    return {(each.start, each.stop): view for each, view in zip(slices, views, strict=True)}


# the replicas of a rank share one group
@lru_cache(2)
def connect(group: ProcessGroup, per_node: int | None) -> Hops:
    """Return the hops of a group of data-parallel and context-parallel ranks; all processes of the run call it at once.

    per_node: ranks of the whole run on a node; None for torchrun's LOCAL_WORLD_SIZE
    """
    whole = GroupFabric(group)
    nodes = whole.nodes if per_node is None else tuple(rank // per_node for rank in get_process_group_ranks(group))
    hops = hops_of(whole, nodes)
    for fabric in (hops.inside, hops.between):
        # messages of a few ranks of a new communicator would wait for those that have none
        fabric.all_gather(torch.zeros(1, device=torch.device(torch.cuda.current_device())))
        fabric.sent = 0
    say(f"gradients and weights are quantised over {hops.between.size} nodes of {hops.inside.size} ranks")
    return hops


def scatter_gradients(
    old: Callable[..., Any],
    output_tensor: Tensor,
    input_tensor: Tensor,
    op: Any,
    group: ProcessGroup,
    async_op: bool,
) -> Any:
    """Reduce the gradients of a bucket and put the sum of this rank's part, `output_tensor`, in its place in it."""
    bucket: Bucket | None = getattr(input_tensor, BUCKET, None)
    if bucket is None or bucket.gradients is None:
        return old(output_tensor, input_tensor, op, group, async_op)
    assert op == torch.distributed.ReduceOp.SUM
    quantisation = bucket.gradients
    handle = _beside(
        async_op and input_tensor.is_cuda,
        lambda: reduce_scatter(input_tensor, bucket.parts, bucket.hops, quantisation, bucket.left),
    )
    return handle if async_op else None


def gather_weights(old: Callable[..., None], group: Any, force_sync: bool = False) -> None:
    """Gather the weights of a group of buckets after the optimizer's step."""
    marked: list[tuple[Any, Any]] = [(each, getattr(each.grad_data, BUCKET, None)) for each in group.buckets]
    waits = force_sync and group.param_gather_handle is not None
    if waits or any(bucket is None or bucket.weights is None for _, bucket in marked):
        # Megatron also waits for a gather of ours
        old(group, force_sync)
        return
    assert group.param_gather_handle is None
    overlaps = group.ddp_config.overlap_param_gather

    def gather() -> None:
        for each, bucket in marked:
            all_gather(each.param_data, bucket.parts, bucket.hops, bucket.weights)

    on_gpu = all(each.param_data.is_cuda for each, _ in marked)
    handle = _beside(overlaps and not force_sync and on_gpu, gather)
    group.param_gather_handle = handle if overlaps and not force_sync else None
    if force_sync and overlaps:
        group._post_param_sync()
    group.param_gather_dispatched = True


class _Event:
    """Work on another stream of a GPU, which the current stream waits for."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def _beside(overlaps: bool, work: Callable[[], None]) -> Handle:
    """Do the work, on a stream of its own if it `overlaps` what follows on a GPU."""
    if not overlaps:
        work()
        return Done()
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        return _Event()


@lru_cache(1)
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
