"""Hold the CUDA code without a GPU: signatures of the ops, shapes by fake tensors, and the choice by time."""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_cp.kernels import choose
from megatron_cp.kernels.aten import CPU_FLASH, CUDA_FLASH, cudnn, reproducible
from megatron_cp.kernels.flash_attn import flash_op
from megatron_cp.kernels.fused import FusedKernel, Only, Op
from megatron_cp.kernels.torch_sdpa import fastest
from tests.context.dense import dense, problem, relative_error

aten = torch.ops.aten
INPUTS = ["query", "key", "value"]
SAVED = ["grad_out", *INPUTS, "out", "logsumexp"]
LENGTHS = ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]

# the order in which the wrappers pass arguments; scale goes by name
SIGNATURES = {
    "_scaled_dot_product_flash_attention_for_cpu": [*INPUTS, "dropout_p", "is_causal"],
    "_scaled_dot_product_flash_attention_for_cpu_backward": [*SAVED, "dropout_p", "is_causal"],
    "_scaled_dot_product_flash_attention": [*INPUTS, "dropout_p", "is_causal", "return_debug_mask"],
    "_scaled_dot_product_flash_attention_backward": [
        *SAVED, *LENGTHS, "dropout_p", "is_causal", "philox_seed", "philox_offset",
    ],
    "_scaled_dot_product_cudnn_attention": [
        *INPUTS, "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask",
    ],
    "_scaled_dot_product_cudnn_attention_backward": [
        *SAVED, "philox_seed", "philox_offset", "attn_bias", *LENGTHS, "dropout_p", "is_causal",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_ops_take_what_the_wrappers_pass(name):
    schema = getattr(aten, name).default._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert positional == SIGNATURES[name]
    assert "scale" in [argument.name for argument in schema.arguments if argument.kwarg_only]


@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"])
def test_the_forward_ops_return_out_and_lse_first(name):
    assert [result.name for result in getattr(aten, name).default._schema.returns][:2] == ["output", "logsumexp"]


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (100, 100), (192, 128)])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(64, 64, True), (48, 96, False)])
@pytest.mark.parametrize("op", [CUDA_FLASH, reproducible(CUDA_FLASH), cudnn()], ids=["flash", "reproducible", "cudnn"])
def test_shapes_on_cuda(op, queries, keys, causal, dim, value_dim):
    kernel = FusedKernel("fake", Only(op))
    with FakeTensorMode():
        q, k = (torch.empty(s, 2, n, dim, device="cuda", dtype=torch.bfloat16) for s, n in ((queries, 8), (keys, 2)))
        v = torch.empty(keys, 2, 2, value_dim, device="cuda", dtype=torch.bfloat16)
        out, lse = kernel.forward(q, k, v, scale=0.1, causal=causal)
        assert (out.shape, out.dtype, out.stride(3)) == ((queries, 2, 8, value_dim), torch.bfloat16, 1)
        assert (lse.shape, lse.dtype) == ((queries, 2, 8), torch.float32)
        grads = kernel.backward(out, q, k, v, out, lse, scale=0.1, causal=causal)
        assert [(x.shape, x.dtype, x.device.type) for x in grads] == [(x.shape, x.dtype, "cuda") for x in (q, k, v)]
    assert not torch.are_deterministic_algorithms_enabled()


def op_like(name, *, factor=1.0, error=None):
    """The CPU op under another name, right, wrong or refusing."""

    def forward(*args):
        if error:
            raise error
        out, lse = CPU_FLASH.forward(*args)
        return out * factor, lse

    return Op(name, forward, CPU_FLASH.backward)


def chosen(*candidates, times):
    """The choice when the ops take these milliseconds each."""
    task = problem(16, 2, 2, causal=False)
    q, k, v = (x.permute(1, 2, 0, 3) for x in task[:3])
    last = []

    def call(op):
        last.append(op.name)
        return op.forward(q, k, v, 0.3, False)

    def milliseconds(run):
        run()
        return times[last[-1]]

    return fastest(list(candidates), call, milliseconds)


def test_the_faster_op_wins_and_says_so():
    choice = chosen(op_like("flash"), op_like("cuDNN"), times={"flash": 2.0, "cuDNN": 1.0})
    assert (choice.op.name, choice.reason) == ("cuDNN", "cuDNN (flash 2.000 ms, cuDNN 1.000 ms)")
    assert chosen(op_like("flash"), op_like("cuDNN"), times={"flash": 1.0, "cuDNN": 2.0}).op.name == "flash"


