"""Forwards of experts beside backwards: DualPipe's pairs as plans, and the same step with their halves in turn."""

import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from gpu_check.models import BOUND
from gpu_check.steps import LeftOut
from gpu_check.table import Row
from gpu_check.training import last_line, megatron_cp

RANKS = 4
FLAG = "--overlap-moe-expert-parallel-comm"
RECIPE = """
extends: quickstart
LAUNCH:
  --nproc-per-node: 4
MODEL_ARGS:
  --mock-data: true
  --split: 1,0,0
  --lr-warmup-iters: 1
  --bf16: true
  --context-parallel-size: 1
  --pipeline-model-parallel-size: 2
  --pp-schedule: dualpipe
  --expert-model-parallel-size: 2
  --moe-token-dispatcher-type: alltoall
  --moe-router-topk: 2
"""
SMALL = "--train-iters 4 --num-experts 4 --global-batch-size 16 --micro-batch-size 2"
# some hundred microseconds of products in each node of a plan
LARGE = (
    "--train-iters 12 --num-experts 16 --num-layers 8 --hidden-size 2048 --ffn-hidden-size 4096 "
    "--num-attention-heads 16 --num-query-groups 4 --seq-length 4096 --max-position-embeddings 4096 "
    "--global-batch-size 32 --micro-batch-size 1"
)


def combined(device: str) -> Iterator[Row]:
    """Train with two stages of experts on two ranks each, and put the time of a step with pairs beside that in turn."""
    if importlib.util.find_spec("megatron") is None:
        raise LeftOut("needs the package megatron")
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        raise LeftOut(f"needs {RANKS} CUDA GPUs: two stages of experts on two ranks each")
    runs = {}
    for name, flags in (("in turn", ()), ("pairs", (FLAG,))):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder, "combined.yaml")
            recipe.write_text(RECIPE)
            words = (LARGE if device == "cuda" else SMALL).split()
            ran = megatron_cp("train", str(recipe), *words, *flags, "--save", folder, folder=folder)
        runs[name] = told = ran.stdout + ran.stderr
        if ran.returncode:
            yield Row(name, {"": last_line(told, ran.returncode)}, "failed")
            return
    losses, times = ({name: _found(what, told) for name, told in runs.items()} for what in (LOSS, TIME))
    # later steps of a run in bfloat16 go their own way
    apart = max(abs(b / a - 1) for a, b in zip(*(each[:5] for each in losses.values()), strict=True))
    figures: dict[str, str | float | int] = {"losses differ by": apart}
    figures |= {f"ms per step, {name}": median(each[2:]) for name, each in times.items()}
    yield Row(f"dualpipe on {RANKS} ranks", figures, "ok" if apart <= BOUND else "wrong")


LOSS, TIME = r"lm loss: ([\d.E+-]+)", r"elapsed time per iteration \(ms\): ([\d.]+)"


def _found(what: str, told: str) -> list[float]:
    return [float(value) for value in re.findall(what, told)]
