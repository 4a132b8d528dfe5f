"""Doors A and C: what is put in force around a training script, decided from its command line.

With none of our features asked for, on a machine with a GPU and a Megatron-LM checkout, nothing is.
"""

import contextlib
import importlib.util
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from megatron_cp import config
from megatron_cp.megatron import cpu, hooks, left_behind, stopped, unwritten
from megatron_cp.megatron.schedule_arguments import imply_chunks
from megatron_cp.pipeline import on_v

SPEC = ("megatron_cp.megatron.spec", "gpt_layer_spec")
HYBRID_SPEC = ("megatron_cp.megatron.spec", "hybrid_stack_spec")
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
OUR_FLAGS = ("--cp-kernel", "--cp-placement", "--cp-stripe", "--cp-chunks", "--cp-cluster")

# srun starts the processes itself: what torchrun would have set, and SLURM's name for it
FROM_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


class Plan(NamedTuple):
    """What a command line asks of us."""

    layers: bool
    hooks: tuple[str, ...]


def values_of(argv: Sequence[str], flag: str) -> list[str] | None:
    """What follows the last `flag` on the command line, up to the next flag; None without the flag."""
    found: list[str] | None = None
    taking = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == flag:
            found, taking = [value] if equals else [], not equals
        elif word.startswith("--"):
            taking = False
        elif taking and found is not None:
            found.append(word)
    return found


def has_te() -> bool:
    """Whether transformer-engine is installed; it is not imported to find out."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_nvrx() -> bool:
    """Whether nvidia-resiliency-ext is installed, with which Megatron saves asynchronously unless told otherwise."""
    return importlib.util.find_spec("nvidia_resiliency_ext") is not None


def wants_layers(argv: Sequence[str]) -> bool:
    """Whether our attention belongs into this run.

    It does when the command line names our spec, one of our flags or a --cp-comm-type, and also where stock Megatron
    cannot do what was asked: context or sequence parallelism without transformer-engine.
    """
    spec = values_of(argv, "--spec")
    if spec:
        return spec[0].startswith("megatron_cp.")
    if any(values_of(argv, flag) is not None for flag in (*OUR_FLAGS, "--cp-comm-type")):
        return True
    size = values_of(argv, "--context-parallel-size") or ["1"]
    return not has_te() and (size != ["1"] or values_of(argv, "--sequence-parallel") is not None)


def plan(argv: Sequence[str], cpu_runtime: bool) -> Plan:
    """The hooks that this command line needs on this machine."""
    layers = wants_layers(argv)
    names = []
    schedule = values_of(argv, "--pp-schedule")
    # without transformer-engine Megatron's default arguments cannot run
    if layers or schedule is not None or cpu_runtime or not has_te() or "--help" in argv or "-h" in argv:
        names += ["flags", "checks"]
    if schedule is not None:
        names += ["schedule", "weight-queue"]
        placement = "".join(values_of(argv, "--pp-placement") or ())
        names += hooks.FOR_V if schedule and on_v(schedule[0], placement) else ()
        names += ["delayed-weights"] if has_te() else []
    if layers and values_of(argv, "--mtp-num-layers") is not None:
        names.append("mtp-layers")
    if hooks.dataset_helpers_need_no_make():
        names.append("dataset-helpers")
    if values_of(argv, "--save") is not None:
        names.append("overwrite")
    if values_of(argv, "--use-distributed-optimizer") is not None and hooks.resumes_with_torch_adam():
        names += ["optimizer-save", "optimizer-load", "optimizer-copy"]
    return Plan(layers, tuple(names))


def complete(args: Any) -> None:
    """Fill in what this machine and our layers need of parsed arguments, before Megatron validates them."""
    if args.spec is None and wants_layers(sys.argv[1:]):
        args.spec = list(HYBRID_SPEC if getattr(args, "hybrid_layer_pattern", None) else SPEC)
    if has_our_layers(args) and args.create_attention_mask_in_dataloader:
        args.create_attention_mask_in_dataloader = False
        say("our attention reads no mask tensor: --no-create-attention-mask-in-dataloader")
    if chunks := imply_chunks(args):
        say(f"--pp-schedule {args.pp_schedule}: --num-virtual-stages-per-pipeline-rank {chunks}")
    if args.async_save and args.async_strategy == "nvrx" and (cpu.active() or not has_nvrx()):
        args.async_strategy = "mcore"
        say("no GPU with nvidia-resiliency-ext here: --async-strategy mcore")
    if changed := cpu.fill_arguments(args):
        say(f"this machine has no {'GPU' if cpu.active() else 'transformer-engine'}: {' '.join(changed)}")


def check_inputs(args: Any) -> None:
    """Refuse data or a checkpoint that cannot be read, before anything is built; ValueError says what and why."""
    from megatron_cp.megatron import dataset, resume

    resume.check(args)
    if not args.mock_data:
        given = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
        for prefixes in filter(None, given):
            dataset.check_data_path(prefixes)


def has_our_layers(args: Any) -> bool:
    """Whether the arguments name a layer spec of ours."""
    return bool(args.spec) and args.spec[0].startswith("megatron_cp.")


def say(text: str) -> None:
    """Print our own line, once per run."""
    if config.variable("RANK", "0") == "0":
        print(f"[megatron-cp] {text}", flush=True)


def environment_from_slurm() -> None:
    """Set what torchrun would have set, where srun started this process; what is set already stays."""
    if config.variable("RANK") or not config.variable("SLURM_PROCID"):
        return
    values = {name: config.variable(source) for name, source in FROM_SLURM.items() if config.variable(source)}
    nodes = config.variable("SLURM_STEP_NODELIST") or config.variable("SLURM_JOB_NODELIST")
    values["MASTER_ADDR"] = first_host(nodes) if nodes else "127.0.0.1"
    # jobs that share a node get different ports
    values["MASTER_PORT"] = str(20000 + int(config.variable("SLURM_JOB_ID", "0")) % 20000)
    filled = config.set_missing(values)
    say(f"from SLURM: {' '.join(f'{name}={value}' for name, value in sorted(filled.items()))}")


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list such as `gpu[03-04,7],login1`."""
    prefix, _, rest = nodes.partition("[")
    if not rest or "," in prefix:
        return prefix.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return prefix + re.split("[-,]", numbers)[0] + tail.split(",")[0]


