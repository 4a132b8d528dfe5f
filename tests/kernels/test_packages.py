"""Kernels of packages: called as each recorded release wants, equal to dense attention, refused where unknown."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.errors import CannotRun
from megatron_cp.kernels import KERNELS, aten, choose, flash_attn_4, packages
from megatron_cp.kernels.aten import CUDA_FLASH, cudnn
from megatron_cp.kernels.flash_attn import flash_op
from megatron_cp.kernels.flash_attn_3 import flash_3_op
from megatron_cp.kernels.flash_attn_4 import flash_4_op
from megatron_cp.kernels.fused import FusedKernel, Only
from megatron_cp.kernels.packages import UNCHECKED, Package
from megatron_cp.kernels.reference import ReferenceKernel
from megatron_cp.kernels.transformer_engine import fused_op
from tests.cases import slow_unless
from tests.context.dense import dense, problem, relative_error
from tests.context.test_backends import assert_equals_dense, sharded
from tests.kernels import stand_ins
from tests.kernels.stand_ins import RECORDED, with_signature

ADAPTERS = {
    "flash-attn": (stand_ins.flash_attn, flash_op),
    "flash_attn_3": (stand_ins.flash_attn_3, flash_3_op),
    "flash-attn-4": (stand_ins.flash_attn_4, flash_4_op),
    "transformer-engine": (stand_ins.transformer_engine, fused_op),
}
RELEASES = [(package, release) for package in ADAPTERS for release in RECORDED["packages"][package]]
NEWEST = [(package, [*RECORDED["packages"][package]][-1]) for package in ADAPTERS]
OLDEST_FLASH = ("flash-attn", "2.6.0.post1")
EARLY_FLASH_3 = ("flash_attn_3", "commit c082294")
# what the reference computes in float64 it computes alike, called directly or through an adapter
EXACT = 1e-13


def kernel_of(package, release):
    stand_in, make = ADAPTERS[package]
    return FusedKernel(package, Only(make(stand_in(release), deterministic=True)))


def both(kernel, task, **mask):
    how = {"scale": task.q.shape[3] ** -0.5, "causal": False, **mask}
    out, lse = kernel.forward(task.q, task.k, task.v, **how)
    return out, lse, *kernel.backward(task.dout, task.q, task.k, task.v, out, lse, **how)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("package", "release"), RELEASES)
def test_every_recorded_release_is_called_as_it_wants(package, release, causal):
    task = problem(24, 8, 2, causal=causal)
    out, _, *grads = both(kernel_of(package, release), task, causal=causal)
    for found, expected in zip((out, *grads), dense(task), strict=True):
        assert relative_error(found, expected) <= EXACT


WINDOWS = [(5, 0), (0, None), (3, 2), (None, 0)]


def oblong(queries, keys):
    task, other = problem(queries, 8, 2, causal=False), problem(keys, 8, 2, causal=False, seed=1)
    return task._replace(k=other.k, v=other.v)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("package", "release"), [OLDEST_FLASH, EARLY_FLASH_3, *NEWEST[:3]])
def test_a_window_is_one_call_of_the_package(package, release, window):
    kernel = kernel_of(package, release)
    assert kernel.windows
    for task in (oblong(24, 24), oblong(24, 31)):
        found, expected = both(kernel, task, window=window), both(ReferenceKernel(), task, window=window)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) <= EXACT


def test_transformer_engine_s_kernel_takes_no_windows():
    assert not kernel_of(*NEWEST[3]).windows


@pytest.mark.parametrize("window", [None, (5, None)], ids=["causal", "window"])
@pytest.mark.parametrize("backend", slow_unless(["zigzag"], ["zigzag", "striped", "ulysses", "all-gather", "fpdt"]))
@pytest.mark.parametrize(("package", "release"), [OLDEST_FLASH, EARLY_FLASH_3, *NEWEST])
def test_backends_equal_dense_through_the_package(package, release, backend, window):
    task, kernel = problem(36, 8, 2, causal=True)._replace(window=window), kernel_of(package, release)
    assert_equals_dense(in_process(3, lambda fabric: sharded(fabric, task, backend, kernel=kernel)), task)


@pytest.mark.parametrize(("package", "make"), [(name, make) for name, (_, make) in ADAPTERS.items()])
def test_another_signature_is_refused_before_a_call(package, make):
    changed = ADAPTERS[package][0]([*RECORDED["packages"][package]][-1])
    for name in [name for name in vars(changed) if name.lstrip("_").startswith(("flash", "fused_attn"))]:
        setattr(changed, name, with_signature(name, "q, k, v, mystery", None))
    with pytest.raises(CannotRun, match=r"(takes q, k, v, mystery|has no ).*use kernel 'auto'"):
        make(changed, deterministic=True)


# ---- torch: by the schemas of its ops

# newest first: what is installed here comes last
TORCH = [*RECORDED["torch"]]


@pytest.mark.parametrize("release", TORCH)
def test_torch_s_ops_take_what_is_passed_in_every_recorded_release(release):
    recorded = RECORDED["torch"][release]
    assert {name: aten.positional(recorded[name]) for name in aten.POSITIONAL} == aten.POSITIONAL
    for name in aten.POSITIONAL:
        by_name = {one.name for one in torch._C.parse_schema(recorded[name]).arguments if one.kwarg_only}
        windows = {"window_size_left", "window_size_right"} if name.startswith("_flash") else set()
        assert {"scale"} | windows <= by_name


def test_the_installed_torch_has_these_schemas():
    assert [aten.other_schema(device) for device in ("cpu", "cuda")] == [None, None]


@pytest.mark.parametrize("op", [CUDA_FLASH, cudnn()], ids=["flash", "cudnn"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("release", TORCH)
def test_torch_s_cuda_ops_are_called_as_each_release_wants(monkeypatch, release, op, causal):
    monkeypatch.setattr(aten, "aten", stand_ins.torch_ops(release))
    task = problem(24, 8, 2, causal=causal)
    out, _, *grads = both(FusedKernel("torch", Only(op)), task, causal=causal)
    for found, expected in zip((out, *grads), dense(task), strict=True):
        assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("release", TORCH)
def test_a_window_is_one_call_of_torch_s_flash_op(monkeypatch, release, window):
    monkeypatch.setattr(aten, "aten", stand_ins.torch_ops(release))
    for task in (oblong(24, 24), oblong(24, 31)):
        found = both(FusedKernel("torch", Only(CUDA_FLASH)), task, window=window)
        for ours, theirs in zip(found, both(ReferenceKernel(), task, window=window), strict=True):
            assert relative_error(ours, theirs) <= EXACT


def test_a_torch_with_another_op_is_passed_over(monkeypatch):
    changed = {**aten.POSITIONAL, "_flash_attention_forward": ["query", "something"]}
    monkeypatch.setattr(aten, "POSITIONAL", changed)
    aten.other_schema.cache_clear()
    try:
        how = {"device": "cuda", "dtype": "bfloat16", "head_dim": 64}
        with pytest.raises(
            CannotRun, match=r"'torch' knows another _flash_attention_forward than .* which takes query"
        ):
            choose("torch", **how)
        kernel, why = choose("auto", **how)
        assert kernel.name == "reference"
        assert "knows another _flash_attention_forward" in why
    finally:
        aten.other_schema.cache_clear()


# ---- releases and machines


@pytest.fixture
def has(monkeypatch):
    """Pretend that these packages are installed, and that the environment has these variables."""

    def pretend(versions, **environment):
        monkeypatch.setattr(packages, "installed", versions.get)
        monkeypatch.setattr(packages.config, "variable", lambda name, default="": environment.get(name, default))

    return pretend


HALF = {"device": "cuda", "dtype": "bfloat16", "head_dim": 64}


@pytest.mark.parametrize(
    ("kernel", "package", "version"),
    [
        ("flash", "flash-attn", "2.9.0"),
        ("flash", "flash-attn", "2.5.9.post1"),
        ("flash", "flash-attn", "2.60.1"),
        ("flash-3", "flash_attn_3", "3.1.0"),
        ("flash-4", "flash-attn-4", "4.0.0b37"),
        ("te", "transformer-engine", "3.0.0"),
    ],
)
def test_a_release_that_was_never_checked_is_refused_by_name_with_a_way_out(has, kernel, package, version):
    has({package: version})
    with pytest.raises(CannotRun) as refused:
        choose(kernel, **HALF)
    assert f"not with the {version} that is installed; install one of these or set {UNCHECKED}=1" in str(refused.value)
    # allowed, it is tried: here it does not load
    has({package: version}, **{UNCHECKED: "1"})
    with pytest.raises(CannotRun, match="is installed but does not load"):
        choose(kernel, **HALF)


@pytest.mark.parametrize("version", ["2.6.3", "2.8.3.post2", "2.8.3+cu12torch2.8cxx11abifalse"])
def test_checked_releases_and_their_builds_are_known(version):
    assert Package("flash-attn", ("2.6", "2.8"), "").knows(version)


def test_every_recorded_release_is_one_that_the_kernels_know():
    for entry in KERNELS:
        package = getattr(entry.load(), "PACKAGE", None)
        if package is None or package.name == "flash_attn_3":
            continue
        recorded = [*RECORDED["packages"][package.name]]
        assert all(package.knows(release) for release in recorded)
        assert all(any(Package("", (known,), "").knows(release) for release in recorded) for known in package.checked)


def test_flash_attn_4_alone_is_no_flash_attn(has):
    has({"flash-attn-4": "4.0.0b36"})
    with pytest.raises(CannotRun, match=r"needs the flash-attn package \(pip install 'megatron-cp\[flash\]'\)"):
        choose("flash", **HALF)


def test_auto_passes_an_unchecked_release_over_and_says_so(has, monkeypatch):
    from megatron_cp.kernels import measured

    entry = measured.Measured((9, 0), ("flash-3",), "", "an H100")
    monkeypatch.setattr(measured, "measured", lambda device: entry)
    monkeypatch.setattr(measured, "capability", lambda device: (9, 0))
    has({"flash_attn_3": "3.7"})
    kernel, why = choose("auto", **HALF)
    assert kernel.name == "torch"
    assert "'flash-3' was checked with flash_attn_3" in why
    assert "in the order measured on an H100" in why


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that this machine has a GPU of this compute capability."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    return pretend


@pytest.mark.parametrize(
    ("kernel", "capability", "message"),
    [
        ("torch", (7, 5), "needs an Ampere GPU or a later one, compute capability 8.0; a GPU has 7.5"),
        ("flash", (7, 0), "needs an Ampere GPU or a later one"),
        ("te", (7, 0), "needs an Ampere GPU or a later one"),
        ("flash-3", (8, 0), "needs a Hopper GPU or a later one, compute capability 9.0; a GPU has 8.0"),
        ("flash-4", (8, 9), "needs a Hopper GPU or a later one"),
    ],
)
def test_an_older_gpu_is_one_line_with_a_way_out(has, gpu, kernel, capability, message):
    has({"flash-attn": "2.8.3", "flash_attn_3": "3.0.0", "flash-attn-4": "4.0.0b36", "transformer-engine": "2.20.2"})
    gpu(*capability)
    with pytest.raises(CannotRun) as refused:
        choose(kernel, **HALF)
    assert message in str(refused.value)
    assert str(refused.value).endswith("reference")
    assert "\n" not in str(refused.value)


def test_auto_says_whether_a_gpu_was_measured(gpu):
    gpu(8, 0)
    assert "no kernels were measured on compute capability 8.0, in the registry's order" in choose("auto", **HALF)[1]
    gpu(9, 0)
    assert (
        "'torch' for bfloat16 with head dim 64 on cuda: in the order measured on an H100" in choose("auto", **HALF)[1]
    )


def test_flash_4_gets_head_dims_of_which_its_gradients_are_right(monkeypatch):
    stand_in = stand_ins.flash_attn_4("4.0.0b36")
    monkeypatch.setattr(flash_attn_4, "loaded", lambda load, package: stand_in)
    kernel = flash_attn_4.create(device="cuda", deterministic=False)
    for one in (kernel, kernel.for_backward()):
        widths = [one._width(*[SimpleNamespace(shape=(8, 1, 2, dim), is_cuda=True)] * 2) for dim in (64, 72, 100, 128)]
        assert widths == [64, 96, 128, 128]
