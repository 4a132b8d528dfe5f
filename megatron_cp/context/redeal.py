"""Multimodal sequences: frames are encoded where they are dealt to, and tokens go to the ranks that attend with them.

Multimodal sequence parallelism of LongVILA (Chen et al. 2024, arXiv:2408.10188). Embeddings of frames, and tokens with
all that belongs to them, go from the ranks that have them to those that attend with them in one all-to-all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from megatron_cp.comm import Fabric, values_of_all, word_of
from megatron_cp.context.agreement import agree, refused_by_all
from megatron_cp.context.documents import Documents
from megatron_cp.context.frames import (
    FrameDeal,
    FramePlace,
    UnevenParts,
    check_frames,
    check_held,
    check_steps,
    in_rows,
    parts_of,
    shares,
    tokens_of,
)
from megatron_cp.context.function import differentiable_once, refuse_transforms
from megatron_cp.context.inputs import check_dense
from megatron_cp.context.layouts import Layout, PlannedLayout, layout, length
from megatron_cp.context.plan import Plan, check_plan
from megatron_cp.errors import Refused, shown


def deal_frames(
    plan: Plan,
    tokens: Sequence[int],
    places: Sequence[tuple[int, ...]],
    *,
    seq: int,
    batch: int = 1,
    patches: Sequence[int] | None = None,
    most: int | None = None,
    documents: Documents | None = None,
) -> FrameDeal:
    """Deal the frames of a microbatch to the ranks of a plan for the encoder; communicates nothing.

    A frame is what the encoder takes as a whole: an image, a tile of one, or the pictures of a video that it joins.

    tokens:    embeddings that the encoder makes of each frame
    places:    (frame, position of its first embedding, row of the batch, 0 if left out), in any order; a frame that
               appears several times is encoded once
    seq:       tokens of each whole sequence, embeddings of frames included
    patches:   the encoder's work for each frame, which ranks then share evenly; None: they share the number of frames
    most:      patches that a rank takes at most, frames where no patches are given
    documents: of a packed sequence whose batch is cut by them (`Documents.cut_by`)
    The frames that this rank encodes are `mine` of what is returned, in that order; fewer frames than ranks, and none,
    are as good. Raises ValueError for frames that no rank can take: outside of the sequence, over each other, without a
    place, above `most`; and for a length that the plan's layout does not divide.
    """
    check_plan(plan)
    lengths = _whole(tokens, "tokens", "frame")
    work = None if patches is None else _whole(patches, "patches", "frame")
    if work is not None and len(work) != len(lengths):
        raise Refused(f"patches must be one number for each of {len(lengths)} frames, got {len(work)}")
    for name, value in (("seq", seq), ("batch", batch), *([] if most is None else [("most", most)])):
        _check_count(value, name)
    found = tuple(_place(place) for place in places)
    check_frames(lengths, found, seq, batch)
    return FrameDeal(
        rank=plan.cp.rank,
        tokens=lengths,
        by_rank=shares(len(lengths), plan.cp.size, work, most),
        places=found,
        layout=_layout(plan, seq, documents),
        batch=batch,
    )


def find_frames(ids: Shaped[Tensor, "b S"], placeholder: int, tokens: Sequence[int]) -> list[FramePlace]:
    """Return the places of frames in token ids of whole sequences, which hold `placeholder` for each embedding.

    Frames stand there in order, row by row. Reads the ids, for which a GPU's host waits. Raises ValueError when there
    are more or fewer placeholders than embeddings, and for a frame that is cut in two.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise Refused(f"ids must be token ids [b S], got {tuple(ids.shape) if isinstance(ids, Tensor) else shown(ids)}")
    lengths = _whole(tokens, "tokens", "frame")
    found: list[tuple[int, int]] = [(row, at) for row, at in (ids == placeholder).nonzero().tolist()]
    if len(found) != sum(lengths):
        raise Refused(
            f"{len(lengths)} frames have {sum(lengths)} embeddings, and the ids {len(found)} placeholders of "
            f"{placeholder}; repeat the placeholder for each embedding"
        )
    places, first = [], 0
    for frame, count in enumerate(lengths):
        (row, start), last = found[first], found[first + count - 1]
        if last != (row, start + count - 1):
            raise Refused(
                f"frame {frame} of {count} embeddings is cut in two behind position {start} of row {row}: no rank can "
                "take it; repeat the placeholder for all of them in one place"
            )
        places.append(FramePlace(frame, start, row))
        first += count
    return places


