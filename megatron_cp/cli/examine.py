"""Examine this machine: report what it has, what is missing, and how to repair it."""

import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from ctypes.util import find_library

from megatron_cp.context import BACKENDS, DEFAULT
from megatron_cp.findings import OLDEST_TORCH, UPGRADE_TORCH, Finding, guarded, installed, reaches
from megatron_cp.kernels import KERNELS
from megatron_cp.pipeline import SCHEDULES

# the oldest whose layers pass the tests with our attention: scripts/te.sh
OLDEST_TE = (2, 5)


def examine(tell: Callable[[str], None] = lambda doing: None) -> Iterator[Finding]:
    """Examine everything, beginning with the cheapest checks; `tell` is called before what takes seconds."""
    for look in (
        _python,
        _torch,
        _megatron,
        _optional_packages,
        _kernels,
        _plugins,
        _devices,
        _communication,
        _hooks,
        _parity,
        _between,
    ):
        if look in TAKE_SECONDS:
            tell(TAKE_SECONDS[look])
        yield from guarded(look.__name__.strip("_").replace("_", " "), look)


def _python() -> Iterator[Finding]:
    fits = sys.version_info >= (3, 12)
    yield Finding(
        "python",
        "ok" if fits else "broken",
        platform.python_version(),
        "" if fits else "megatron-core 0.19 needs Python 3.12 or later; bash scripts/train.sh finds one",
    )


def _torch() -> Iterator[Finding]:
    yield _package("torch", at_least=OLDEST_TORCH, remedy=UPGRADE_TORCH)


def _megatron() -> Iterator[Finding]:
    version = installed("megatron-core")
    fits = version is not None and version.startswith("0.19.")
    yield Finding(
        "megatron-core",
        "ok" if fits else "broken",
        version or "not installed",
        "" if fits else "pip install 'megatron-core>=0.19,<0.20', on Python 3.12 or later",
    )
    checkout = importlib.util.find_spec("pretrain_gpt") is not None
    yield Finding(
        "Megatron-LM checkout",
        "ok" if checkout else "optional",
        "on the path" if checkout else "not on the path: the wheel has no pretrain_gpt.py",
        "" if checkout else "start with -m megatron_cp.pretrain_gpt, or name your checkout's pretrain_gpt.py by path",
    )


def _optional_packages() -> Iterator[Finding]:
    for package, gives, remedy in (
        ("transformer-engine", "fused layers and FP8", "pip install 'megatron-cp[te]' on a machine with a GPU"),
        (
            "apex",
            "fused optimizers",
            "optional: Megatron falls back to torch's optimizers, and we repair resuming with them",
        ),
        ("tokenizers", "tokenizer.json for data build", "pip install 'megatron-cp[tokenizers]'"),
        ("sentencepiece", "SentencePiece models for data build", "pip install 'megatron-cp[tokenizers]'"),
        ("tiktoken", "tiktoken files for data build", "pip install 'megatron-cp[tokenizers]'"),
    ):
        version = installed(package)
        if version and package == "transformer-engine":
            yield _package(package, OLDEST_TE, "pip install --upgrade 'megatron-cp[te]', or --transformer-impl local")
            continue
        yield Finding(
            package,
            "ok" if version else "optional",
            version or f"not installed; brings {gives}",
            "" if version else remedy,
        )


def _kernels() -> Iterator[Finding]:
    """Look at the packages that bring kernels: installed, and of a release that was checked."""
    for entry in KERNELS:
        package = getattr(entry.load(), "PACKAGE", None)
        if package is None:
            continue
        version, lacks = installed(package.name), package.missing()
        found = f"{package.name} {version}" if version else f"{package.name} is not installed"
        yield Finding(f"kernel {entry.name}", "optional" if lacks else "ok", found, lacks or "")


