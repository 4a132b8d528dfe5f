"""Every kernel equals dense attention by autograd, forward and backward, and fits together block by block."""

import pytest
import torch

from megatron_cp.kernels import aten, choose
from megatron_cp.kernels.aten import CPU_FLASH, cpu_flash, expanded
from megatron_cp.kernels.fused import FusedKernel, Only
from tests.context.dense import dense, problem, relative_error

HEADS = [(8, 8), (8, 2), (8, 1)]
BOUNDS = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2}


def kernel_named(name, dtype="float64"):
    if name == "expanded":
        return FusedKernel("expanded", Only(expanded(CPU_FLASH)))
    return choose(name, device="cpu", dtype=dtype, head_dim=64)[0]


def run(kernel, q, k, v, dout, causal):
    """out, lse, dq, dk, dv."""
    how = {"scale": q.shape[3] ** -0.5, "causal": causal}
    out, lse = kernel.forward(q, k, v, **how)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, **how)


def assert_equal(found, expected, bound):
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(ours, theirs) <= bound, name


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "groups"), HEADS, ids=lambda n: f"h{n}")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ["reference", "torch", "expanded"])
def test_kernel_equals_dense(name, dtype, heads, groups, causal):
    task = problem(65, heads, groups, causal=causal, dim=24)
    rounded = task._replace(**{x: getattr(task, x).to(getattr(torch, dtype)) for x in ("q", "k", "v", "dout")})
    out, lse, *grads = run(kernel_named(name, dtype), *rounded[:4], causal)
    assert {out.dtype, *(grad.dtype for grad in grads)} <= {rounded.q.dtype, lse.dtype}
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    for what, found, expected in zip(("out", "dq", "dk", "dv"), (out, *grads), dense(rounded), strict=True):
        assert relative_error(found, expected) <= BOUNDS[dtype], what


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_lse_is_the_natural_logsumexp_of_the_scaled_scores(name):
    task = problem(17, 4, 2, causal=False)
    _, lse = kernel_named(name).forward(task.q, task.k, task.v, scale=0.3, causal=False)
    scores = torch.einsum("sbhd,tbhd->sbht", task.q, task.k.repeat_interleave(2, 2)) * 0.3
    assert relative_error(lse, scores.logsumexp(-1)) <= 1e-14


@pytest.mark.smoke
@pytest.mark.parametrize("dim", [1, 7, 33, 80, 160])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 31), (37, 1), (5, 130)])
def test_torch_kernel_equals_reference_at_odd_sizes(queries, keys, dim):
    q = problem(queries, 6, 3, causal=False, dim=dim)
    kv = problem(keys, 6, 3, causal=False, dim=dim, seed=1)
    inputs = q.q, kv.k, kv.v, q.dout
    expected = run(kernel_named("reference"), *inputs, causal=False)
    found = run(kernel_named("torch"), *inputs, causal=False)
    for ours, theirs in zip(found, expected, strict=True):
        # a single key has no gradient for q and k but rounding
        assert (ours - theirs).abs().max() <= 1e-13 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("value_dim", [8, 24, 40])
def test_value_heads_may_differ_in_width_from_key_heads(value_dim):
    task, wide = problem(19, 4, 2, causal=True, dim=24), problem(19, 4, 2, causal=True, dim=value_dim, seed=1)
    inputs = task.q, task.k, wide.v, wide.dout
    expected = run(kernel_named("reference"), *inputs, causal=True)
    assert_equal(run(kernel_named("torch"), *inputs, causal=True), expected, 1e-13)


