"""Train through the real `pretrain()` with TransformerEngine's layers or Megatron's local ones, from equal weights."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from megatron_cp.megatron.layers.specs import NORM_KEYS
from megatron_cp.megatron.rebind import Replaced, replace, restore_all
from tests.megatron import pretraining, spec_run
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks, run_ranks_with_log
from tests.te import stand_in

TE, LOCAL = "transformer_engine", "local"
TE_LINEARS = ("TELayerNormColumnParallelLinear", "TERowParallelLinear")


class Ran(NamedTuple):
    """What a rank saw of a run.

    log:        losses and gradient norms of each iteration
    parameters: by the local spec's names
    forwards:   how often a module of each class ran
    calls:      how often each operation of the stand-in did, and `backward_dw`
    """

    log: list[dict[str, Any]]
    parameters: dict[str, torch.Tensor]
    forwards: Counter[str]
    calls: Counter[str]


def local_name(name: str) -> str:
    """Return the local spec's name of a parameter."""
    for ours, theirs in NORM_KEYS.items():
        name = name.replace(theirs, ours)
    return re.sub(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)", r"experts.local_experts.\3.\1.\2", name)


def trained(flags: list[str], implementation: str, fused: bool = False) -> Ran:
    """Train on this rank with these layers; `fused` has the linears add weight gradients to `main_grad` themselves."""
    stand_in.CALLS.clear()
    with replaced(implementation, fused), counted_forwards() as forwards:
        log, parameters = pretraining.trained([*flags, "--transformer-impl", implementation])
    return Ran(log, {local_name(name): value for name, value in parameters}, forwards, stand_in.CALLS)


def _trained_hybrid(flags: str, implementation: str) -> Counter[str]:
    with replaced(implementation), counted_forwards() as forwards:
        spec_run.train(f"{flags} --transformer-impl {implementation}", name="hybrid_stack_spec")
    return forwards


def trained_hybrid(flags: str, implementation: str) -> tuple[list[float], Counter[str]]:
    """Return the printed losses of a HybridModel on two ranks, and how often a module of each class ran."""
    (forwards, _), log = run_ranks_with_log(2, _trained_hybrid, flags, implementation)
    return spec_run.losses(log), forwards


@contextlib.contextmanager
def counted_forwards() -> Iterator[Counter[str]]:
    """Count the forward passes of each class of modules."""
    forwards: Counter[str] = Counter()
    counting = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: forwards.update([type(module).__name__])
    )
    try:
        yield forwards
    finally:
        counting.remove()


@contextlib.contextmanager
def replaced(implementation: str, fused: bool = False) -> Iterator[None]:
    """Let the launcher take `--transformer-impl` as it is on a machine without GPUs; draw weights by local names."""
    done: list[Replaced] = []
    try:
        done.append(replace("tests.megatron.pretraining:_drawn", _by_local_name))
        if implementation == TE:
            done.append(replace("megatron_cp.megatron.arguments.checks:WITHOUT_TE", _without_the_implementation))
            base = "transformer_engine.pytorch.module.base:TransformerEngineBaseModule"
            done.append(replace(f"{base}.backward_dw", _counted))
        if fused:
            done.append(replace("tests.megatron.pretraining:start_from_names", _and_fuse))
        yield
    finally:
        restore_all(done)


def _by_local_name(drawn: Any) -> Any:
    return lambda name, shape: drawn(local_name(name), shape)


def _without_the_implementation(entries: Sequence[tuple[str, Any, str]]) -> tuple[tuple[str, Any, str], ...]:
    return tuple(entry for entry in entries if entry[0] != "transformer_impl")


def _counted(backward_dw: Any) -> Any:
    def counted(module: Any) -> None:
        stand_in.CALLS.update(["backward_dw"])
        backward_dw(module)

    return counted


def _and_fuse(start_from_names: Any) -> Any:
    def fuse(models: list[torch.nn.Module]) -> list[torch.nn.Module]:
        for module in (module for model in models for module in model.modules()):
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
        return models

    def start(config: Any) -> None:
        start_from_names(config)
        config.pre_wrap_hooks.append(fuse)

    return start


def run(world_size: int, implementation: str, *flags: str, fused: bool = False) -> list[Ran]:
    """Return what every rank saw of a run with our attention."""
    return run_ranks(world_size, trained, tiny("--cp-comm-type zigzag", *flags), implementation, fused)


def losses(ranks: list[Ran]) -> list[float]:
    """Return the loss of each iteration, from the rank that knows it."""
    return next([step["loss"] for step in ran.log] for ran in ranks if ran.log[0]["loss"] is not None)


def grad_norms(ranks: list[Ran]) -> list[float]:
    """Return the gradient norm of each iteration."""
    return [step["grad_norm"] for step in ranks[0].log]
