"""The torch kernel hands Megatron's layout to the op and its results back as views."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cp.kernels import choose

VIEWS = {"aten::permute", "aten::slice.Tensor", "aten::alias"}
FORWARD = {"aten::_scaled_dot_product_flash_attention_for_cpu"}
BACKWARD = {"aten::_scaled_dot_product_flash_attention_for_cpu_backward"}
# of the size of lse, a head dim smaller than the tensors
LSE_ONLY = {"aten::eq.Scalar", "aten::masked_fill.Scalar"}
TOKENS, BATCH, HEADS, GROUPS, DIM = 256, 2, 8, 2, 64


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernel():
    return choose("torch", device="cpu", dtype="float32", head_dim=DIM)[0]


def tensors(layout):
    shapes = [(TOKENS, BATCH, n, DIM) for n in (HEADS, HEADS, GROUPS, GROUPS)]
    if layout == "s b h d":
        return [torch.randn(shape) for shape in shapes]
    return [torch.randn(b, h, s, d).permute(2, 0, 1, 3) for s, b, h, d in shapes]


def test_around_the_op_there_are_only_views(kernel):
    dout, q, k, v = tensors("s b h d")
    with Calls() as forward:
        out, lse = kernel.forward(q, k, v, scale=0.1, causal=True)
    assert forward.names <= FORWARD | VIEWS
    with Calls() as backward:
        kernel.backward(dout, q, k, v, out, lse, scale=0.1, causal=True)
    assert backward.names <= BACKWARD | VIEWS | LSE_ONLY


def allocated(call):
    """Bytes that a call allocates, also inside of an op."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in run.key_averages())


def test_the_op_copies_megatrons_layout_no_more_than_its_own(kernel):
    used = {}
    for layout in ("s b h d", "b h s d"):
        dout, q, k, v = tensors(layout)
        out, lse = kernel.forward(q, k, v, scale=0.1, causal=True)
        used[layout] = (
            allocated(lambda q=q, k=k, v=v: kernel.forward(q, k, v, scale=0.1, causal=True)),
            allocated(
                lambda args=(dout, q, k, v, out, lse): kernel.backward(*args, scale=0.1, causal=True),
            ),
        )
    assert used["s b h d"] == used["b h s d"]


def test_results_come_back_in_the_layout_of_the_inputs_owner(kernel):
    dout, q, k, v = tensors("s b h d")
    out, lse = kernel.forward(q, k, v, scale=0.1, causal=True)
    grads = kernel.backward(dout, q, k, v, out, lse, scale=0.1, causal=True)
    assert [x.shape for x in (out, *grads)] == [q.shape, q.shape, k.shape, v.shape]
    assert lse.shape == q.shape[:3]
    assert {x.stride(3) for x in (out, *grads)} == {1}
