"""Training on one device: two pipeline stages as two processes, and Megatron's own loop with our attention."""

import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_check.measure import error_of
from gpu_check.steps import LeftOut
from gpu_check.table import Row
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.channels import Channels, communicators
from megatron_cp.pipeline.execute import Carried, Executor, lower
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.saved import HostMover, SavedActivations, storages_of
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.schedules.pipedream import StepOfRun

ROOT = Path(__file__).resolve().parents[2]
MICROS = 4
STEPS = 3
"""Steps of a schedule whose steps end without a flush."""
WIDTH = 64


class Arrival:
    """A message that is staged through host memory: it is on the device after `wait`."""

    def __init__(self, work: Any, host: Tensor, buffer: Tensor | None) -> None:
        self._work, self._host, self._buffer = work, host, buffer

    def wait(self) -> None:
        self._work.wait()
        if self._buffer is not None:
            self._buffer.copy_(self._host)

    def done(self) -> bool:
        return False


class StagedPeer:
    """One communicator of gloo's, which knows host memory only."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, tensor: Tensor, peer: int) -> Arrival:
        host = tensor.cpu()
        return Arrival(dist.isend(host, group=self._group, group_dst=peer), host, None)

    def receive(self, buffer: Tensor, peer: int) -> Arrival:
        host = torch.empty_like(buffer, device="cpu")
        return Arrival(dist.irecv(host, group=self._group, group_src=peer), host, buffer)


class Layers:
    """A rank's stages, one layer each; the output of the last one of a pipe is the loss of a microbatch.

    first: number of the step's first microbatch in the run
    """

    first = 0

    def __init__(self, placement: Placement, rank: int, device: str) -> None:
        self._last, self._device = placement.last, device
        stages = placement.of_rank[rank]
        self.weights = {stage: weight_of(stage % placement.length, device) for stage in stages}
        self.gradients = {stage: torch.zeros(WIDTH, WIDTH, dtype=torch.float64, device=device) for stage in stages}
        self._waiting: dict[tuple[int, int], Tensor] = {}

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        made = torch.tanh(
            (inputs_of(self.first + micro, self._device) if given is None else given) @ self.weights[stage]
        )
        return made.square().sum() if self._last(stage) else made

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        weight = self.weights[stage]
        found = torch.autograd.grad(made, [weight] if given is None else [weight, given], gradient)
        self._waiting[stage, micro] = found[0]
        if not split:
            self.weight(stage, micro)
        return found[1] if given is not None else None

    def weight(self, stage: int, micro: int) -> None:
        self.gradients[stage] += self._waiting.pop((stage, micro))

    def reduce(self, stage: int) -> None: ...

    def buffer(self, micro: int) -> Tensor:
        return torch.empty(2, WIDTH, dtype=torch.float64, device=self._device)

    def shrink(self, made: Tensor) -> None: ...


def weight_of(stage: int, device: str) -> Tensor:
    """Return a stage's weights, equal in all processes."""
    made = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(stage))
    return (made / WIDTH**0.5).to(device).requires_grad_()


def inputs_of(micro: int, device: str) -> Tensor:
    """Return a microbatch, equal in all processes."""
    generator = torch.Generator().manual_seed(1000 + micro)
    return torch.randn(2, WIDTH, dtype=torch.float64, generator=generator).to(device)