def environment_for_gpus(argv: Sequence[str]) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where Megatron insists on it and the user has not said otherwise.

    Must come before CUDA is initialised: the driver reads it once.
    """
    flags = ("--tensor-model-parallel-size", "--context-parallel-size")
    sizes = [values_of(argv, flag) or ["1"] for flag in flags]
    sharded = any(flag in argv for flag in ("--use-torch-fsdp2", "--use-megatron-fsdp"))
    if torch.cuda.device_count() and any(size != ["1"] for size in sizes) and not sharded:
        filled = config.set_missing({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
        if filled:
            say("CUDA_DEVICE_MAX_CONNECTIONS=1, which tensor and context parallelism need")


def _save_folder(argv: Sequence[str]) -> str | None:
    """Where a run saves that is to stop when it is told to."""
    folder = values_of(argv, "--save")
    return folder[0] if folder and values_of(argv, "--exit-signal-handler") is not None else None


@contextlib.contextmanager
def door(argv: Sequence[str]) -> Iterator[Plan]:
    """Everything in force that `argv` needs, undone at the end; a refusal ends the process with one line."""
    environment_from_slurm()
    environment_for_gpus(argv)
    with contextlib.ExitStack() as undo:
        undo.enter_context(_refusals_in_one_line())
        undo.enter_context(left_behind.ended_with_this_rank())
        undo.enter_context(unwritten.explained(next(iter(values_of(argv, "--save") or ()), None)))
        undo.enter_context(stopped.noted(_save_folder(argv)))
        undo.enter_context(cpu.cpu_runtime())
        decided = plan(argv, cpu.active())
        undo.enter_context(hooks.apply(decided.hooks))
        yield decided


@contextlib.contextmanager
def _refusals_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        raise SystemExit(f"[megatron-cp] rank {config.variable('RANK', '0')}: {hooks.one_line(error)}") from error


def is_refusal(error: BaseException) -> bool:
    """Whether one of our own checks spoke: the text then says it all, and a traceback would hide it."""
    if isinstance(error, hooks.BadArguments):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return PACKAGE in os.path.abspath(last.filename) and (last.line or "").startswith("raise ")


def main() -> None:
    """`torchrun -m megatron_cp.launch SCRIPT FLAGS`: run an unmodified Megatron script with our features."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: torchrun … -m megatron_cp.launch SCRIPT.py FLAGS")
    script = sys.argv[1]
    if not os.path.isfile(script):
        raise SystemExit(f"[megatron-cp] no script {script!r}")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    with door(sys.argv[1:]):
        runpy.run_path(script, run_name="__main__")
