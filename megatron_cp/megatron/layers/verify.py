"""Check after the model is built that every layer has our attention, linears and experts, and print what runs."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from megatron_cp.comm import fabric_of, values_of_all
from megatron_cp.errors import CannotRun
from megatron_cp.megatron.experts.dispatcher import ExchangingLayer, LoopDispatcher, TwoHopDispatcher
from megatron_cp.megatron.experts.grouped_mlp import GroupedMLP
from megatron_cp.megatron.experts.placement import PlacedLayer
from megatron_cp.megatron.experts.residual import ResidualLayer
from megatron_cp.megatron.experts.router import FirstComeRouter
from megatron_cp.megatron.experts.tuned import TunedLayer
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.layers.attention import CoreAttention
from megatron_cp.megatron.machine.facts import device_of_run
from megatron_cp.megatron.tensor.linears import OutputLinear, output_layers

LINE = 400
"""Bytes of what a rank says to all others."""
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def verify_models[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Verify every attention of the model chunks and print on rank 0 what runs; a post-wrap hook for Megatron.

    Raises RuntimeError naming the layers whose core attention is not ours: with context parallelism such a layer
    would see only this rank's tokens, or cut the sequence in another way. The same holds for linears, where
    --tp-comm-type asks for ours, for local experts, where --moe-grouped-gemm does, and for exchange, placement and
    router of experts, where --moe-comm-type, --moe-pieces, --moe-placement and --moe-router do.
    """
    cores = core_attentions(models)
    foreign = [f"{name} ({type(core).__name__})" for name, core in cores if not isinstance(core, CoreAttention)]
    if foreign:
        raise CannotRun(
            f"some layers do not have megatron-cp's attention: {', '.join(foreign)}; "
            f"all layers must have it, check --spec and how multi-token prediction is built"
        )
    device = device_of_run()
    parts = [*verify_linears(models), *verify_experts(models, device), *verify_exchange(models)]
    parts += [*verify_placement(models), *verify_router(models)]
    parts += check_attention(models, cores, device)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for line in (*banner(cores, device), *parts):
            print(f"[megatron-cp] {line}", flush=True)
    return models


def check_attention(models: Iterable[nn.Module], cores: Sequence[tuple[str, nn.Module]], device: str) -> list[str]:
    """Return a line for each attention that a small batch shows to be right, where the run asks for --cp-self-check.

    Raises RuntimeError on every rank, with the tensor, the rank and the error, where any rank's is wrong.
    """
    config = next((module.config for model in models for module in model.modules() if hasattr(module, "config")), None)
    if not AttentionFlags.of(config).self_check:
        return []
    ours = [core for _, core in cores if isinstance(core, CoreAttention)]
    distinct = {(core.describe(device).partition(" (")[0], core.window): core for core in ours}
    found = {
        what if window is None else f"{what}, window {window}": core.deviation(torch.device(device))
        for (what, window), core in distinct.items()
    }
    here = f"rank {torch.distributed.get_rank()}" if torch.distributed.is_initialized() else "this rank"
    what, made = max(found.items(), key=lambda pair: pair[1].error / pair[1].bound, default=("", None))
    text = ""
    if made and made.wrong:
        text = f"{made.tensor} of {what} on {here} is wrong by {made.error:.1e} of its largest value"
        text += f", and rounding is {made.bound:.1e}"
    if worst := worst_of_all(made.error if made else 0.0, text, torch.device(device)):
        raise CannotRun(f"--cp-self-check: {worst}; take another --cp-kernel or --cp-comm-type")
    return [
        f"self-check of {what}: {made.tensor} differs most, by {made.error:.1e} of {made.bound:.1e}"
        for what, made in found.items()
    ]


def worst_of_all(error: float, text: str, device: torch.device) -> str:
    """Return what the rank with the largest error says, cut to a line; all ranks of the run call it."""
    if not torch.distributed.is_initialized():
        return text
    row = [int(min(error, 1.0) * 2**60), *text.encode()[:LINE].ljust(LINE)]
    rows = values_of_all(fabric_of(torch.distributed.group.WORLD), device, row)
    # a rank that says nothing is right, however large its error is beside that of a finer dtype
    _, *said = max(rows, key=lambda one: (bool(bytes(one[1:]).strip()), one[0]))
    return bytes(said).decode(errors="replace").rstrip()