@torch.compiler.disable(reason="the exchange has counts of its own in every microbatch")
def place_frames(
    encoded: Float[Tensor, "n w"], text: Float[Tensor, "s b w"], deal: FrameDeal, plan: Plan
) -> Float[Tensor, "s b w"]:
    """Put embeddings of frames at their places between those of text; differentiable. All ranks call it together.

    encoded: those of this rank's frames `deal.mine`, one behind the other; [0 w] on a rank without frames
    text:    embeddings of this rank's tokens; at the places of frames they may be anything, and get no gradient
    Sends each embedding to the ranks that hold its places, and its gradient back, in one all-to-all each way: bytes of
    `deal.sent`, and of `deal.received` backward. A frame with several places has the sum of their gradients, made in
    float32 and rounded once. The encoder's weights are shared by the ranks of the plan: the gradients that a rank has
    for them are those of its frames, and are summed over the ranks as those of any other weight. A rank without frames
    that passes `encoder(blank)[:0]` has zeros for all of them, which DDP waits for.

    Raises ValueError on every rank when embeddings do not fit the deal, and when deals, widths, dtypes or plans differ
    between ranks; nothing but the comparison is sent before.
    """
    check_plan(plan)
    with refused_by_all(plan, text):
        refuse_transforms("the exchange of frames")
        _check_embeddings(encoded, text, deal, plan)
    agree(plan, text, gradients=False, choices=(deal.term,))
    parts = deal.parts(plan.cp.rank)
    uses = _rows(deal.brought, text.device)
    ways = _Ways.of(parts, text.device)
    (rows,) = _redealt([encoded], plan.cp, ways._replace(leaving=uses[ways.leaving], uses=deal.uses))
    # of sequence by sequence, b s -> s b
    s, b, w = text.shape
    places = ways.arriving % s * b + ways.arriving // s
    return text.reshape(s * b, w).index_copy(0, places, rows).view(s, b, w)


def frame_tokens(deal: FrameDeal, device: torch.device | str | None = None) -> Bool[Tensor, "s b"]:
    """Return which of this rank's tokens are those of frames; communicates nothing."""
    parts = deal.parts(deal.rank)
    marks = torch.zeros(deal.batch, length(deal.layout[deal.rank]), dtype=torch.bool, device=device)
    marks.view(-1)[_rows(parts.arriving, marks.device)] = True
    return marks.T.contiguous()


