"""Attention of one slice of a sequence, over the keys of the slices before it and its own, through any backend.

Slices go through a model one after the other, and their backward passes run in the reverse order. The keys of earlier
slices are whole blocks without a mask, which a ring of the ranks passes around as they were cut; this slice's own keys
go through the backend's loop. A backend that exchanges heads for tokens does so first, and keeps what has arrived.

    forward of slice 2     out, lse = merge(blocks of slice 0, blocks of slice 1, own loop)      keep K, V
    backward of slice 2    dK, dV of slices 0 and 1 are added up where they are kept; its own, with what later slices
                           have added, go on to the layers before

Packed documents bring the ends of each slice. A query sees the keys of earlier slices that are of its own document; the
samples of a microbatch, which are one stream in every slice, are told apart by their places in it.

Source: Seq1F1B, arXiv:2406.03488; TeraPipe, arXiv:2102.07988.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.context import keep
from megatron_cp.context.agreement import refused_by_all, wants_gradients
from megatron_cp.context.algorithms import ring
from megatron_cp.context.documents import Documents
from megatron_cp.context.function import (
    AttentionCall,
    call_for,
    differentiable_once,
    last_dim_contiguous,
    refuse_transforms,
    without_autocast,
)
from megatron_cp.context.heads import HeadExchange
from megatron_cp.context.inputs import check_inputs
from megatron_cp.context.layouts import Layout
from megatron_cp.context.loop import HeadParallel
from megatron_cp.context.masks import FULL, AnyMask, Mask, Piece, Pieces
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.plan import Plan, check_plan
from megatron_cp.context.prepare import host_waits, prepare
from megatron_cp.context.relayout import relayout
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import seen
from megatron_cp.errors import Refused, shown
from megatron_cp.kernels.protocol import PreparesBackward


@dataclass
class KeptSlice:
    """Keys and values of one slice, in the layout in which its loop ran, and the gradients that later slices add."""

    k: Tensor
    v: Tensor
    layout: Layout
    dk: Sum
    dv: Sum


@dataclass
class KeptKeys:
    """Keys and values of the slices of one sequence in one layer, those of this rank.

    tokens: where each slice starts and ends in the sequence, over all ranks; of several samples, one slice of all
            samples starts where that before it ends
    call:   of slice 0, what the calls of later slices must have in common with it
    """

    tokens: tuple[range, ...]
    slices: dict[int, KeptSlice] = field(default_factory=dict)
    call: tuple[object, ...] = ()


class Stretch(NamedTuple):
    """A stretch of a document inside one slice.

    document: sample and number of the document
    tokens:   positions among all tokens of the slices
    moved:    from a position in the sample to that one
    """

    document: tuple[int, int]
    tokens: range
    moved: int


class PackedSlice:
    """The documents of one slice.

    own:    those of the slice by themselves, from its first token on
    """

    def __init__(self, own: Documents, here: Sequence[Stretch], before: Sequence[Stretch]) -> None:
        self.own = own
        self._here, self._before = here, before
        self._masks: dict[Mask, Pieces] = {}

    def earlier(self, band: Mask) -> Pieces:
        """Return the mask of the slice's queries over the keys of earlier slices, the same object in every layer."""
        if band not in self._masks:
            keys: dict[tuple[int, int], list[Stretch]] = defaultdict(list)
            for each in self._before:
                keys[each.document].append(each)
            self._masks[band] = Pieces(
                Piece(queries.tokens, seen.tokens, _reach(band, queries.moved - seen.moved))
                for queries in self._here
                for seen in keys[queries.document]
            )
        return self._masks[band]


def _reach(band: Mask, apart: int) -> Mask:
    """Return the band over earlier keys, whose places are `apart` further from the queries' than their positions."""
    return FULL if band.left is None else Mask(band.left + apart, None)


class PackedSlices:
    """The documents of a microbatch, as far as its slices have come.

    tokens: where each slice starts and ends in a sample
    """

    def __init__(self, tokens: tuple[range, ...]) -> None:
        self.samples = 1
        self._tokens = tokens
        self._stretches: list[Stretch] = []
        self._open: dict[int, int] = defaultdict(int)

    def add(self, number: int, own: Documents) -> PackedSlice:
        """Return the documents of the next slice, whose samples lie one after the other.

        A sample whose first document is empty starts a document; any other goes on with that of the slice before.
        """
        tokens = self._tokens[number]
        self.samples = own.tokens // len(tokens)
        start, here = self.samples * tokens.start, list[Stretch]()
        for stretch, *_ in own.sets:
            sample, first = divmod(stretch.start, len(tokens))
            if bool(stretch) == bool(first):
                self._open[sample] += 1
            if stretch:
                moved = start + sample * len(tokens) - tokens.start
                placed = range(stretch.start + start, stretch.stop + start)
                here.append(Stretch((sample, self._open[sample]), placed, moved))
        made = PackedSlice(own, here, tuple(self._stretches))
        self._stretches += here
        return made


