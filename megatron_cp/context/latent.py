"""Attention over the latent of multi-latent attention, which travels between ranks in the place of keys and values."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from megatron_cp.context import keep
from megatron_cp.context.agreement import refused_by_all, wants_gradients
from megatron_cp.context.algorithms.latent import Widths
from megatron_cp.context.checks import check_latent
from megatron_cp.context.documents import Documents
from megatron_cp.context.function import run_kept, run_latent
from megatron_cp.context.inputs import as_number, as_sink
from megatron_cp.context.packing import with_dim
from megatron_cp.context.plan import Plan, check_plan
from megatron_cp.context.prepare import documents_of, host_waits, prepare
from megatron_cp.context.traffic import TrafficFormula
from megatron_cp.errors import Refused

LATENT_TRAFFIC = TrafficFormula(full="(p-1)U", causal="3/4 of it", backward="2(p-1)U")
"""Elements that a rank sends on the head-tail layout, where U = s b w: sizes of one KV head that is w wide."""


def attend_latent(
    q: Float[Tensor, "s b h d"],
    latent: Float[Tensor, "s b w"],
    up: Float[Tensor, "h e r"],
    plan: Plan,
    *,
    sink: Float[Tensor, "*b h"] | float | None = None,
    documents: Documents | Tensor | Sequence[int] | None = None,
    agreed: bool = False,
) -> Float[Tensor, "s b h dv"]:
    """Attend this rank's queries to keys and values that `up` expands from the latents of the whole sequence.

    A token's latent has r compressed numbers and, behind them, the p rotary ones of its keys, already rotated: w = r +
    p. A row of `up` makes one number of a head from the compressed ones: first the d - p that stand before the rotary
    ones in a key, then the dv of the value: e = d - p + dv. Differentiable in all three; the gradient of `up` is this
    rank's part: the ranks of the plan share the weight, whose gradient is the sum of their parts.

    Each rank sends r + p numbers for a token, in place of h (d + dv), and expands what it sees block by block, in the
    backward pass again. `sink`, `documents` and `agreed` are those of `attend`, as is what all ranks must have in
    common.

    Raises ValueError on every rank for tensors that do not fit each other, for a backend that is no plain ring, and for
    chunks, ALiBi and dropout.
    """
    check_plan(plan)
    number = as_number(sink)
    with refused_by_all(plan, q, latent, up, agreed=agreed and host_waits(q)):
        _check(q, latent, up, plan)
        logits, packed = as_sink(sink, q), documents_of(documents, q)
    compressed = latent.unsqueeze(2)
    if kept := keep.take():
        return run_kept(q, compressed, up, kept, logits)
    # keys and values as they would be, to read sizes from
    k, v = q, with_dim(q, Widths.of(q, compressed, up).value)
    gradients = wants_gradients(q, latent, up, logits)
    others = (f"latent={tuple(latent.shape[2:])}", f"up={tuple(up.shape)}")
    settled = prepare(
        q, k, v, plan, packed, agreed=agreed, gradients=gradients, sink=logits, number=number, others=others
    )
    return run_latent(q, compressed, up, settled, logits, packed)


def _check(q: object, latent: object, up: object, plan: Plan) -> None:
    """Raise Refused for what the loop over latents cannot do."""
    for name, x, dims in (("q", q, "s b h d"), ("latent", latent, "s b w"), ("up", up, "h e r")):
        if not isinstance(x, Tensor) or x.ndim != len(dims.split()) or not x.numel():
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise Refused(f"{name} must be a tensor {dims} with elements, got {got}")
    assert isinstance(q, Tensor), "checked above"
    assert isinstance(latent, Tensor), "checked above"
    assert isinstance(up, Tensor), "checked above"
    if q.shape[:2] != latent.shape[:2] or q.shape[2] != up.shape[0]:
        raise Refused(
            "q [s b h d] and latent [s b w] must agree in tokens and batch, q and up [h e r] in heads, got "
            f"{tuple(q.shape)}, {tuple(latent.shape)} and {tuple(up.shape)}"
        )
    rotary = latent.shape[2] - up.shape[2]
    if not 0 <= rotary <= q.shape[3] or up.shape[1] <= q.shape[3] - rotary:
        raise Refused(
            f"a latent of w = {latent.shape[2]} numbers is r = {up.shape[2]} that up expands and w - r that end a key "
            f"of {q.shape[3]}, and up makes the other {q.shape[3] - rotary} of a key and then its value, got "
            f"e = {up.shape[1]} numbers of a head"
        )
    if not q.dtype == latent.dtype == up.dtype or not q.device == latent.device == up.device:
        raise Refused(
            f"q, latent and up must have one dtype and one device, got {q.dtype}, {latent.dtype} and {up.dtype} on "
            f"{q.device}, {latent.device} and {up.device}"
        )
    check_latent(plan.backend)
    asked = {"chunks": plan.chunks is not None, "alibi": plan.alibi is not None, "dropout": plan.dropout > 0}
    if refused := [name for name, given in asked.items() if given]:
        raise Refused(f"attention over a latent takes no {' and no '.join(refused)}; leave it out of the plan")
