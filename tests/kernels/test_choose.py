"""The registry of kernels: what auto takes, what a name refuses, and that neither costs an import."""

import subprocess
import sys

import pytest

from megatron_cp.kernels import KERNELS, choose
from megatron_cp.kernels.aten import CUDA_FLASH


def test_the_registry_imports_no_torch():
    code = "import sys, megatron_cp.kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        ("cpu", "float64", "torch", "auto chose 'torch' for float64 with head dim 64 on cpu"),
        ("cpu", "torch.bfloat16", "torch", "CPU flash"),
        ("cuda:3", "bfloat16", "torch", "flash or cuDNN, measured per shape"),
        ("cuda", "float32", "reference", "'torch' has no fused CUDA op for float32"),
        ("mps", "float32", "reference", "'torch' has no op for device mps"),
    ],
)
def test_auto_takes_the_first_able_kernel_and_says_why(device, dtype, name, reason):
    kernel, why = choose("auto", device=device, dtype=dtype, head_dim=64)
    assert kernel.name == name
    assert reason in why


def test_auto_says_what_a_wide_head_costs():
    kernel, why = choose("auto", device="cuda", dtype="bfloat16", head_dim=512)
    assert kernel.name == "reference"
    assert "head dims up to 256" in why


@pytest.mark.parametrize("entry", list(KERNELS), ids=lambda entry: entry.name)
def test_aliases_mean_the_same_kernel(entry):
    assert {KERNELS.get(name) for name in (entry.name, *entry.aliases)} == {entry}


@pytest.mark.parametrize(
    ("name", "device", "error", "message"),
    [
        ("flsh", "cpu", ValueError, "unknown kernel 'flsh'; did you mean 'flash'"),
        ("flash", "cpu", ValueError, "kernel 'flash' needs a CUDA device, not cpu; use 'auto' or one of: torch"),
        ("torch", "cuda", ValueError, "kernel 'torch' has no fused CUDA op for float32"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_a_way_out(name, device, error, message):
    with pytest.raises(error, match=message):
        choose(name, device=device, dtype="float32", head_dim=64)


def test_flash_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("megatron_cp.kernels.packages.installed", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs the flash-attn package \(pip install 'megatron-cp\[flash\]'\)"):
        choose("flash", device="cuda", dtype="bfloat16", head_dim=64)


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_leaves_no_race(deterministic):
    kernel, _ = choose("torch", device="cuda", dtype="bfloat16", head_dim=64, deterministic=deterministic)
    assert [op.name for op in kernel.picker.candidates] == ["flash"] + ["cuDNN"] * (not deterministic)
    assert (kernel.picker.candidates[0].backward is CUDA_FLASH.backward) != deterministic