class SlicesInFlight:
    """The kept keys of all sequences that are in a rank's part of a model, and which slice runs now.

    tokens: where each slice starts and ends in its sequence, over all ranks
    calls:  attention calls so far
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens = tuple(range(*ends) for ends in pairwise(accumulate(lengths, initial=0)))
        self.calls = 0
        self._running: tuple[int, int, int] | None = None
        self._kept: dict[tuple[int, int], dict[int, KeptKeys]] = defaultdict(dict)
        self._packed: dict[tuple[int, int], PackedSlices] = {}

    @contextmanager
    def at(self, stage: int, micro: int) -> Iterator[None]:
        """Run a forward or a backward of a slice, which is microbatch `micro` of the pipeline's table."""
        self._running = (stage, *divmod(micro, len(self.tokens)))
        try:
            yield
        finally:
            self._running = None

    @property
    def offset(self) -> int:
        """Position of the first token of the slice that runs; 0 outside of one."""
        return self.tokens[self._running[2]].start if self._running else 0

    @property
    def length(self) -> int:
        """Tokens of the slice that runs, over all ranks; of the whole sequence outside of one."""
        return len(self.tokens[self._running[2]]) if self._running else self.tokens[-1].stop

    @property
    def samples(self) -> int:
        """Samples in the stream of packed documents that runs; 1 without documents."""
        packed = self._packed.get(self._running[:2]) if self._running else None
        return packed.samples if packed else 1

    def packed(self, own: Documents) -> PackedSlice:
        """Return the documents of the slice that runs, beside those of the slices before it."""
        assert self._running, "a slice runs"
        stage, sequence, number = self._running
        return self._packed.setdefault((stage, sequence), PackedSlices(self.tokens)).add(number, own)

    def of(self, layer: object) -> tuple[KeptKeys, int] | None:
        """Return the keys that a layer keeps of the sequence that runs, and the number of the slice."""
        if self._running is None:
            return None
        self.calls += 1
        stage, sequence, number = self._running
        places = tuple(range(self.samples * each.start, self.samples * each.stop) for each in self.tokens)
        return self._kept[stage, sequence].setdefault(id(layer), KeptKeys(places)), number

    def end(self, stage: int, micro: int, training: bool) -> None:
        """Drop what is kept of a sequence after its last pass: a backward of slice 0, without training a forward."""
        sequence, number = divmod(micro, len(self.tokens))
        if number == (0 if training else len(self.tokens) - 1):
            kept = self._kept.pop((stage, sequence), {})
            self._packed.pop((stage, sequence), None)
            assert not (training and any(keys.slices for keys in kept.values())), "keys of a slice without a backward"

    def finish(self) -> None:
        """End a step."""
        assert not self._kept, "a sequence is in flight at the end of a step"


@torch.compiler.disable(reason="attention of slices keeps keys between calls")
def attend_slice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    kept: KeptKeys,
    number: int,
    agreed: bool = False,
    documents: PackedSlice | None = None,
) -> Tensor:
    """Attend queries of slice `number` to the keys of all slices up to it: q [s b h d], k, v [s b g d] -> [s b h dv].

    With `documents` they see keys of their own document only.
    All ranks of the plan call it together, for slice after slice; `kept` belongs to one sequence and layer. A second
    forward of a slice, of a recomputation, gives the same result. Backward passes run from the last slice to the first.
    Raises ValueError for a plan that cuts work over time itself, for a mask that is not causal, and as `attend` does.
    """
    check_plan(plan)
    if again := keep.take():
        return _AttendSlice.apply(q, k, v, again.call, again)
    with refused_by_all(plan, q, k, v, agreed=agreed and host_waits(q)):
        refuse_transforms("attention of slices")
        check_inputs(q, k, v)
        call = (
            *(f"{name} s b h d = s {tuple(x.shape[1:])}" for name, x in zip("qkv", (q, k, v), strict=True)),
            q.dtype,
        )
        call = (*call, *plan.terms)
        _check_kept(kept, number, q.shape[0], plan.cp.size, call)
        check_slices(plan)
    own = None if documents is None else documents.own
    others = (f"slice={number} of {len(kept.tokens)}",)
    settled = prepare(
        q,
        k,
        v,
        plan,
        own,
        agreed=agreed,
        gradients=wants_gradients(q, k, v),
        others=others,
        tokens=kept.tokens[-1].stop,
    )
    # `auto` may have chosen it
    check_slices(settled)
    kept.call = call
    earlier = documents.earlier(plan.mask) if documents else plan.mask
    return _AttendSlice.apply(q, k, v, SliceCall(call_for(q, k, v, settled, own), earlier, kept, number), None)


