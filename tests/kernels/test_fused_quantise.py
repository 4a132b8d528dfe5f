"""The Triton kernels of quantised blocks: torch's codes and scales under the interpreter, and compiled for GPUs."""

import json
import os
import subprocess
import sys

import pytest

from megatron_cp.replicas import QUANTISATIONS

triton = pytest.importorskip("triton", reason="the kernels are written in Triton, which comes with torch for CUDA")

# bits, rows, block, dtype, and whether what is left over is kept; blocks are powers of two
CASES = [
    [8, 19, 256, "float32", False],
    [4, 70, 64, "float32", True],
    # every pair of values once
    [4, 1, 64, "bfloat16", False],
    [4, 33, 256, "float32", False],
    [8, 1, 64, "float32", True],
    [8, 33, 256, "bfloat16", True],
]


@pytest.mark.slow
def test_the_kernels_equal_torch() -> None:
    script = [sys.executable, "-m", "tests.kernels.quantise_interpreted", json.dumps(CASES)]
    run = subprocess.run(
        script, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == len(CASES)
    assert not any(found.values()), found


def test_a_program_takes_blocks_of_the_shipped_sizes() -> None:
    for entry in QUANTISATIONS:
        assert entry.block & (entry.block - 1) == 0
        assert entry.block * entry.bits // 8 % 4 == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), [("int8", 80), ("int4", 90)])
def test_the_kernels_compile_for_gpus(name: str, capability: int, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_cp.kernels import fused_quantise

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    entry = QUANTISATIONS.get(name)
    constants = {
        "BLOCK": entry.block,
        "STEPS": float(2 ** (entry.bits - 1) - 1),
        "PACKED": entry.bits == 4,
        "KEEPS": entry.keeps,
        "ROWS": fused_quantise.ELEMENTS // entry.block,
    }
    types = {"values": "*fp32", "left": "*bf16", "codes": "*u8", "scales": "*fp32", "total": "*fp32"}
    for kernel in (fused_quantise._quantise_kernel, fused_quantise._add_kernel):
        signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in kernel.arg_names}
        fixed = {(kernel.arg_names.index(each),): value for each, value in constants.items() if each in signature}
        source = ASTSource(kernel, signature, constexprs=fixed)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        # division by a scale is that of torch, not an approximation
        assert kernel is fused_quantise._add_kernel or "div.rn.f32" in ptx
