"""Attention by Triton: equal to the reference under the interpreter, the same dropped weights, compiled for GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_cp.kernels import KERNELS, choose
from megatron_cp.kernels.packages import AMPERE
from megatron_cp.kernels.protocol import DropsWeights, takes_windows
from tests.cases import slow_unless

triton = pytest.importorskip("triton", reason="the kernel is written in Triton, which comes with torch for CUDA")

BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
# queries, keys, query and KV heads, dims of keys and values; causal, window, rate, dtype
QUICK = {
    "tiles": [
        [[40, 40, 4, 2, 24, 24], True, None, 0.3, "float32"],
        [[20, 70, 2, 1, 16, 40], False, [9, 4], 0.3, "bfloat16"],
    ],
    "weights": [[19, 70, 4, 2, 0.3]],
    "algorithms": [["zigzag", 3, 0.3]],
}
FULL = {
    "tiles": [
        [[70, 70, 4, 2, 64, 64], True, None, 0.0, "bfloat16"],
        [[70, 70, 4, 2, 64, 64], True, None, 0.1, "float16"],
        [[70, 40, 4, 1, 100, 128], False, None, 0.1, "float32"],
        [[1, 90, 2, 2, 8, 8], False, None, 0.1, "float32"],
        [[90, 2, 2, 2, 33, 33], False, None, 0.1, "float32"],
        *([[40, 100, 2, 1, 16, 16], False, window, 0.5, "float32"]
          for window in ([None, 0], [12, 0], [0, 0], [None, 3], [7, None], [200, 200])),
        [[40, 40, 2, 1, 192, 128], True, None, 0.2, "bfloat16"],
        [[40, 40, 2, 1, 256, 256], True, None, 0.2, "float32"],
    ],
    "weights": [[19, 70, 2, 1, rate] for rate in (1e-3, 0.5, 0.999)],
    "algorithms": [[entry, 3, 0.3] for entry in ("striped", "ulysses", "tokenring", "fpdt")],
}  # fmt: skip


@pytest.mark.parametrize("asked", slow_unless([QUICK], [QUICK, FULL]), ids=["quick", "full"])
def test_the_kernel_equals_the_reference(asked):
    script = [sys.executable, "-m", "tests.kernels.triton_flash_interpreted", json.dumps(asked)]
    run = subprocess.run(
        script, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {name: len(cases) for name, cases in found.items()} == {name: len(cases) for name, cases in asked.items()}
    for case, errors in found["tiles"].items():
        assert errors.pop("dtypes") is True, case
        assert max(errors.values()) <= BOUNDS[json.loads(case)[-1]], (case, errors)
    assert set(found["weights"].values()) == {True}, found["weights"]
    for case, errors in found["algorithms"].items():
        assert max(errors.values()) <= BOUNDS["float32"], (case, errors)


def compiled(name, dim, dtype, capability):
    """One of the passes, compiled for a GPU that this machine lacks."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_cp.kernels import triton_passes

    kernel = getattr(triton_passes, f"_{name}_kernel")
    pointer = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = dict.fromkeys(("q", "k", "v", "dout", "out", "dq", "dk", "dv"), pointer)
    types |= {"lse": "*fp32", "delta": "*fp32", "seeds": "*i64", "places": "*i64"}
    types |= dict.fromkeys(("scale", "factor", "slope"), "fp32")
    blocks = triton_passes.blocks(dim, getattr(torch, dtype).itemsize)
    values = {"HEADS": 32, "GROUPS": 8, "DROPS": True, "ROWS": blocks.rows, "DIM": dim, "VALUE_DIM": dim}

    def kind(argument):
        if argument in values:
            return "constexpr"
        return ("i32",) * 3 if argument.endswith("_strides") else types.get(argument, "i32")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    places = {argument: index for index, argument in enumerate(kernel.arg_names)}
    aligned = [["tt.divisibility", 16]]
    attrs = {(places[name],): aligned for name in types if name in places and types[name].startswith("*")}
    attrs |= {(places[name], axis): aligned for name in places if name.endswith("_strides") for axis in range(3)}
    source = ASTSource(kernel, signature, constexprs={(places[n],): v for n, v in values.items()}, attrs=attrs)
    options = {"num_warps": blocks.warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("name", "dim", "dtype", "capability"),
    slow_unless(
        [("forward", 64, "bfloat16", 80)],
        [
            (name, dim, dtype, capability)
            for name in ("forward", "queries", "keys")
            for dim, dtype in (
                (64, "bfloat16"),
                (128, "bfloat16"),
                (256, "bfloat16"),
                (128, "float32"),
                (256, "float32"),
            )
            for capability in (80, 90, 100)
        ],
    ),
)
def test_the_passes_compile_for_gpus_and_fit_the_smallest_shared_memory(
    name, dim, dtype, capability, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(name, dim, dtype, capability)
    print(f"{name} {dim} {dtype} {capability}: {made.metadata.shared} bytes of shared memory")
    # of compute capability 8.6 and 8.9; 8.0 has 163 KiB, 9.0 has 227
    assert made.metadata.shared <= 99 * 1024
    # products of half precision are those of the tensor cores
    assert ("mma" in made.asm["ptx"]) == (dtype == "bfloat16")


def test_the_registry_chooses_it_for_dropped_weights_alone():
    half = {"device": "cuda", "dtype": "bfloat16", "head_dim": 64}
    kernel, reason = choose("auto", **half, drops=True)
    assert (kernel.name, takes_windows(kernel), isinstance(kernel, DropsWeights)) == ("triton", True, True)
    assert "'te' does not drop weights" in reason
    assert choose("auto", **half | {"dtype": "float32"})[0].name == "reference"
    assert choose("auto", **half | {"head_dim": 320}, drops=True)[0].name == "reference"
    assert choose("triton", **half)[0].name == "triton"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": "cpu"}, "kernel 'triton' needs a CUDA device, not cpu; use 'auto' or one of: torch"),
        ({"dtype": "float64"}, "computes in bfloat16, float16, float32, not in float64"),
        ({"head_dim": 257}, "takes head dims up to 256, not 257"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(how, message):
    with pytest.raises(ValueError, match=message):
        choose("triton", **{"device": "cuda", "dtype": "bfloat16", "head_dim": 64} | how)


def test_a_machine_without_triton_or_with_an_older_gpu_lacks_it(monkeypatch):
    from megatron_cp.kernels import triton_flash

    monkeypatch.setattr(triton_flash, "find_spec", lambda name: None)
    assert KERNELS.get("triton").load().missing(device="cuda") == (
        "needs the package triton, which comes with torch for CUDA"
    )
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert f"compute capability {AMPERE[0]}.{AMPERE[1]}; a GPU has 7.5" in triton_flash.missing(device="cuda")
