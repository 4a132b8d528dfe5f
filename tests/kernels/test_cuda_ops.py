"""Hold the CUDA code without a GPU: signatures of the ops, shapes by fake tensors, and the choice by time."""

import types

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_cp.kernels import choose
from megatron_cp.kernels.aten import CPU_FLASH, CUDA_FLASH, cudnn, reproducible
from megatron_cp.kernels.fused import FusedKernel, Only, Op, Shape
from megatron_cp.kernels.measured import Measured
from megatron_cp.kernels.torch_sdpa import fastest
from tests.context.dense import problem

aten = torch.ops.aten


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


@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("op", [CUDA_FLASH, reproducible(CUDA_FLASH)], ids=["flash", "reproducible"])
def test_shapes_of_a_window_on_cuda(op, dim):
    kernel = FusedKernel("fake", Only(op))
    with FakeTensorMode():
        q, k, v = (
            torch.empty(s, 2, n, dim, device="cuda", dtype=torch.bfloat16) for s, n in ((48, 8), (96, 2), (96, 2))
        )
        out, lse = kernel.forward(q, k, v, scale=0.1, causal=False, window=(20, 0))
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
        grads = kernel.backward(out, q, k, v, out, lse, scale=0.1, causal=False, window=(20, 0))
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


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


def test_without_memory_for_both_flash_is_taken():
    choice = chosen(op_like("flash"), op_like("cuDNN", error=torch.OutOfMemoryError("full")), times={"flash": 1.0})
    assert choice.op.name == "flash"
    assert choice.reason == "flash (flash 1.000 ms); cuDNN had no memory beside flash's results and is not used"
    with pytest.raises(torch.OutOfMemoryError):
        chosen(op_like("flash", error=torch.OutOfMemoryError("full")), op_like("cuDNN"), times={"cuDNN": 1.0})


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


SHAPES = [Shape("forward", torch.bfloat16, tokens, tokens, 1, 8, 2, 64, causal=True) for tokens in (128, 256)]


def pick(state, shape=SHAPES[0]):
    return state.picker.pick(shape, torch.device("cuda"), lambda op: (torch.ones(2),))


def test_a_shape_is_measured_once(cuda_picker):
    assert [pick(cuda_picker, shape).name for shape in (*SHAPES, SHAPES[0])] == ["flash"] * 3
    assert cuda_picker.measured == 4
    assert cuda_picker.picker.report() == [
        f"forward {n}x{n} b=1 h=8 g=2 d=64 causal bfloat16: flash (flash 1.000 ms, cuDNN 1.000 ms)" for n in (128, 256)
    ]


def test_a_window_goes_to_flash_unmeasured(cuda_picker):
    assert pick(cuda_picker, SHAPES[0]._replace(causal=False, window=(64, 0))).name == "flash"
    assert cuda_picker.measured == 0
    assert cuda_picker.picker.windows
    assert not choose("torch", device="cpu", dtype="bfloat16", head_dim=64)[0].windows


def refusing(*names):
    """A call of ops of which those with these names refuse."""

    def call(op):
        if op.name in names:
            raise RuntimeError(f"{op.name} has no such kernel\nand more")
        return (torch.ones(2),)

    return call


def test_a_measured_gpu_leaves_no_race(monkeypatch):
    entry = Measured((9, 0), ("torch",), "cuDNN", "an H100")
    monkeypatch.setattr("megatron_cp.kernels.torch_sdpa.measured", lambda device: entry)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda")
    picker = choose("torch", device="cuda", dtype="bfloat16", head_dim=64)[0].picker
    # cuda_milliseconds would fail: there is no GPU
    assert picker.pick(SHAPES[0], device, refusing()).name == "cuDNN"
    assert picker.pick(SHAPES[1], device, refusing("cuDNN")).name == "flash"
    assert picker.pick(SHAPES[0]._replace(window=(3, 0)), device, None).name == "flash"
    assert [line.partition(": ")[2] for line in picker.report()] == [
        "cuDNN, faster on GPUs of this generation",
        "flash; cuDNN refused: cuDNN has no such kernel",
    ]
    with pytest.raises(RuntimeError, match="cuDNN refused: cuDNN has no such kernel; flash refused"):
        picker.pick(SHAPES[0]._replace(batch=2), device, refusing("cuDNN", "flash"))
    exact, _ = choose("torch", device="cuda", dtype="bfloat16", head_dim=64, deterministic=True)
    assert exact.picker.pick(SHAPES[0], device, refusing()).name == "flash"


def test_the_first_rank_with_a_shape_decides_for_all(monkeypatch, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    ranks = [choose("torch", device="cuda", dtype="bfloat16", head_dim=64)[0].picker for _ in range(2)]
    winners = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr("megatron_cp.kernels.torch_sdpa.cuda_milliseconds", lambda call: next(winners))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    picked = [picker.pick(SHAPES[0], torch.device("cuda"), lambda op: (torch.ones(2),)).name for picker in ranks]
    assert picked == ["flash", "flash"]
    (line,) = ranks[1].report()
    assert "flash, as the first rank with this shape chose; here it was cuDNN (flash 2.000 ms, cuDNN 1.000 ms)" in line


@pytest.mark.parametrize(
    "entry", [None, Measured((8, 0), ("torch",), "", "an A100"), Measured((9, 0), (), "flash", "")]
)
def test_an_op_that_a_variable_names_is_every_runs_choice(monkeypatch, entry):
    monkeypatch.setenv("MEGATRON_CP_TORCH_OP", "cuDNN")
    monkeypatch.setattr("megatron_cp.kernels.torch_sdpa.measured", lambda device: entry)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # cuda_milliseconds would fail: there is no GPU
    runs = [choose("torch", device="cuda", dtype="bfloat16", head_dim=64)[0].picker for _ in range(2)]
    for picker in runs:
        assert picker.pick(SHAPES[0], torch.device("cuda"), refusing()).name == "cuDNN"
        assert picker.pick(SHAPES[1], torch.device("cuda"), refusing("cuDNN")).name == "flash"
    assert runs[0].report() == runs[1].report()
    assert runs[0].report()[0].endswith("cuDNN, as MEGATRON_CP_TORCH_OP says")
    exact, _ = choose("torch", device="cuda", dtype="bfloat16", head_dim=64, deterministic=True)
    assert exact.picker.pick(SHAPES[0], torch.device("cuda"), refusing()).name == "flash"


def test_an_op_that_torch_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("MEGATRON_CP_TORCH_OP", "fa3")
    with pytest.raises(ValueError, match="MEGATRON_CP_TORCH_OP is flash or cuDNN, got 'fa3'; set it to one of them"):
        choose("torch", device="cuda", dtype="bfloat16", head_dim=64)


def test_nothing_is_measured_while_a_graph_is_captured(cuda_picker):
    cuda_picker.capturing = True
    assert pick(cuda_picker).name == "flash"
    assert cuda_picker.measured == 0
    assert cuda_picker.picker.report() == []