@torch.compiler.disable(reason="the exchange has counts of its own in every microbatch")
def redeal(
    tensors: Sequence[Shaped[Tensor, "n ..."]],
    held: Sequence[Sequence[range]],
    plan: Plan,
    *,
    batch: int = 1,
    documents: Documents | None = None,
) -> list[Shaped[Tensor, "s b ..."]]:
    """Bring tokens from the ranks that hold them, unlike numbers of them, to those that attend with them.

    tensors: of this rank's tokens, in the order of its runs: embeddings, labels, masks, segment ids, positions, of any
             dtypes and widths; each is returned as [s b ...]
    held:    the places of each rank's tokens, as ranges: position + row * S, in a batch whose sequences have S tokens;
             each place of the batch, pads too, is held by one rank
    All travel in one all-to-all; those with gradients bring these back in another. Each token is used once, so that
    gradients come back as they are. Where every rank has the whole sequence, `shard` cuts it without a message.

    Raises ValueError on every rank when places are held twice or not at all, when tensors do not fit them, and when
    places, widths, dtypes or plans differ between ranks; nothing but the comparison is sent before.
    """
    check_plan(plan)
    probes = [x.new_empty((0, *x.shape[1:])) for x in tensors if isinstance(x, Tensor) and x.ndim]
    with refused_by_all(plan, *probes):
        refuse_transforms("the exchange of tokens")
        _check_count(batch, "batch")
        places = PlannedLayout(check_held(held, plan.cp.size, batch))
        own = _layout(plan, tokens_of(places) // batch, documents)
        check_steps(places, own)
        _check_tokens(tensors, length(places[plan.cp.rank]))
    agree(plan, *probes, gradients=False, choices=(f"held={word_of(repr(places))}", f"batch={batch}"))
    ways = _Ways.of(parts_of(places, in_rows(own, batch), plan.cp.rank), tensors[0].device)
    order = torch.empty_like(ways.arriving)
    order[ways.arriving] = torch.arange(len(order), device=order.device)
    # sequence by sequence, (b s) ... -> s b ...
    return [
        rows.index_select(0, order).unflatten(0, (batch, -1)).transpose(0, 1).contiguous()
        for rows in _redealt(tensors, plan.cp, ways)
    ]


class _Ways(NamedTuple):
    """The rows of an exchange: counts for each rank, indices of rows that leave, and places of those that arrive.

    uses: times that a row leaves at most
    """

    sends: tuple[int, ...]
    recvs: tuple[int, ...]
    leaving: Tensor
    arriving: Tensor
    uses: int = 1

    @classmethod
    def of(cls, parts: UnevenParts, device: torch.device) -> "_Ways":
        return cls(parts.sends, parts.recvs, _rows(parts.leaving, device), _rows(parts.arriving, device))


def _redealt(tensors: Sequence[Tensor], fabric: Fabric, ways: _Ways) -> Sequence[Tensor]:
    """Return the rows that arrive of each tensor, in order of the ranks that they come from; differentiable.

    A gradient that one rank wants is sent by all.
    """
    device, wants = tensors[0].device, [int(torch.is_grad_enabled() and x.requires_grad) for x in tensors]
    if fabric.size > 1:
        wants = [max(column) for column in zip(*values_of_all(fabric, device, wants), strict=True)]
    given = [
        x.detach().requires_grad_() if want and not x.requires_grad else x
        for x, want in zip(tensors, wants, strict=True)
    ]
    made: Sequence[Tensor] = _Redeal.apply(fabric, ways, tuple(wants), *given)
    return made


class _Redeal(torch.autograd.Function):
    """One all-to-all forward, and one backward, with all tensors in it."""

    @staticmethod
    def forward(ctx: Any, fabric: Fabric, ways: _Ways, wants: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.fabric, ctx.counts, ctx.wants = fabric, (ways.recvs, ways.sends, len(tensors[0]), ways.uses), wants
        ctx.save_for_backward(ways.leaving)
        rows = _exchanged([x.index_select(0, ways.leaving) for x in tensors], fabric, ways.sends, ways.recvs)
        ctx.mark_non_differentiable(*[x for x, want in zip(rows, wants, strict=True) if not want])
        return tuple(rows)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (leaving,), (sends, recvs, count, uses) = ctx.saved_tensors, ctx.counts
        wanted = [grad for grad, want in zip(grads, ctx.wants, strict=True) if want]
        rows = iter(_exchanged(wanted, ctx.fabric, sends, recvs))
        return None, None, None, *(_summed(next(rows), leaving, uses, count) if want else None for want in ctx.wants)


def _exchanged(tensors: Sequence[Tensor], fabric: Fabric, sends: Sequence[int], recvs: Sequence[int]) -> list[Tensor]:
    """Exchange the rows of all tensors, which are as many, in one all-to-all."""
    if len(tensors) == 1:
        return [fabric.all_to_all(tensors[0].contiguous(), sends, recvs)]
    # n ... -> n bytes
    flat = [x.reshape(len(x), x.shape[1:].numel()).contiguous().view(torch.uint8) for x in tensors]
    arrived = fabric.all_to_all(torch.cat(flat, 1), sends, recvs).split([x.shape[1] for x in flat], 1)
    return [
        part.contiguous().view(x.dtype).view(len(part), *x.shape[1:]) for part, x in zip(arrived, tensors, strict=True)
    ]


def _summed(rows: Tensor, index: Tensor, uses: int, count: int) -> Tensor:
    """Return the sum of the rows of each index, in a fixed order: in float32 and rounded once."""
    if uses == 1:
        return rows.new_zeros((count, *rows.shape[1:])).index_copy_(0, index, rows)
    total = rows.new_zeros((count, *rows.shape[1:]), dtype=torch.promote_types(rows.dtype, torch.float32))
    nth = _nth_use(index)
    for number in range(uses):
        # no row twice in one addition
        part = (nth == number).nonzero().squeeze(1)
        total[index[part]] += rows[part]
    return total.to(rows.dtype)


def _nth_use(index: Tensor) -> Tensor:
    """Return for each entry how many entries before it are equal."""
    ordered, order = index.sort(stable=True)
    numbers, repeated = torch.arange(len(index), device=index.device), torch.zeros_like(index, dtype=torch.bool)
    repeated[1:] = ordered[1:] == ordered[:-1]
    nth = torch.empty_like(index)
    nth[order] = numbers - numbers.masked_fill(repeated, 0).cummax(0).values
    return nth


def _rows(stretches: Sequence[slice], device: torch.device) -> Tensor:
    """Return the indices of stretches of rows, one behind the other."""
    parts = [torch.arange(part.start, part.stop, part.step or 1) for part in stretches]
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)).to(device, non_blocking=True)