def check_slices(plan: Plan) -> None:
    """Raise ValueError for a plan that cannot take slices of a sequence."""
    if plan.chunks is not None or plan.backend.capabilities.over_time:
        raise Refused(
            f"backend {plan.backend.name!r} in chunks cuts a sequence over time itself and takes no slices; take one "
            "without chunks, or leave the slices out"
        )
    if plan.alibi is not None:
        raise Refused("slices take no alibi; leave it out, or the slices")
    if plan.mask.right != 0:
        raise Refused("slices need a causal mask: keys of later slices are not there yet; leave the slices out")


def _check_kept(kept: KeptKeys, number: int, tokens: int, ranks: int, call: tuple[object, ...]) -> None:
    if type(number) is not int or not 0 <= number < len(kept.tokens):
        raise Refused(f"slices are numbered from 0 to {len(kept.tokens) - 1}, got {shown(number)}")
    if tokens * ranks != len(kept.tokens[number]):
        whole = len(kept.tokens[number])
        raise Refused(f"slice {number} has {whole} tokens over all ranks, got {tokens} on {ranks}")
    missing = next((earlier for earlier in range(number) if earlier not in kept.slices), None)
    if missing is not None:
        raise Refused(f"slice {number} needs the keys of slice {missing}, which are not kept; attend slice after slice")
    if number and call != kept.call:
        theirs, ours = next(pair for pair in zip(kept.call, call, strict=False) if pair[0] != pair[1])
        raise Refused(
            f"all slices of a sequence must be attended alike, got {theirs} in slice 0, {ours} in {number}; give all "
            "slices the same shapes, dtype and plan"
        )


class SliceCall(NamedTuple):
    """One attention of slice `number`, whose earlier keys are in `kept` and seen by the mask `earlier`."""

    call: AttentionCall
    earlier: AnyMask
    kept: KeptKeys
    number: int


class _AttendSlice(torch.autograd.Function):
    """The attention of one slice, between two re-layouts and, where heads are exchanged, two exchanges."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: SliceCall, again: keep.KeptCall | None) -> Tensor:
        out, saved = again.results((q, k, v)) if again else _forward_pass(q, k, v, *call)
        ctx.save_for_backward(*saved)
        ctx.call = call
        if not again:
            keep.keep(call, out, saved, (q, k, v))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (call, earlier, kept, number), (q, out, lse) = ctx.call, ctx.saved_tensors
        missing = next((each for each in range(number, -1, -1) if each not in kept.slices), None)
        if missing is not None:
            raise Refused(
                "backward passes run once each, from the last slice to the first, got that of slice "
                f"{number} after that of slice {missing}; keep the order, without retain_graph"
            )
        with without_autocast(dout.device):
            (dout,) = relayout([last_dim_contiguous(dout)], call.layout, call.task.layout, call.task.fabric)
            swap, task = _between_exchanges(call)
            dtype = dout.dtype
            if swap:
                (dout,) = swap.to_heads(dout)
            if isinstance(task.kernel, PreparesBackward):
                task = task.on(task.fabric, task.layout, task.kernel.for_backward())
            placed = _placed(task, kept.tokens[number], earlier)
            dq, dk, dv = _backward(dout, q, out, lse, call, task, placed, kept, number)
            grads = [dq.result(), dk.result(), dv.result()]
            if swap:
                shares = [swap.shares.q, swap.shares.kv, swap.shares.kv]
                grads = swap.to_tokens([grads[0], *(swap.partial(total.exact(), dtype) for total in (dk, dv))], shares)
            grads[0] = grads[0] if call.factor == 1 else grads[0] * call.factor
            grads = [grad.to(dtype) for grad in grads]
            return *relayout(grads, call.task.layout, call.layout, call.task.fabric), None, None


def _forward_pass(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, earlier: AnyMask, kept: KeptKeys, number: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return out, and q, out and lse as they are between the exchanges, for the backward pass."""
    with without_autocast(q.device):
        q, k, v = relayout([last_dim_contiguous(x) for x in (q, k, v)], call.layout, call.task.layout, call.task.fabric)
        q = q if call.factor == 1 else q * call.factor
        swap, task = _between_exchanges(call)
        if swap:
            q, k, v = swap.to_heads(q, k, v)
        placed = _placed(task, kept.tokens[number], earlier)
        out, saved = _forward(q, k, v, call, task, placed, kept, number)
        if swap:
            (out,) = swap.to_tokens([out], [swap.shares.q])
        (out,) = relayout([out], call.task.layout, call.layout, call.task.fabric)
        # what is saved must not change with the result
        out = out.clone() if out.untyped_storage()._cdata == saved.out.untyped_storage()._cdata else out
        return out, (saved.q, saved.out, saved.lse)