def core_attentions(models: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return name and core attention of every layer on this rank, including those of multi-token prediction."""
    return [
        (f"{name}.core_attention", module.core_attention)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]


def verify_linears(models: Sequence[nn.Module]) -> list[str]:
    """Return a line for what linears and one for what the output layer runs, none where they are Megatron's own.

    Raises RuntimeError naming those that are Megatron's where the model's config asks for ours.
    """
    linears = [
        (name, module)
        for model in models
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LINEARS and not getattr(module, "is_expert", False)
        if TensorFlags.of(getattr(module, "config", None)).ours
    ]
    foreign = [f"{name} ({type(module).__name__})" for name, module in linears if not getattr(module, "placed", None)]
    if foreign:
        raise CannotRun(f"some linears are Megatron's own beside --tp-comm-type: {', '.join(foreign)}; check --spec")
    outputs = [layer for layer in output_layers(models) if isinstance(layer, OutputLinear)]
    return [
        *sorted({f"linears of attention and MLPs: {module.placed.describe()}" for _, module in linears}),
        *sorted({f"output layer: {layer.placed.describe()}" for layer in outputs}),
    ]


def verify_experts(models: Iterable[nn.Module], device: str) -> list[str]:
    """Return a line for what multiplies the tokens of all experts of a rank on such a device; none for experts apart.

    Raises RuntimeError naming local experts that run one by one where the model's config asks for all at once.
    """
    experts = [
        (name, module)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, SequentialMLP)
    ]
    foreign = [
        f"{name} ({type(module).__name__})"
        for name, module in experts
        if _local_and_grouped(module.config) and not isinstance(module, GroupedMLP)
    ]
    if foreign:
        raise CannotRun(f"some experts run one by one beside --moe-grouped-gemm: {', '.join(foreign)}; check --spec")
    ours = [module for _, module in experts if isinstance(module, GroupedMLP)]
    return sorted({f"experts: {module.describe(device)}" for module in ours})


def verify_exchange(models: Iterable[nn.Module]) -> list[str]:
    """Return a line for how tokens travel to experts of other ranks; none where Megatron's dispatcher sends them.

    Raises RuntimeError naming layers with Megatron's exchange where the model's config asks for ours.
    """
    layers = [
        (name, module)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and ExpertFlags.of(module.config).exchanges
    ]
    if foreign := [name for name, module in layers if not isinstance(module, ExchangingLayer)]:
        raise CannotRun(
            f"some layers keep Megatron's exchange beside --moe-comm-type or --moe-pieces: {', '.join(foreign)}; "
            "check --spec"
        )
    return sorted({f"exchange of experts: {_exchange_of(layer)}" for _, layer in layers})


def verify_placement(models: Iterable[nn.Module]) -> list[str]:
    """Return a line for the copies of experts that ranks host; none where every expert is on its own rank alone.

    Raises RuntimeError naming layers without slots where the model's config asks for them.
    """
    layers = [
        (name, module)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and ExpertFlags.of(module.config).places
    ]
    if foreign := [name for name, module in layers if not isinstance(module, PlacedLayer)]:
        raise CannotRun(f"some layers have no slots beside --moe-placement: {', '.join(foreign)}; check --spec")
    return sorted({f"placement of experts: {layer.describe()}" for _, layer in layers})


def verify_router(models: Iterable[nn.Module]) -> list[str]:
    """Return a line for the experts that a token sees; none where Megatron's router chooses them.

    Raises RuntimeError naming layers with Megatron's router where the model's config asks for ours.
    """
    layers = [
        (name, module)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and ExpertFlags.of(module.config).drops
    ]
    if foreign := [name for name, module in layers if not _routes(module)]:
        raise CannotRun(f"some layers keep Megatron's router beside --moe-router: {', '.join(foreign)}; check --spec")
    return sorted({f"router of experts: {layer.router.describe()}" for _, layer in layers})


def _routes(layer: MoELayer) -> bool:
    mixes = ExpertFlags.of(layer.config).mixes
    return isinstance(layer.router, FirstComeRouter) and (not mixes or isinstance(layer, ResidualLayer))


def _exchange_of(layer: MoELayer) -> str:
    if isinstance(layer, TunedLayer) and layer.tuner:
        return layer.describe()
    dispatcher = layer.token_dispatcher
    if isinstance(dispatcher, (TwoHopDispatcher, LoopDispatcher)):
        return dispatcher.describe()
    flags = ExpertFlags.of(layer.config)
    asked = f"{flags.pieces} pieces" if flags.pieces > 1 else flags.exchange.name
    return f"{asked}, one rank, which has all experts"


def _local_and_grouped(config: Any) -> bool:
    return bool(config.moe_grouped_gemm and config.transformer_impl == "local")


def banner(cores: Sequence[tuple[str, nn.Module]], device: str) -> list[str]:
    """Return a line for each group of equal layers with what runs on such a device."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name, core in cores:
        assert isinstance(core, CoreAttention)
        # multi-token prediction counts its layers from 1 again
        kind = "MTP layer" if "mtp." in name else "layer"
        numbers.setdefault((kind, core.describe(device)), []).append(core.layer_number)
    return [f"{_layers(kind, group)}: {text}" for (kind, text), group in numbers.items()]


def _layers(kind: str, numbers: Iterable[int]) -> str:
    distinct = sorted(set(numbers))
    # consecutive numbers differ from their index by the same amount
    runs = [[number for _, number in run] for _, run in groupby(enumerate(distinct), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{kind}{'s' if len(distinct) > 1 else ''} {text}"