def _layout(plan: Plan, seq: int, documents: Documents | None) -> Layout:
    if documents is not None and documents.tokens != seq:
        raise Refused(
            f"documents of {documents.tokens} tokens do not fill a sequence of {seq}; pads are one more document"
        )
    if documents is not None and documents.layout is not None:
        return documents.layout
    return layout(plan.layout, seq, plan.cp.size, plan.stripe)


def _check_count(value: object, name: str) -> None:
    if type(value) is not int or value < 1:
        raise Refused(f"{name} must be a whole number of 1 or more, got {shown(value)}")


def _check_embeddings(encoded: object, text: object, deal: FrameDeal, plan: Plan) -> None:
    """Raise Refused unless embeddings of frames and of text fit each other and the deal."""
    for name, x, dims in (("encoded", encoded, "n w"), ("text", text, "s b w")):
        if not isinstance(x, Tensor) or x.ndim != len(dims.split()):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise Refused(f"{name} must be a tensor {dims}, got {got}")
        check_dense(name, x, dims)
    assert isinstance(encoded, Tensor), "checked above"
    assert isinstance(text, Tensor), "checked above"
    if (len(deal.by_rank), deal.rank) != (plan.cp.size, plan.cp.rank):
        raise Refused(
            f"frames were dealt to rank {deal.rank} of {len(deal.by_rank)}, and the plan is of rank {plan.cp.rank} of "
            f"{plan.cp.size}; deal them by this plan"
        )
    if encoded.shape[0] != deal.rows:
        raise Refused(
            f"encoded must hold the {deal.rows} embeddings of this rank's {len(deal.mine)} frames, got "
            f"{encoded.shape[0]}; encode the frames `deal.mine`, in this order"
        )
    tokens = length(deal.layout[deal.rank])
    if text.shape[:2] != (tokens, deal.batch):
        raise Refused(
            f"text must hold this rank's {tokens} tokens of {deal.batch} sequences (s b w), got {tuple(text.shape)}"
        )
    if encoded.shape[1] != text.shape[2] or encoded.dtype != text.dtype or encoded.device != text.device:
        raise Refused(
            "embeddings of frames and of text must have one width, dtype and device, got "
            f"{encoded.shape[1]} {encoded.dtype} on {encoded.device} and {text.shape[2]} {text.dtype} on {text.device}"
        )


def _check_tokens(tensors: Sequence[object], tokens: int) -> None:
    """Raise Refused unless each tensor has this rank's tokens first."""
    if not tensors:
        raise Refused("tensors must hold one tensor or more, got none; leave the call out")
    for number, x in enumerate(tensors):
        if not isinstance(x, Tensor) or not x.ndim or len(x) != tokens:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise Refused(f"tensor {number} must have the {tokens} tokens that this rank holds first, got {got}")
        check_dense(f"tensor {number}", x, "of any dims")
    if len(devices := {x.device for x in tensors if isinstance(x, Tensor)}) > 1:
        raise Refused(f"tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _whole(values: Sequence[int], name: str, of: str) -> tuple[int, ...]:
    found = tuple(values)
    wrong = next((value for value in found if type(value) is not int or value < 1), None)
    if wrong is not None:
        raise Refused(f"{name} must be a whole number of 1 or more for each {of}, got {shown(wrong)}")
    return found


def _place(place: Sequence[int]) -> FramePlace:
    if not isinstance(place, Sequence) or len(place) not in (2, 3) or not all(type(part) is int for part in place):
        raise Refused(f"a place is (frame, position) or (frame, position, row) in whole numbers, got {shown(place)}")
    return FramePlace(*place)
