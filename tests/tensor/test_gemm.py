"""Products of linears by Stream-K: chosen where predicted, equal to torch's, refused by name where it cannot run."""

import os

import pytest
import torch

from megatron_cp.errors import CannotRun
from megatron_cp.kernels.stream_k_plan import tiling_of
from megatron_cp.tensor import GEMMS, gemm
from megatron_cp.tensor.gemm import StreamProduct, torch_product
from tests.ranks import run_ranks
from tests.tensor.dense import close, cut, dense

CLOSE = 1e-5


@pytest.fixture
def product(monkeypatch):
    """Make a product whose kernel is torch's, on so many processors; what it was called with goes to a list."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls = []

    def made(processors, *, predicted):
        monkeypatch.setattr(gemm, "_processors", lambda device: processors)
        found = StreamProduct(predicted=predicted)

        def matmul(a, b, programs, out=None):
            calls.append((len(a), b.shape[1], a.shape[1], programs))
            return torch.mm(a, b, out=out)

        found._matmul = matmul
        return found, calls

    pytest.importorskip("triton", reason="Stream-K is written in Triton, which comes with torch for CUDA")
    return made


def factors(m, n, k, dtype=torch.float32):
    return torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)


def test_the_kernel_takes_the_shapes_that_are_predicted_to_gain(product):
    rows, columns, inner = tiling_of(4).block
    found, calls = product(3, predicted=True)
    # four tiles on three programs: a second wave of one tile; three tiles fill one wave
    four, three, few = (4 * rows, columns, 256 * inner), (3 * rows, columns, 256 * inner), (4 * rows, columns, inner)
    for sizes in (four, three, few):
        found(*factors(*sizes))
    assert calls == [(*four, 3)]
    assert found.calls == 1


def test_without_a_prediction_the_kernel_takes_all_but_float64(product):
    found, calls = product(3, predicted=False)
    out = torch.empty(4, 6)
    assert found(*factors(4, 6, 5), out) is out
    assert torch.equal(found(*factors(4, 6, 5, torch.float64)), torch.full((4, 6), 5.0, dtype=torch.float64))
    assert calls == [(4, 6, 5, 3)]


def test_a_machine_without_triton_or_gpu_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "needs the package triton" if gemm.find_spec("triton") is None else "needs a CUDA GPU, or Triton's"
    with pytest.raises(CannotRun, match=f"--tp-gemm stream-k {reason}.*; use torch"):
        GEMMS.get("stream-k").load()
    assert GEMMS.get("auto").load() is torch_product
    monkeypatch.setattr(gemm, "find_spec", lambda name: None)
    with pytest.raises(CannotRun, match="needs the package triton; use torch"):
        GEMMS.get("stream-k").load()


def interpreted(engine):
    """Errors of both linears of one dimension, whose products are Stream-K's, and how many it computed."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch.distributed as dist

    from megatron_cp.comm import GroupFabric
    from megatron_cp.tensor.axes import engines_over
    from megatron_cp.tensor.place import GridSize
    from megatron_cp.tensor.summa_2d import column_linear, row_linear

    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    engines = engines_over(GroupFabric(dist.group.WORLD), GridSize(ranks, 1), engine, "stream-k")
    whole, errors = dense(6 * ranks, 8 * ranks, 10 * ranks, torch.float32), []
    for linear, outside, inside in ((column_linear(*engines), 0, 1), (row_linear(*engines), 1, 0)):
        x, dy = cut(whole.x, ranks, rank, outside), cut(whole.dy, ranks, rank, inside)
        shard = cut(whole.weight, ranks, rank, outside)
        dx, dw = linear.backward(dy, x, shard)
        errors.append(close(linear.forward(x, shard), cut(whole.y, ranks, rank, inside)))
        errors += [close(dx, cut(whole.dx, ranks, rank, outside)), close(dw, cut(whole.dw, ranks, rank, outside))]
    dist.barrier()
    return max(errors), engines.tokens.product.calls


@pytest.mark.slow
def test_linears_with_products_of_the_interpreted_kernel_equal_one_rank():
    pytest.importorskip("triton", reason="Stream-K is written in Triton, which comes with torch for CUDA")
    for error, calls in run_ranks(2, interpreted, "ring"):
        assert error < CLOSE
        # three products of two linears, each of two pieces
        assert calls == 12