def _between_exchanges(call: AttentionCall) -> tuple[HeadExchange | None, Task]:
    if isinstance(call.loop, HeadParallel):
        return call.loop.split(call.task)
    return None, call.task


def _placed(task: Task, tokens: range, earlier: AnyMask) -> Task:
    """Return the task over keys of earlier slices, with the positions that the slice has in the whole sequence."""
    shifted = tuple(
        tuple(range(run.start + tokens.start, run.stop + tokens.start, run.step) for run in runs)
        for runs in task.layout
    )
    return replace(task, layout=shifted, mask=earlier)


def _route(task: Task, keys: Layout) -> Any:
    return ring.shorter(
        keys, tuple(tuple(seen(queries, of_owner, task.mask) for queries in task.layout) for of_owner in keys)
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, task: Task, placed: Task, kept: KeptKeys, number: int
) -> tuple[Tensor, Saved]:
    me, merge = task.fabric.rank, SoftmaxMerge(q, v.shape[3])
    # 1. whole blocks of earlier slices, around the ring
    for earlier in range(number):
        keys = kept.slices[earlier]
        way = _route(placed, keys.layout)
        for block in ring.circulating(Block(me, 0, keys.k, keys.v, keys.layout[me]), way, task.fabric):
            placed.attend(merge, q, block)
            del block
    # 2. this slice's own keys, by the backend's loop
    if task is call.task:
        _, saved = call.loop.forward(q, k, v, task)
        merge.add(slice(0, q.shape[0]), saved.out, saved.lse)
    else:
        ring.attend_around(merge, q, k, v, task)
    out, lse = merge.result()
    if number not in kept.slices:
        # views of a layer's larger output would keep all of it
        k, v = k.clone(), v.clone()
        kept.slices[number] = KeptSlice(k, v, placed.layout, Sum(k), Sum(v))
    return out, Saved(q, k, v, out, lse)


def _backward(
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    task: Task,
    placed: Task,
    kept: KeptKeys,
    number: int,
) -> tuple[Sum, Sum, Sum]:
    own, me = kept.slices.pop(number), task.fabric.rank
    saved, dq = Saved(q, own.k, own.v, out, lse), Sum(q)
    # 1. whole blocks of earlier slices: their gradients wait with them
    for earlier in range(number):
        keys = kept.slices[earlier]
        way, mine = _route(placed, keys.layout), Block(me, 0, keys.k, keys.v, keys.layout[me])
        returns = ring.GradientReturns(mine, keys.dk, keys.dv, way, task.fabric)
        for block in ring.circulating(mine, way, task.fabric):
            dk_block, dv_block = returns.sums(block)
            placed.attend_backward(dq, dk_block, dv_block, dout, saved, block)
            returns.start(block, dk_block, dv_block)
        returns.finish()
    # 2. its own keys, to whose gradients later slices have added theirs
    if isinstance(call.loop, HeadParallel):
        ring.attend_around_backward(dq, own.dk, own.dv, dout, saved, task)
    else:
        parts = call.loop.backward(dout, saved, task)
        for total, part in zip((dq, own.dk, own.dv), parts, strict=True):
            total.add(slice(0, part.shape[0]), part)
    return dq, own.dk, own.dv