def test_a_faster_op_that_is_wrong_or_refuses_is_not_used():
    times = {"flash": 2.0, "cuDNN": 1.0}
    wrong = chosen(op_like("flash"), op_like("cuDNN", factor=1.1), times=times)
    assert (wrong.op.name, wrong.reason) == (
        "flash", "flash (flash 2.000 ms); cuDNN disagreed with flash and is not used",
    )  # fmt: skip
    nan = chosen(op_like("flash"), op_like("cuDNN", factor=float("nan")), times=times)
    assert nan.op.name == "flash"
    refusal = RuntimeError("no plan for this head dim\ndetails")
    refused = chosen(op_like("flash"), op_like("cuDNN", error=refusal), times=times)
    assert refused.reason == "flash (flash 2.000 ms); cuDNN refused: no plan for this head dim"


def test_running_out_of_memory_is_not_a_refusal():
    with pytest.raises(torch.OutOfMemoryError):
        chosen(op_like("flash"), op_like("cuDNN", error=torch.OutOfMemoryError("full")), times={"flash": 1.0})


@pytest.fixture
def cuda_picker(monkeypatch):
    """The picker on a CUDA machine that counts its measurements; `capturing` says whether a graph is being captured."""
    kernel, _ = choose("torch", device="cuda", dtype="bfloat16", head_dim=64)
    state = types.SimpleNamespace(picker=kernel.picker, capturing=False, measured=0)

    def milliseconds(call):
        state.measured += 1
        return 1.0

    monkeypatch.setattr("megatron_cp.kernels.torch_sdpa.cuda_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def pick(state, shape):
    return state.picker.pick(shape, torch.device("cuda"), lambda op: (torch.ones(2),))


def test_a_shape_is_measured_once(cuda_picker):
    assert [pick(cuda_picker, shape).name for shape in ("a", "a", "b")] == ["flash"] * 3
    assert cuda_picker.measured == 4
    assert cuda_picker.picker.report() == [f"{s}: flash (flash 1.000 ms, cuDNN 1.000 ms)" for s in "ab"]


def test_nothing_is_measured_while_a_graph_is_captured(cuda_picker):
    cuda_picker.capturing = True
    assert pick(cuda_picker, "a").name == "flash"
    assert cuda_picker.measured == 0
    assert cuda_picker.picker.report() == []


def cpu(x):
    return x.transpose(1, 2)


class Release26:
    """flash_attn_interface as flash-attn 2.6 has it, on top of the CPU op."""

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
    ):
        assert (dropout_p, window_size, softcap, alibi_slopes, return_softmax) == (0.0, (-1, -1), 0.0, None, False)
        out, lse = CPU_FLASH.forward(cpu(q), cpu(k), cpu(v), softmax_scale, causal)
        return cpu(out), q, k, v, cpu(out), lse, None, None

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size, softcap, alibi_slopes, rng_state) == (0.0, (-1, -1), 0.0, None, None)
        assert deterministic
        assert softmax_lse.is_contiguous()
        inputs = (cpu(x) for x in (dout, q, k, v, out))
        grads = CPU_FLASH.backward(*inputs, softmax_lse, softmax_scale, causal)
        for buffer, grad in zip((dq, dk, dv), grads, strict=True):
            buffer.copy_(cpu(grad))
        return dq, dk, dv, None


class Release27:
    """The same as releases since 2.7 have it: what is called is the wrapped op."""

    def _flash_attn_forward(self):
        raise AssertionError("the wrapped op is the one to call")

    _flash_attn_backward = _flash_attn_forward

    def _wrapped_flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        out, *_, lse, _, _ = Release26()._flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, return_softmax
        )
        return out, lse, None, None

    def _wrapped_flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        Release26()._flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window, softcap,
            alibi_slopes, deterministic, rng_state,
        )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("release", [Release26, Release27])
def test_flash_attn_is_called_as_its_release_wants(release, causal):
    task = problem(24, 8, 2, causal=causal)
    kernel = FusedKernel("flash", Only(flash_op(release(), deterministic=True)))
    how = {"scale": task.q.shape[3] ** -0.5, "causal": causal}
    out, lse = kernel.forward(task.q, task.k, task.v, **how)
    grads = kernel.backward(task.dout, task.q, task.k, task.v, out, lse, **how)
    for found, expected in zip((out, *grads), dense(task), strict=True):
        assert relative_error(found, expected) <= 1e-13
