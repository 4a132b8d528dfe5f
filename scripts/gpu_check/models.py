"""Models whose layers or messages need packages for GPUs: Mamba, experts behind the flex dispatcher, specs of
TransformerEngine alone.

One GPU shows that a model trains. With two, two ranks must have the losses of one, or of another dispatcher.
"""

import importlib.util
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_check.steps import LeftOut
from gpu_check.table import Row
from gpu_check.training import last_line, megatron_cp

STEPS = 10
BOUND = 1e-2
"""Largest difference of a loss in bfloat16, relative."""

RECIPE = """
extends: quickstart
LAUNCH:
  entry: {entry}
MODEL_ARGS:
  --mock-data: true
  --split: 1,0,0
  --train-iters: {steps}
  --lr-warmup-iters: 1
"""
ENTRY = "megatron_cp.pretrain_gpt"
HYBRID = str(Path(__file__).with_name("hybrid.py"))
TE = ("megatron", "transformer_engine")
TE_LAYERS = "--transformer-impl transformer_engine --bf16"


class Model(NamedTuple):
    """A model that trains, and the two runs whose losses must be equal.

    one:  flags of the run that the other is compared with
    ranks: of that run; the other has two
    two:  flags of the run on two ranks
    """

    case: str
    packages: tuple[str, ...]
    entry: str
    flags: str
    one: str = "--context-parallel-size 1"
    ranks: int = 1
    two: str = "--context-parallel-size 2"


MODELS = (
    # which a CPU has too
    Model("HybridModel, `*-*-`", ("megatron",), HYBRID, "--hybrid-layer-pattern *-*-"),
    Model(
        "HybridModel with Mamba layers, `M*M-`",
        (*TE, "mamba_ssm", "einops"),
        HYBRID,
        f"{TE_LAYERS} --hybrid-layer-pattern M*M- --mamba-num-groups 2",
    ),
    # norms inside linears, and all experts in one product
    Model(
        "latent attention and grouped experts of TransformerEngine",
        TE,
        ENTRY,
        f"{TE_LAYERS} --multi-latent-attention --qk-layernorm --kv-lora-rank 32 --qk-head-dim 32 "
        "--qk-pos-emb-head-dim 16 --v-head-dim 32 --rope-type rope --group-query-attention=false "
        "--num-query-groups=false --kv-channels=false --num-experts 4 --moe-router-topk 2 --moe-grouped-gemm "
        "--moe-token-dispatcher-type alltoall",
    ),
    Model(
        "experts behind the flex dispatcher",
        (*TE, "deep_ep"),
        ENTRY,
        f"{TE_LAYERS} --context-parallel-size 1 --num-experts 4 --moe-router-topk 2 --moe-router-dtype fp32 "
        "--moe-grouped-gemm --expert-model-parallel-size 2",
        one="--moe-token-dispatcher-type alltoall",
        ranks=2,
        two="--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
    ),
)


def models(device: str) -> Iterator[Row]:
    """Train each model, and with two devices compare the losses of two ranks."""
    return rows(MODELS, device)


def rows(asked: Iterable[Model], device: str) -> Iterator[Row]:
    """Return the row of each of these models, left out by the name of what is missing."""
    for model in asked:
        try:
            _check(model, device)
            yield _row(model, device)
        except LeftOut as reason:
            yield Row(model.case, {"": str(reason)}, "left out")
        except ImportError as error:
            yield Row(model.case, {"": f"needs the package {error.name or error}"}, "left out")


def _check(model: Model, device: str) -> None:
    for package in model.packages:
        if importlib.util.find_spec(package) is None:
            raise LeftOut(f"needs the package {package}")
    if device != "cuda" and len(model.packages) > 1:
        raise LeftOut("needs a CUDA GPU: kernels of these layers")
    if model.ranks > _devices(device):
        raise LeftOut(f"needs {model.ranks} CUDA GPUs: messages between them")


def _devices(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else 2


def _row(model: Model, device: str) -> Row:
    first = _losses(model, model.ranks, model.one)
    if isinstance(first, str):
        return Row(model.case, {"": first}, "failed")
    figures: dict[str, str | float | int] = {"first loss": first[0], "last loss": first[-1]}
    good = first[-1] < first[0]
    if _devices(device) >= 2:
        second = _losses(model, 2, model.two)
        if isinstance(second, str):
            return Row(model.case, {**figures, "two ranks": second}, "failed")
        # later steps of a run in bfloat16 go their own way
        figures["two ranks differ by"] = apart = max(abs(b / a - 1) for a, b in zip(first[:5], second[:5], strict=True))
        good = good and apart <= BOUND
    return Row(f"{model.case}, {STEPS} steps", figures, "ok" if good else "wrong")


def _losses(model: Model, ranks: int, flags: str) -> list[float] | str:
    """The loss of each step, or the last line of a run that failed."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "model.yaml")
        recipe.write_text(RECIPE.format(entry=model.entry, steps=STEPS))
        words = [*model.flags.split(), *flags.split(), "--nproc-per-node", str(ranks), "--save", folder]
        ran = megatron_cp("train", str(recipe), *words, folder=folder)
    told = ran.stdout + ran.stderr
    if ran.returncode:
        return last_line(told, ran.returncode)
    return [float(value) for value in re.findall(r"lm loss: ([\d.E+-]+)", told)]
