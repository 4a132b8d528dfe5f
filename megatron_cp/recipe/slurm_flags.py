"""Check the flags of a recipe's `SLURM:` block: those of sbatch, those of srun for containers, and our own.

Names are literal, as in the rest of a recipe. Sizes that follow from the run, such as the number of nodes, are refused
here with the flag to use instead.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from megatron_cp.errors import Refused
from megatron_cp.registry import suggest
from megatron_cp.units import is_whole

# resources of the job: lines `#SBATCH --flag=value`
SBATCH = tuple(
    f"--{name}"
    for name in (
        "account acctg-freq bb begin chdir cluster-constraint clusters comment constraint contiguous core-spec "
        "cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline dependency distribution error exclude exclusive "
        "export extra-node-info gpu-bind gpu-freq gpus gpus-per-node gpus-per-task gres gres-flags hold job-name "
        "licenses mail-type mail-user mem mem-per-cpu mem-per-gpu mincpus network nice nodefile nodelist output "
        "oversubscribe partition power prefer priority propagate qos reboot reservation segment sockets-per-node "
        "spread-job switches thread-spec threads-per-core time time-min tmp use-min-nodes wckey "
        "bbf delay-boot get-user-env hint mcs-label oom-kill-step parsable quiet wait wait-all-nodes"
    ).split()
)
# words of srun, which starts the job's steps; most of them belong to the pyxis plugin
SRUN = tuple(
    f"--{name}"
    for name in (
        "container-image container-mounts container-workdir container-name container-env container-save "
        "container-mount-home no-container-mount-home container-remap-root no-container-remap-root "
        "container-entrypoint no-container-entrypoint container-writable container-readonly cpu-bind mem-bind mpi"
    ).split()
)
OURS = tuple(
    f"--{name}"
    for name in "launcher python wrapper requeues grace signal chain node-gpus node-free-gb no-preflight".split()
)
# sbatch's flags for sizes that follow from LAUNCH; they are taken where they agree
SIZES = ("--nodes", "--ntasks", "--ntasks-per-node")
# sbatch's short forms
SHORT = {
    "-A": "--account",
    "-C": "--constraint",
    "-G": "--gpus",
    "-J": "--job-name",
    "-N": "--nodes",
    "-c": "--cpus-per-task",
    "-d": "--dependency",
    "-e": "--error",
    "-n": "--ntasks",
    "-o": "--output",
    "-p": "--partition",
    "-q": "--qos",
    "-t": "--time",
    "-w": "--nodelist",
    "-x": "--exclude",
}
# sbatch's flags that we write ourselves, and what to use instead
WRITTEN_BY_US = {
    "--requeue": "use --requeues N",
    "--no-requeue": "use --requeues 0",
    "--open-mode": "logs are appended to, so that a requeued job keeps its record",
    "--array": "name several recipes: each becomes a task of an array",
    "--wrap": "the script is ours",
}


KNOWN = (*SBATCH, *SRUN, *OURS, *SIZES)


def check(places: Mapping[str, str]) -> None:
    """Raise ValueError for the first flag that a `SLURM:` block cannot have; `places` maps each to file and line.

    A flag that is not known and not like a known one is a plugin's, such as --uenv: sbatch decides about it.
    """
    for flag, place in places.items():
        if flag in WRITTEN_BY_US:
            raise Refused(f"{place}: {flag} is not for the SLURM block: {WRITTEN_BY_US[flag]}")
        if flag not in KNOWN and (_looks_like(flag, KNOWN) or not re.fullmatch(r"--[a-z][\w-]*", flag)):
            raise Refused(
                f"{place}: unknown SLURM flag {flag!r}{suggest(flag, KNOWN)}; known are sbatch's, srun's "
                f"--container-…, --cpu-bind and --mpi, {', '.join(OURS)}, "
                f"and plugins' flags that look like none of them"
            )


def _looks_like(flag: str, known: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(flag, list(known), n=1, cutoff=0.8))


def long_form(word: str) -> list[str]:
    """Return the long flag of a short one such as `-p`, with the value that stands in the same word, as in `-N4`."""
    flag = SHORT.get(word[:2])
    return [flag, *([word[2:]] if word[2:] else [])] if flag else [word]


def is_sbatchs(flag: str) -> bool:
    """True for a flag of a `SLURM:` block that goes into a line `#SBATCH`: sbatch's own, or a plugin's."""
    return flag not in SRUN and flag not in OURS and flag not in SIZES


def is_slurms(flag: str) -> bool:
    """True if a flag on the command line of a job belongs in the `SLURM:` block."""
    return flag in KNOWN or flag in WRITTEN_BY_US


def minutes(text: str) -> int:
    """Return SLURM's notation of a time limit in whole minutes, 0 for no limit; raises ValueError for other texts.

    Forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return 0
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(is_whole(part) for part in ([days, *parts] if dash else parts)) or len(parts) > 3:
        raise Refused(
            f"{text!r} is not a time limit; write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    hours, minute, _ = _clock([int(part) for part in parts], after_days=bool(dash))
    return (int(days or 0) * 24 + hours) * 60 + minute


def _clock(parts: Sequence[int], after_days: bool) -> Sequence[int]:
    if after_days or len(parts) == 3:
        return [*parts, 0, 0][:3]
    return [0, *parts, 0][:3]
