"""The Triton kernels that merge partial results: equal to torch under the interpreter, and compiled for GPUs."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_cp.kernels.fused import FusedKernel
from tests.cases import slow_unless
from tests.kernels.test_copies import DIM, tensors

triton = pytest.importorskip("triton", reason="the fused merge is written in Triton, which comes with torch for CUDA")

# a few units in the last place of float32, and half a unit of the 8 and 11 bits of the lower precisions
ROUNDED = {"float32": 5e-7, "bfloat16": 2**-8, "float16": 2**-11}
QUICK = {
    "dtypes": ["bfloat16", "float32"],
    "counts": [1, 5],
    "algorithms": [("zigzag", 2, "float32", True, None), ("all-gather", 3, "bfloat16", True, 20)],
}
FULL = {
    "dtypes": [*ROUNDED],
    "counts": [*range(1, 9)],
    "algorithms": [
        *(("zigzag", ranks, "bfloat16" if ranks % 2 else "float32", True, None) for ranks in (3, 4, 5, 8)),
        *(
            (backend, 4, "bfloat16", causal, None)
            for backends, causal in (
                (("striped", "all-gather", "ulysses", "distflash"), True),
                (("ring", "double-ring", "tokenring", "fpdt"), False),
            )
            for backend in backends
        ),
        ("striped", 4, "float32", True, 20),
        ("ulysses", 3, "float32", False, None),
    ],
}


@pytest.mark.parametrize("asked", slow_unless([QUICK], [QUICK, FULL]), ids=["quick", "full"])
def test_the_kernels_equal_torch_to_rounding(asked):
    script = [sys.executable, "-m", "tests.kernels.interpreted", json.dumps(asked)]
    run = subprocess.run(
        script, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found["algorithms"]) == len(asked["algorithms"])
    assert found["single"] == dict.fromkeys(asked["dtypes"], True)
    assert set(found["added"].values()) == {True}
    for case, error in found["merged"].items():
        _, dtype, rounded = case.split()
        assert error["out"] <= ROUNDED[dtype if rounded == "True" else "float32"], case
        assert error["lse"] <= ROUNDED["float32"], case
        assert error["rows without keys"] is True, case
    for case, errors in found["algorithms"].items():
        for policy in ("one", "several"):
            for ours, torch_s in zip(errors[policy], errors["torch"], strict=True):
                assert ours <= 1.02 * torch_s + ROUNDED["float32"], (case, policy, errors)


@pytest.mark.parametrize(
    ("count", "capability"),
    slow_unless([(2, 90)], [(count, capability) for count in (1, 2, 4, 8) for capability in (80, 90, 100)]),
)
def test_the_merge_compiles_for_gpus_and_reads_16_bytes_at_a_time(count, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_cp.kernels.fused_merge import _merge_kernel as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    aligned = [["tt.divisibility", 16]]
    # x and its strides, lse with its strides, and the rows of the part
    part = ("*bf16", "i32", "i32", "i32", "*fp32", ("i32",) * 3, ("i32",) * 2)
    types = {"parts": (part,) * count, "out": "*bf16", "lse": "*fp32", "ROWS": "constexpr", "COLUMNS": "constexpr"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    attrs = {(0, index, place): aligned for index in range(count) for place in range(4)}
    attrs |= {
        (kernel.arg_names.index(name),): aligned for name in ("out", "columns", "out_row", "out_batch", "out_head")
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in (("ROWS", 32), ("COLUMNS", 128))}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    # 32 rows of 128 elements of 2 bytes, 16 bytes for each of 128 threads at a time
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 4 * count
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 4


def test_a_kernel_is_compiled_once_for_all_rows_and_lengths():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from megatron_cp.kernels import fused_merge

    kernel = fused_merge._merge_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    found = set()
    # one row, an odd number, a multiple of 16 and all; and the layouts of a kernel's lse and of a received one
    for first, rows in ((0, 1), (1, 33), (16, 48), (0, 64)):
        out, whole = torch.empty(64, 1, 32, 128, dtype=torch.bfloat16), torch.empty(1, 32, 64).permute(2, 0, 1)
        for lse in (torch.empty(1, 32, rows).permute(2, 0, 1), torch.empty(rows, 1, 32)):
            part = fused_merge.Part(first, torch.empty(1, 32, rows, 128, dtype=torch.bfloat16).permute(2, 0, 1, 3), lse)
            found.add(str(bind(*fused_merge._merge_arguments([part, part], out, whole))[1]))
    assert len(found) == 1, found


class Fills(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how often rows without keys are filled."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.masked_fill
        return func(*args, **(kwargs or {}))


def test_lse_is_prepared_once_for_the_tiles_of_the_same_rows():
    from megatron_cp.kernels import choose

    kernel = choose("torch", device="cpu", dtype="float32", head_dim=DIM)[0]
    assert isinstance(kernel, FusedKernel)
    dout, q, k, v = tensors("s b h d")
    out, lse = kernel.forward(q, k, v, scale=0.1, causal=True)
    half, found = slice(len(q) // 2, None), []
    for once in (kernel, kernel.for_backward()):
        with Fills() as fills:
            # the tiles of a middle rank of eight: its own, those of four ranks before it, and of three after it
            for rows in [slice(None)] * 5 + [half] * 3:
                args = (dout[rows], q[rows], k[rows], v[rows], out[rows], lse[rows])
                grads = once.backward(*args, scale=0.1, causal=True)
        found.append((fills.count, grads))
    (each, before), (together, after) = found
    assert (each, together) == (8, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