def pipeline(device: str) -> Iterator[Row]:
    """Run every schedule on two processes that share the device, and compare the gradients with those of one."""
    names = [rule.name for rule in SCHEDULES if rule.table and not rule.lends]
    names += ["dapple-b, at most 2 chunks", "gis, at most 2 chunks"]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        results = [context.Queue() for _ in range(2)]
        processes = [
            context.Process(target=_rank, args=(rank, names, device, f"{folder}/store", results[rank]))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for name in names:
            answers = [result.get(timeout=60) for result in results]
            if failed := [answer for answer in answers if isinstance(answer, str)]:
                yield Row(name, {"": failed[0]}, "failed")
                return
            steps = steps_of(name)
            parts = steps[0].placement.length
            found = {part: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for part in range(parts)}
            for stage, gradient in (pair for answer in answers for pair in answer.items()):
                # of a part that two pipes have, the sum over both
                found[stage % parts] += torch.tensor(gradient, dtype=torch.float64)
            expected = _alone(len(found), device, len(steps) * MICROS)
            error = max(error_of(found[stage], expected[stage]) for stage in found)
            several = f", {len(steps)} steps without a flush" if len(steps) > 1 else ""
            yield Row(f"{name}, {len(found)} stages{several}", {"error": error}, "ok" if error <= 1e-12 else "wrong")
        for process in processes:
            process.join()


def steps_of(name: str) -> list[Schedule]:
    """Return the steps of a run on two ranks as an executor runs them, one where it ends with a flush.

    Behind a comma in the name stands how many chunks a rank keeps.
    """
    rule, _, moves = name.partition(", ")
    if SCHEDULES.get(rule).delay:
        steps = [StepOfRun(number == 0, STEPS - number) for number in range(STEPS)]
        return [lower(build(rule, 2, MICROS, step=step)) for step in steps]
    plan = Offload(2) if moves else None
    return [lower(build(rule, 2, MICROS, SCHEDULES.get(rule).chunks, moves=plan))]


def _rank(rank: int, names: list[str], device: str, store: str, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        for name in names:
            steps = steps_of(name)
            placement, carried = steps[0].placement, Carried()
            layers = Layers(placement, rank, device)
            peers = [StagedPeer(dist.new_group([0, 1])) for _ in communicators(placement)]
            channels = Channels(placement, rank, peers)
            channels.meet(torch.zeros(1, device=device))
            saved = _on_the_host(layers) if "," in name else None
            for number, step in enumerate(steps):
                layers.first = number * MICROS
                executor = Executor(placement, rank, layers, channels, saved=saved, carried=carried)
                executor.run(step.table[rank])
                carried = executor.leave(MICROS)
            assert saved is None or rank or saved.moved, "nothing moved to the host"
            # as lists: a tensor in a queue shares memory with a process that may be gone
            results.put({stage: gradient.cpu().tolist() for stage, gradient in layers.gradients.items()})
        dist.destroy_process_group()
    except Exception as error:
        results.put(f"rank {rank}: {type(error).__name__}: {error}")


def _on_the_host(layers: "Layers") -> SavedActivations:
    weights = list(layers.weights.values())
    return SavedActivations(HostMover(weights[0].device), weights[0].device, lambda: storages_of(weights))


def _alone(stages: int, device: str, micros: int) -> dict[int, Tensor]:
    """The gradients of one microbatch after another in one process."""
    weights = [weight_of(stage, device) for stage in range(stages)]
    totals = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64, device=device) for _ in weights]
    for micro in range(micros):
        made = inputs_of(micro, device)
        for weight in weights:
            made = torch.tanh(made @ weight)
        for total, gradient in zip(totals, torch.autograd.grad(made.square().sum(), weights), strict=True):
            total += gradient
    return {stage: total.cpu() for stage, total in enumerate(totals)}


def quickstart(device: str) -> Iterator[Row]:
    """Train the quickstart recipe, on a GPU in bfloat16, and put the estimate of its memory beside what it took."""
    _needs("megatron")
    yield _trained(device, "quickstart", *(["--bf16"] if device == "cuda" else []))
    if device == "cuda":
        with tempfile.TemporaryDirectory() as files:
            state = ["--use-distributed-optimizer", "--optimizer-state-dir", files, "--optimizer-state-weights"]
            yield _trained(device, "quickstart, the optimizer's state in files", "--bf16", *state)


def transformer_engine(device: str) -> Iterator[Row]:
    """Train the quickstart recipe with TransformerEngine's layers and our attention, in bfloat16 and in FP8."""
    _needs("megatron", "transformer_engine")
    if device != "cuda":
        raise LeftOut("needs a CUDA GPU: TransformerEngine's kernels")
    layers = ["--transformer-impl", "transformer_engine", "--bf16"]
    yield _trained(device, "TransformerEngine's layers, bfloat16", *layers)
    yield _trained(device, "TransformerEngine's layers, FP8", *layers, "--fp8-format", "hybrid")