def strided(x, generator):
    """The same values as a slice of heads and tokens of something larger."""
    s, b, h, d = x.shape
    storage = torch.randn((s + 3, b, h + 2, d), generator=generator, dtype=x.dtype)
    view = storage[2 : 2 + s, :, 1 : 1 + h]
    view.copy_(x)
    return view


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_strided_inputs_give_what_contiguous_ones_give(name, causal):
    generator = torch.Generator().manual_seed(3)
    task = problem(40, 6, 3, causal=causal, dim=16)
    kernel, how = kernel_named(name), {"scale": 0.25, "causal": causal}
    out, lse = kernel.forward(task.q, task.k, task.v, **how)
    expected = out, lse, *kernel.backward(task.dout, task.q, task.k, task.v, out, lse, **how)
    dout, q, k, v, out_ = (strided(x, generator) for x in (task.dout, task.q, task.k, task.v, out))
    lse_ = strided(lse[..., None], generator)[..., 0]
    found = *kernel.forward(q, k, v, **how), *kernel.backward(dout, q, k, v, out_, lse_, **how)
    assert_equal(found, expected, 1e-15)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("heads", "groups"), HEADS, ids=lambda n: f"h{n}")
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_halves_of_the_keys_merge_to_the_whole(name, heads, groups, dtype):
    task = problem(48, heads, groups, causal=False, dim=16)
    q, k, v, dout = (x.to(getattr(torch, dtype)) for x in task[:4])
    kernel, how = kernel_named(name, dtype), {"scale": 0.25, "causal": False}
    parts = [kernel.forward(q, k[half], v[half], **how) for half in (slice(0, 17), slice(17, None))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in parts)
    grads = [kernel.backward(dout, q, k[h], v[h], out, lse, **how) for h in (slice(0, 17), slice(17, None))]
    (dq1, dk1, dv1), (dq2, dk2, dv2) = grads
    found = out, lse, dq1 + dq2, torch.cat([dk1, dk2]), torch.cat([dv1, dv2])
    assert_equal(found, run(kernel, q, k, v, dout, causal=False), {"float64": 1e-13, "float32": 2e-6}[dtype])


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_rows_without_keys_take_no_part_in_backward(name):
    task = problem(8, 2, 2, causal=False)
    kernel, how = kernel_named(name), {"scale": 0.3, "causal": False}
    out, lse = kernel.forward(task.q, task.k, task.v, **how)
    out, lse = out.clone(), lse.clone()
    out[3:5], lse[3:5] = 0, -torch.inf
    dq, dk, dv = kernel.backward(task.dout, task.q, task.k, task.v, out, lse, **how)
    assert not dq[3:5].any()
    seen = [0, 1, 2, 5, 6, 7]
    expected = kernel.backward(task.dout[seen], task.q[seen], task.k, task.v, out[seen], lse[seen], **how)
    for found, wanted in zip((dq[seen], dk, dv), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-14


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda x: x[:0]}, "empty"),
        ({"k": lambda x: x[:0], "v": lambda x: x[:0]}, "empty"),
        ({"q": lambda x: x.float()}, "dtype"),
        ({"q": lambda x: x[:4]}, "as many queries as keys"),
        ({"k": lambda x: x[:, :, :1]}, "different tokens or heads"),
        ({"k": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3)}, "last dim"),
    ],
    ids=["no-queries", "no-keys", "mixed-dtypes", "oblong-causal", "heads", "strided-dim"],
)
def test_what_would_kill_or_mislead_an_op_is_caught_before_it(name, change, message):
    task = problem(8, 2, 2, causal=True)
    inputs = {x: change.get(x, lambda y: y)(getattr(task, x)) for x in ("q", "k", "v")}
    with pytest.raises(AssertionError, match=message):
        kernel_named(name).forward(**inputs, scale=1.0, causal=True)


@pytest.mark.parametrize("multiplies", [True, False])
def test_out_is_not_rounded_where_the_cpu_multiplies_no_bf16(monkeypatch, multiplies):
    monkeypatch.setattr(aten, "multiplies", lambda dtype: multiplies)
    task = problem(64, 4, 2, causal=True)
    q, k, v, dout = (x.bfloat16() for x in task[:4])
    kernel, how = kernel_named("torch", "bfloat16"), {"scale": 0.3, "causal": True}
    out, lse = kernel.forward(q, k, v, **how)
    assert out.dtype == (torch.bfloat16 if multiplies else torch.float32)
    wide, _ = kernel.forward(q.double(), k.double(), v.double(), **how)
    assert (relative_error(out, wide) < 1e-5) == (not multiplies)
    # backward rounds it
    found, expected = (kernel.backward(dout, q, k, v, x, lse, **how) for x in (out, out.bfloat16()))
    assert all(map(torch.equal, found, expected))


def test_backward_refuses_out_in_another_dtype():
    task = problem(8, 2, 2, causal=False)
    q, k, v, dout = (x.bfloat16() for x in task[:4])
    kernel, lse = kernel_named("torch", "bfloat16"), torch.zeros(q.shape[:3])
    with pytest.raises(AssertionError, match=r"out is torch.float16, q torch.bfloat16"):
        kernel.backward(dout, q, k, v, dout.half(), lse, scale=1.0, causal=False)


@pytest.mark.parametrize(("version", "native"), [("2.8.1", False), ("2.9.0+cpu", True), ("2.15.0a0+git", True)])
def test_grouped_heads_are_expanded_where_the_op_does_not_know_them(version, native):
    assert (cpu_flash(version) is CPU_FLASH) == native


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_dout_may_be_the_expanded_one_of_a_sum(name):
    task = problem(9, 4, 2, causal=True)
    kernel, how = kernel_named(name), {"scale": 0.3, "causal": True}
    out, lse = kernel.forward(task.q, task.k, task.v, **how)
    expanded_one = torch.ones((), dtype=torch.float64).expand(out.shape)
    found = kernel.backward(expanded_one, task.q, task.k, task.v, out, lse, **how)
    expected = kernel.backward(torch.ones_like(out), task.q, task.k, task.v, out, lse, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-15
