"""On a GPU every kernel equals the float64 reference computed on the same GPU."""

import pytest
import torch

from megatron_cp.kernels import choose
from megatron_cp.kernels.aten import CUDA_FLASH, cudnn, reproducible
from megatron_cp.kernels.fused import FusedKernel, Only
from megatron_cp.kernels.reference import ReferenceKernel
from tests.context.dense import problem

# Frobenius norm: the largest element of a rounding error is a matter of luck
BOUND = {"bfloat16": 1e-2, "float16": 2e-3}
SHAPES = [(64, 64), (96, 96), (100, 100), (128, 128), (96, 64)]


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def kernel_named(name, dtype):
    ops = {"flash": CUDA_FLASH, "reproducible": reproducible(CUDA_FLASH), "cudnn": cudnn()}
    if name in ops:
        return FusedKernel(name, Only(ops[name]))
    try:
        return choose(name, device="cuda", dtype=dtype, head_dim=128)[0]
    except RuntimeError as error:
        pytest.skip(str(error))


def inputs(queries, keys, heads, groups, dim, value_dim, dtype, device):
    """q, k, v, dout as slices of something larger."""
    q, kv = problem(queries, heads, groups, causal=True, dim=dim), problem(keys, heads, groups, causal=True, dim=dim)
    wide_q, wide_kv = (problem(n, heads, groups, causal=True, dim=value_dim, seed=1) for n in (queries, keys))
    tensors = (x.to(device, getattr(torch, dtype)) for x in (q.q, kv.k, wide_kv.v, wide_q.dout))
    return [torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in tensors]


def run(kernel, q, k, v, dout, causal):
    how = {"scale": q.shape[3] ** -0.5, "causal": causal}
    out, lse = kernel.forward(q, k, v, **how)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, **how)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(513, 513, True), (256, 256, True), (130, 385, False)])
@pytest.mark.parametrize(("dim", "value_dim"), SHAPES)
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", ["flash", "reproducible", "cudnn", "torch", "flash-attn"])
def test_kernel_equals_reference(device, name, dtype, groups, dim, value_dim, queries, keys, causal):
    task = inputs(queries, keys, 8, groups, dim, value_dim, dtype, device)
    found = run(kernel_named(name, dtype), *task, causal)
    expected = run(ReferenceKernel(), *(x.double() for x in task), causal)
    for what, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(ours, theirs) <= (1e-5 if what == "lse" else BOUND[dtype]), what


@pytest.mark.parametrize("name", ["flash", "cudnn", "torch", "flash-attn"])
def test_halves_of_the_keys_merge_to_the_whole(device, name):
    q, k, v, dout = inputs(256, 512, 8, 2, 64, 64, "bfloat16", device)
    kernel, how = kernel_named(name, "bfloat16"), {"scale": 0.125, "causal": False}
    halves = [slice(0, 200), slice(200, None)]
    parts = [kernel.forward(q, k[half], v[half], **how) for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in parts).to(q.dtype)
    (dq1, dk1, dv1), (dq2, dk2, dv2) = (kernel.backward(dout, q, k[h], v[h], out, lse, **how) for h in halves)
    found = out, lse, dq1.float() + dq2.float(), torch.cat([dk1, dk2]), torch.cat([dv1, dv2])
    expected = run(ReferenceKernel(), *(x.double() for x in (q, k, v, dout)), causal=False)
    for what, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(ours, theirs) <= BOUND["bfloat16"], what


@pytest.mark.parametrize("name", ["flash", "cudnn", "torch", "flash-attn"])
def test_rows_without_keys_take_no_part_in_backward(device, name):
    q, k, v, dout = inputs(128, 128, 4, 2, 64, 64, "bfloat16", device)
    kernel, how = kernel_named(name, "bfloat16"), {"scale": 0.125, "causal": False}
    out, lse = (x.clone() for x in kernel.forward(q, k, v, **how))
    out[3:5], lse[3:5] = 0, -torch.inf
    grads = kernel.backward(dout, q, k, v, out, lse, **how)
    assert not grads[0][3:5].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_deterministic_gradients_are_equal_bit_for_bit(device):
    task = inputs(2048, 2048, 8, 2, 64, 64, "bfloat16", device)
    kernel, _ = choose("torch", device="cuda", dtype="bfloat16", head_dim=64, deterministic=True)
    first, second = (run(kernel, *task, causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_torch_kernel_says_which_op_it_took(device):
    kernel = kernel_named("torch", "bfloat16")
    run(kernel, *inputs(512, 512, 8, 2, 64, 64, "bfloat16", device), causal=True)
    assert [line.split()[0] for line in kernel.report()] == ["forward", "backward"]
    assert all(": flash (" in line or ": cuDNN (" in line for line in kernel.report())


def test_a_captured_graph_replays_the_kernel(device):
    kernel, how = kernel_named("torch", "bfloat16"), {"scale": 0.125, "causal": True}
    q, k, v, _ = inputs(256, 256, 4, 2, 64, 64, "bfloat16", device)
    expected = CUDA_FLASH.forward(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), 0.125, True)[0].permute(2, 0, 1, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = kernel.forward(q, k, v, **how)
    graph.replay()
    assert torch.equal(out, expected)
    assert kernel.report() == []


def test_the_reference_is_exact_on_the_gpu(device):
    task = inputs(96, 96, 4, 2, 24, 24, "float64", device)
    found, expected = run(ReferenceKernel(), *task, True), run(ReferenceKernel(), *(x.cpu() for x in task), True)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.cpu(), theirs) <= 1e-13
