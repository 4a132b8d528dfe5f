"""Launch a training script with the hooks that its command line needs.

With none of our features asked for, on a machine with a GPU and a Megatron-LM checkout, nothing is changed.
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_cp import config
from megatron_cp.errors import CannotRun, Refused, one_line
from megatron_cp.findings import OLDEST_TORCH, UPGRADE_TORCH, installed, reaches
from megatron_cp.megatron import hooks
from megatron_cp.megatron.arguments.command_line import check_script, wants_layers
from megatron_cp.megatron.checkpoint import failed_save
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, MlpFlags, QuantisedFlags, StateFlags
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.machine.environment import copies_beside, environment_for_gpus, environment_from_slurm
from megatron_cp.megatron.machine.facts import Machine, this_machine
from megatron_cp.megatron.process import children, stop_signal
from megatron_cp.megatron.run import values_of
from megatron_cp.pipeline import SCHEDULES, on_v


class Features(NamedTuple):
    """Features of ours that a command line asks for: our layers, and the hooks of everything else."""

    layers: bool
    hooks: tuple[str, ...]


def features(argv: Sequence[str], machine: Machine) -> Features:
    """Return the layers and hooks that this command line needs on `machine`."""
    layers = wants_layers(argv, machine.te)
    names = []
    schedule = values_of(argv, "--pp-schedule")
    # without transformer-engine Megatron's default arguments cannot run
    if layers or schedule is not None or not (machine.gpu and machine.te) or "--help" in argv or "-h" in argv:
        names += ["flags", "checks"]
    if schedule is not None:
        names += ["schedule", "weight-queue"]
        placement = "".join(values_of(argv, "--pp-placement") or ())
        names += hooks.FOR_V if schedule and on_v(schedule[0], placement) else ()
        names += hooks.FOR_TWO_COPIES if schedule and SCHEDULES.get(schedule[0]).two_copies else ()
        names += ["shared-vocabulary"] if values_of(argv, "--pp-vocab-parallel") is not None else []
        names += hooks.FOR_FREE_RUNNING if values_of(argv, "--pp-free-running") is not None else ()
        combined = values_of(argv, "--overlap-moe-expert-parallel-comm") is not None
        names += ["delayed-weights"] if machine.te or combined else []
    elif values_of(argv, "--cp-plan") is not None:
        names.append("schedule")
    if layers and values_of(argv, "--dataloader-inter-document-masking") is not None:
        names.append("document-stages")
    if layers and values_of(argv, "--mtp-num-layers") is not None:
        names += ["mtp-layers", "mtp-loss"]
    if layers and values_of(argv, "--cp-keep-attention") is not None:
        names.append("kept-attention")
    if any(values_of(argv, flag) is not None for flag in LocalSgdFlags.names()):
        names += ["flags", "checks", *hooks.FOR_ISLANDS]
    if any(values_of(argv, flag) is not None for flag in QuantisedFlags.names()):
        names += ["flags", "checks", *hooks.FOR_QUANTISED]
    if any(values_of(argv, flag) is not None for flag in StateFlags.names()):
        names += ["flags", "checks", *hooks.FOR_STATE_ON_DISK]
    if any(values_of(argv, flag) is not None for flag in MlpFlags.names()):
        names += ["flags", "checks", "mlp-tiles"]
    if layers and values_of(argv, "--cp-loss-chunks") is not None:
        names.append("loss-chunks")
        names += ["accepted-chunks"] if values_of(argv, "--mtp-num-layers") is not None else []
    if layers and values_of(argv, "--num-experts") is not None:
        names.append("expert-choices")
    if copies_beside(argv):
        names.append("connections")
    if hooks.dataset_helpers_need_no_make():
        names.append("dataset-helpers")
    if values_of(argv, "--save") is not None:
        names.append("overwrite")
    if values_of(argv, "--use-distributed-optimizer") is not None and hooks.resumes_with_torch_adam():
        names += ["optimizer-save", "optimizer-load", "optimizer-copy"]
    return Features(layers, tuple(names))


def _save_folder(argv: Sequence[str]) -> str | None:
    """Return where a run saves that is to stop when it is told to; None for other runs."""
    folder = values_of(argv, "--save")
    return folder[0] if folder and values_of(argv, "--exit-signal-handler") is not None else None


@contextlib.contextmanager
def launched(argv: Sequence[str]) -> Iterator[Features]:
    """Put in force everything that `argv` needs and undo it at the end; a refusal ends the process with one line."""
    environment_from_slurm()
    environment_for_gpus(argv)
    with contextlib.ExitStack() as undo:
        undo.enter_context(refusals_in_one_line())
        check_torch()
        undo.enter_context(children.ended_with_this_rank())
        undo.enter_context(failed_save.explained(next(iter(values_of(argv, "--save") or ()), None)))
        undo.enter_context(stop_signal.noted(_save_folder(argv)))
        undo.enter_context(cpu.cpu_runtime())
        wanted = features(argv, this_machine())
        undo.enter_context(hooks.apply(wanted.hooks))
        yield wanted


def check_torch() -> None:
    """Raise RuntimeError for a torch older than the oldest that will do."""
    version = installed("torch")
    if version is not None and not reaches(version, OLDEST_TORCH):
        raise CannotRun(f"needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, got {version}; {UPGRADE_TORCH}")


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Exit with one line of text for a refusal inside the context; other errors keep their traceback."""
    try:
        yield
    except (Refused, CannotRun) as error:
        raise SystemExit(f"[megatron-cp] rank {config.variable('RANK', '0')}: {one_line(error)}") from error


def main() -> None:
    """`torchrun -m megatron_cp.launch SCRIPT FLAGS`: run an unmodified Megatron script with our features."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: torchrun … -m megatron_cp.launch SCRIPT.py FLAGS")
    script = sys.argv[1]
    if not os.path.isfile(script):
        raise SystemExit(f"[megatron-cp] no script {script!r}")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    with launched(sys.argv[1:]) as found:
        check_script(sys.argv[1:], found.layers)
        runpy.run_path(script, run_name="__main__")