def _needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise LeftOut(f"needs the package {package}")


MODEL = """
extends: [models/llama3.2-1b, training/gpus]
CLUSTER: dgx-h100-ib
LAUNCH:
  --nproc-per-node: 1
MODEL_ARGS:
  --mock-data: true
  --split: 1,0,0
  --seq-length: 8192
  --micro-batch-size: 1
  --global-batch-size: 4
  --train-iters: 8
  --lr: 3e-4
  --lr-warmup-iters: 1
  --lr-decay-style: constant
  --eval-interval: 1000
  --eval-iters: 0
  --log-interval: 1
  --log-memory-interval: 4
  --transformer-impl: local
  --cp-comm-type: p2p
"""


def model(device: str) -> Iterator[Row]:
    """Train Llama 3.2 1B at 8,192 tokens with Megatron's own layers, and put time and memory beside the estimate."""
    _needs("megatron")
    if device != "cuda":
        raise LeftOut("needs a CUDA GPU: a model of a billion parameters")
    for case, recompute in (("activations kept", ()), ("full recompute", RECOMPUTED)):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder, "model.yaml")
            recipe.write_text(MODEL)
            ran = megatron_cp("train", str(recipe), *recompute, folder=folder)
            told = ran.stdout + ran.stderr
            if ran.returncode:
                yield Row(case, {"": last_line(told, ran.returncode)}, "failed")
                continue
            answer = json.loads(megatron_cp("estimate", str(recipe), *recompute, "--json", folder=folder).stdout)
        times = sorted(_times(told)[2:])
        figures = {"ms per step": median(times), "estimated ms": answer["step_seconds"] * 1e3}
        yield Row(f"Llama 3.2 1B, 8K tokens, {case}", figures | _memory(told, answer["memory_bytes"]))


RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


def _times(told: str) -> list[float]:
    return [float(value) for value in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", told)]


def _memory(told: str, estimated: dict[str, float]) -> dict[str, float]:
    """The most memory that tensors of a GPU took, beside the estimate."""
    allocated = re.findall(r"max allocated: ([\d.]+)", told)
    whole = sum(size for kind, size in estimated.items() if kind != "reserved") / 2**20
    return {"GPU MiB": float(allocated[-1]), "estimated MiB": whole}


def last_line(told: str, code: int) -> str:
    lines = [line for line in told.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit code {code}"


def _trained(device: str, case: str, *flags: str) -> Row:
    steps = 50 if device == "cuda" else 4
    one_rank = ["--nproc-per-node", "1", "--context-parallel-size", "1"] if torch.cuda.device_count() == 1 else []
    flags = (*flags, *one_rank)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--train-iters", str(steps), "--lr-warmup-iters", "1", "--save", folder]
        ran = megatron_cp("train", "quickstart", *flags, *words, folder=folder)
        told = ran.stdout + ran.stderr
        if ran.returncode:
            return Row(case, {"": last_line(told, ran.returncode)}, "failed")
        estimate = megatron_cp("estimate", "quickstart", *flags, "--json", folder=folder).stdout
    losses = [float(value) for value in re.findall(r"lm loss: ([\d.E+-]+)", told)]
    figures: dict[str, Any] = {"first loss": losses[0], "last loss": losses[-1], "ms per step": median(_times(told))}
    memory = json.loads(estimate)["memory_bytes"]
    if device == "cuda":
        figures |= _memory(told, memory)
    else:
        resident = re.findall(r'"peak_rss_bytes": (\d+)', told)
        figures |= {"process MiB": int(resident[-1]) / 2**20, "estimated MiB": sum(memory.values()) / 2**20}
    return Row(f"{case}, {steps} steps", figures, "ok" if losses[-1] < losses[0] else "wrong")


def megatron_cp(*words: str, folder: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DATA_PATH": folder}
    command = [sys.executable, "-m", "megatron_cp", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
