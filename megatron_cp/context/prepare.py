"""Preparation of a call before its first message: agreement of all ranks, and the choice of backend `auto`."""

from torch import Tensor

from megatron_cp.context.agreement import agree
from megatron_cp.context.auto import settle
from megatron_cp.context.checks import check_sinks
from megatron_cp.context.inputs import check_inputs, check_sink
from megatron_cp.context.plan import Plan, Sizes


def prepare(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, agreed: bool, gradients: bool, sink: object = None) -> Plan:
    """Return the settled plan for such tensors; raises ValueError on every rank when they do not fit together.

    agreed:    the caller guarantees that ranks are equal; a GPU's host does not wait for the comparison
    gradients: a backward pass may follow
    """
    if not agreed or _device_type(q) == "cpu":
        agree(plan, q, k, v, *([] if sink is None else [sink]), gradients=gradients)
    check_inputs(q, k, v)
    if sink is not None:
        check_sink(sink, q)
    dtype = str(q.dtype).removeprefix("torch.")
    sizes = Sizes(q.shape[0] * plan.cp.size, q.shape[2], k.shape[2], q.shape[3], dtype, q.device.type)
    settled = settle(plan, sizes)
    if sink is not None:
        check_sinks(settled.backend)
    return settled


def _device_type(q: object) -> str:
    return q.device.type if isinstance(q, Tensor) else "cpu"