def _plugins() -> Iterator[Finding]:
    """Look at the entries that other packages bring."""
    for registry in (BACKENDS, SCHEDULES, KERNELS):
        for plugin in registry.plugins:
            yield Finding(
                f"{registry.kind} {plugin.name}",
                "broken" if plugin.fault else "ok",
                plugin.fault or f"from {plugin.package}",
                "mend the package or uninstall it" if plugin.fault else "",
            )


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built and find_library("cuda") is None:
            remedy = "none needed for a CPU run; with a GPU, install its driver or give the container access to it"
            yield Finding("GPUs", "optional", f"libcuda, which the driver brings, is missing (CUDA {built})", remedy)
            return
        remedy = "none needed for a CPU run; with a GPU in this machine, look at nvidia-smi and the driver's version"
        yield Finding("GPUs", "optional", f"none that torch {torch.__version__} (CUDA {built}) can use", remedy)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        able = facts.major >= 8
        yield Finding(
            f"GPU {index}",
            "ok" if able else "broken",
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}",
            "" if able else "the fused kernels need compute capability 8.0; pass --cp-kernel reference",
        )
    models = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    if len(models) > 1:
        remedy = "run on GPUs of one model: all ranks wait for the slowest, and kernels are chosen alike on all of them"
        yield Finding("GPU models", "broken", f"{len(models)} in one machine: {', '.join(models)}", remedy)
    yield from _settings()


def _settings() -> Iterator[Finding]:
    from megatron_cp.megatron.machine.environment import advised_for_receives

    missing = advised_for_receives()
    found = f"without {' and '.join(missing)}" if missing else "as receives in flight need them"
    remedy = f"with --pp-schedule: export {' '.join(missing)}" if missing else ""
    yield Finding("allocator and loader", "optional" if missing else "ok", found, remedy)


def _communication() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    gloo = dist.is_available() and dist.is_gloo_available()
    yield Finding(
        "gloo", "ok" if gloo else "broken", "built in" if gloo else "missing", "" if gloo else "install PyPI's torch"
    )
    nccl = dist.is_available() and dist.is_nccl_available()
    needed = torch.cuda.is_available()
    found = ".".join(map(str, torch.cuda.nccl.version())) if nccl and needed else "built in" if nccl else "missing"
    yield Finding(
        "NCCL",
        "ok" if nccl else "broken" if needed else "optional",
        found,
        "" if nccl else "install a CUDA build of torch",
    )


def _hooks() -> Iterator[Finding]:
    from megatron_cp.megatron.hooks import HOOKS, is_on, probe

    with warnings.catch_warnings():
        # Megatron warns about missing optional packages, which are findings already
        warnings.simplefilter("ignore")
        reasons = {hook.name: probe(hook) for hook in HOOKS}
    for hook in HOOKS:
        reason = reasons[hook.name]
        yield Finding(
            f"hook {hook.name}",
            "broken" if reason else "ok",
            reason or ("on" if is_on(hook) else "fits, off") + f": {hook.reason}",
            "install megatron-core 0.19, for which the hooks were written" if reason else "",
        )


def _parity() -> Iterator[Finding]:
    """Compare every backend on two ranks, threads of this process, with attention on one rank."""
    from megatron_cp.bench.parity import deviation

    for backend in BACKENDS.names:
        error = deviation(backend, ranks=2)
        fine = error <= 1e-12
        yield Finding(
            f"backend {backend}",
            "ok" if fine else "broken",
            f"deviates by {error:.1e} from attention on one rank (float64, forward and backward)",
            "" if fine else "do not train with it; please report it with the output of megatron-cp doctor --json",
        )


def _between() -> Iterator[Finding]:
    """Run one step between two processes of this machine, over its real links."""
    from megatron_cp.bench.comparison import AttentionShape
    from megatron_cp.bench.context import Selection, bench

    row = bench(Selection((DEFAULT,)), 2, [AttentionShape(512)], rounds=1).rows[-1]
    yield Finding("two processes", "ok", f"zigzag agrees with attention on one rank to {row.max_error:.1e} (float32)")


TAKE_SECONDS = {
    _hooks: "imports Megatron and tries the hooks",
    _parity: "runs one step of every backend",
    _between: "starts two processes, and runs one step between them",
}


def _package(name: str, at_least: tuple[int, ...], remedy: str) -> Finding:
    version = installed(name)
    if version is None:
        return Finding(name, "broken", "not installed", remedy)
    fits = reaches(version, at_least)
    return Finding(name, "ok" if fits else "broken", version, "" if fits else remedy)
