"""Build the SLURM job of a recipe, and check what SLURM itself would refuse late or not at all."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.recipe import slurm_flags
from megatron_cp.recipe.command import FROM_SLURM, complete, corpus_words, runs_through_us
from megatron_cp.recipe.recipe import COMMAND_LINE, Recipe, Setting, with_flag
from megatron_cp.units import is_whole

LAUNCHERS = ("torchrun", "srun")
REQUEUES = 10
# seconds that saving may take, together with the current step
GRACE_SECONDS = 300
# seconds between the warning and the limit, on top of the grace, to decide and requeue
SECONDS_TO_REQUEUE = 30
SIGNAL = "TERM"
FREE_GB = 1
# flags of sbatch that ask for a resource
GPUS = ("--gpus-per-node", "--gpus", "--gres", "--gpus-per-task")
CPUS = ("--cpus-per-task", "--cpus-per-gpu", "--exclusive", "--mincpus")
MEMORY = ("--mem", "--mem-per-cpu", "--mem-per-gpu")

_SIGNAL = re.compile(r"(?:SIG)?(TERM|USR2)@(\d{1,9})", re.ASCII)
# a container has its own Python, at another path
CONTAINERS = ("apptainer", "singularity")

_GPUS = (
    ("--gpus-per-node", re.compile(r"(?:[\w.-]+:)?(\d{1,9})")),
    ("--gres", re.compile(r"(?:.*,)?gpu(?::[^:,]+)?:(\d{1,9})(?!\d).*")),
)
_HEADER_VALUE = re.compile(r"[\w.,:/@%=+*~&|()\[\]-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A recipe as a SLURM job.

    launcher: "torchrun" or "srun"
    requeues: most requeues after preemption or the time limit
    wrapper:  words before the command of every step, such as those that run it in a container
    grace:    seconds that a save and the current step may take
    signal:   that warns the ranks of the time limit, "TERM" or "USR2"
    chain:    number of jobs, each of which runs after the one before
    gpus, free_gb: GPUs that a node must have, and free GB in the folder that it saves to
    header:   flags for `#SBATCH` lines
    setup:    lines of bash at the start
    missing:  what the job asks SLURM for in no way, with the flag to use
    corpus, corpus_index: words that build the corpus, and the file that shows that it exists
    """

    recipe: Recipe
    nodes: int
    ranks_per_node: int
    launcher: str
    python: str
    wrapper: tuple[str, ...]
    requeues: int
    grace: int
    signal: str
    chain: int
    gpus: int
    free_gb: int
    preflight: bool
    header: tuple[str, ...]
    setup: tuple[str, ...]
    missing: tuple[str, ...]
    corpus: tuple[str, ...]
    corpus_index: str


def job_of(recipe: Recipe) -> SlurmJob:
    """Return the job of a recipe; raises ValueError with place, rule and way out for a recipe that cannot be one."""
    nodes, ranks = _count(recipe, "--nnodes"), _count(recipe, "--nproc-per-node")
    launcher, (signal, grace) = _launcher(recipe), _warning(recipe)
    chain, requeues = _number(recipe, "--chain", 1), _requeues(recipe)
    gpus = _number(recipe, "--node-gpus", _gpus_asked(recipe) or _gpus_used(recipe, ranks))
    if 0 < gpus < ranks:
        raise ValueError(f"{ranks} ranks on a node with {gpus} GPUs; lower --nproc-per-node or ask for more GPUs")
    _check_sizes(recipe, nodes, ranks)
    derived = tuple(_derived(recipe, ranks))
    wrapper = _wrapper(recipe)
    python = recipe.slurm["--python"].text if "--python" in recipe.slurm else _python(recipe, wrapper)
    return SlurmJob(
        recipe=_stops_in_time(complete(recipe), grace),
        nodes=nodes,
        ranks_per_node=ranks,
        launcher=launcher,
        python=python,
        wrapper=wrapper,
        requeues=requeues,
        grace=grace,
        signal=signal,
        chain=chain,
        gpus=gpus,
        free_gb=_number(recipe, "--node-free-gb", FREE_GB),
        preflight="--no-preflight" not in recipe.slurm,
        header=(*derived, *_asked(recipe)),
        setup=recipe.setup,
        missing=tuple(_missing(recipe, derived)),
        corpus=("-m", "megatron_cp", *corpus_words(recipe)) if recipe.builds_corpus else (),
        corpus_index=f"{recipe.data['--output'].text}.idx" if recipe.builds_corpus else "",
    )


def _count(recipe: Recipe, flag: str) -> int:
    setting = recipe.launch.get(flag, Setting(("1",), ""))
    if not is_whole(setting.text) or int(setting.text) < 1:
        raise ValueError(f"{setting.place}: a job needs {flag} as a number, got {setting.text!r}")
    return int(setting.text)


def _number(recipe: Recipe, flag: str, default: int) -> int:
    setting = recipe.slurm.get(flag)
    if setting is None:
        return default
    if not is_whole(setting.text) or (flag == "--chain" and int(setting.text) < 1):
        raise ValueError(f"{setting.place}: {flag} takes a whole number, got {setting.text!r}")
    return int(setting.text)


def _launcher(recipe: Recipe) -> str:
    setting = recipe.slurm.get("--launcher", Setting(LAUNCHERS[:1], ""))
    if setting.text not in LAUNCHERS:
        raise ValueError(f"{setting.place}: --launcher must be {' or '.join(LAUNCHERS)}, got {setting.text!r}")
    for flag, given in recipe.launch.items():
        if flag in FROM_SLURM and given.place == COMMAND_LINE:
            raise ValueError(f"{given.place}: in a job {flag} follows from SLURM; remove it")
        if setting.text == "srun" and flag not in ("entry", "--nnodes", "--nproc-per-node", *FROM_SLURM):
            raise ValueError(f"{given.place}: {flag} is a flag of torchrun, which --launcher srun does not start")
    return setting.text


def _warning(recipe: Recipe) -> tuple[str, int]:
    """Return the signal before the time limit, and the seconds that the ranks have from then on."""
    setting = recipe.slurm.get("--signal")
    if setting is None:
        return SIGNAL, _number(recipe, "--grace", GRACE_SECONDS)
    if "--grace" in recipe.slurm:
        raise ValueError(f"{setting.place}: --signal and --grace both give the time of the warning; remove one of them")
    match = _SIGNAL.fullmatch(setting.text)
    if match is None or int(match[2]) <= SECONDS_TO_REQUEUE:
        raise ValueError(
            f"{setting.place}: --signal takes TERM@SECONDS or USR2@SECONDS of more than {SECONDS_TO_REQUEUE}, which "
            f"the ranks save and exit on, got {setting.text!r}; write USR2@600, or give --grace SECONDS instead"
        )
    return match[1], int(match[2]) - SECONDS_TO_REQUEUE


def _wrapper(recipe: Recipe) -> tuple[str, ...]:
    setting = recipe.slurm.get("--wrapper")
    if setting is None:
        return ()
    try:
        words = setting.values if len(setting.values) > 1 else tuple(shlex.split(setting.text))
    except ValueError as error:
        raise ValueError(f"{setting.place}: --wrapper {setting.text!r}: {error}; write a list of words") from None
    if not words:
        raise ValueError(f"{setting.place}: --wrapper needs words, such as [apptainer, exec, --nv, image.sif]")
    return words


def _requeues(recipe: Recipe) -> int:
    """Return the most requeues of the job, which need a checkpoint from which each attempt continues."""
    able = recipe.save is not None and runs_through_us(recipe)
    # in a chain, the next job continues instead
    requeues = _number(recipe, "--requeues", REQUEUES if able and "--chain" not in recipe.slurm else 0)
    if requeues and not able:
        raise ValueError(
            f"{recipe.slurm['--requeues'].place}: --requeues needs --save and an entry that runs through our launcher, "
            f"which notes that the ranks have saved"
        )
    if requeues or "--chain" in recipe.slurm:
        _check_goes_on(recipe)
    return requeues


def _check_goes_on(recipe: Recipe) -> None:
    way_out = "give the checkpoint to begin with as --pretrained-checkpoint, or use --requeues 0 without --chain"
    load = recipe.model_args.get("--load")
    if load is not None and load.text != str(recipe.save):
        raise ValueError(
            f"{load.place}: each attempt would begin at --load {load.text!r} again, not at --save; {way_out}"
        )
    if "--finetune" in recipe.model_args:
        place = recipe.model_args["--finetune"].place
        raise ValueError(f"{place}: each attempt would begin at iteration 0 again with --finetune; {way_out}")
    if "--exit-signal" in recipe.model_args:
        place = recipe.model_args["--exit-signal"].place
        raise ValueError(f"{place}: a job is stopped by SIGTERM, which torchrun passes on; remove --exit-signal")


def _stops_in_time(recipe: Recipe, grace: int) -> Recipe:
    """Return the recipe with --load from its --save folder, and with Megatron's flags to save and exit in time."""
    if recipe.save is None:
        return recipe
    added = {"--load": (str(recipe.save),), "--exit-signal-handler": ()}
    if limit := _minutes(recipe):
        before = -(-(grace + SECONDS_TO_REQUEUE) // 60)
        if limit <= before:
            place = recipe.slurm["--time"].place
            raise ValueError(f"{place}: --time of {limit} minutes leaves none to train before saving; lower --grace")
        # a second way to stop in time, in case the signal is lost
        added["--exit-duration-in-mins"] = (str(limit - before),)
    for flag, values in added.items():
        if flag not in recipe.model_args:
            recipe = with_flag(recipe, flag, Setting(values, "job"))
    return recipe


def _minutes(recipe: Recipe) -> int:
    setting = recipe.slurm.get("--time")
    try:
        return slurm_flags.minutes(setting.text) if setting else 0
    except ValueError as error:
        raise ValueError(f"{recipe.slurm['--time'].place}: --time {error}") from None


def _gpus_asked(recipe: Recipe) -> int:
    """Return the GPUs per node that the job requests from SLURM, 0 where the request is not per node."""
    for flag, pattern in _GPUS:
        match = pattern.fullmatch(recipe.slurm[flag].text) if flag in recipe.slurm else None
        if match:
            return int(match[1])
    return 0


def _check_sizes(recipe: Recipe, nodes: int, ranks: int) -> None:
    """Check that sizes given to SLURM agree with LAUNCH, from which the job's are made."""
    fitting = {"--nodes": {nodes}, "--ntasks": {nodes, nodes * ranks}, "--ntasks-per-node": {1, ranks}}
    for flag, right in fitting.items():
        setting = recipe.slurm.get(flag)
        if setting is not None and setting.text not in {str(size) for size in right}:
            raise ValueError(
                f"{setting.place}: {flag} {setting.text} is another size than --nnodes {nodes} with --nproc-per-node "
                f"{ranks}; leave it out, or change --nnodes and --nproc-per-node"
            )


def _derived(recipe: Recipe, ranks: int) -> Iterator[str]:
    """Yield what a node must give to the ranks, where it follows from the recipe and the job does not ask for it.

    Ranks on all GPUs of a node of the recipe's cluster get the node: its CPUs and memory too.
    """
    if not _gpus_used(recipe, ranks):
        return
    if not _asks(recipe, GPUS):
        yield f"--gpus-per-node={ranks}"
    if recipe.cluster is not None and load_cluster(recipe.cluster).ranks_per_node == ranks:
        if not _asks(recipe, CPUS):
            yield "--exclusive"
        if not _asks(recipe, MEMORY):
            yield "--mem=0"


def _asks(recipe: Recipe, flags: tuple[str, ...]) -> bool:
    return any(flag in recipe.slurm or flag in recipe.without for flag in flags)


def _missing(recipe: Recipe, derived: tuple[str, ...]) -> Iterator[str]:
    """Yield what SLURM would decide by its own defaults: often one CPU for a node's task, and its share of memory."""
    for subject, flags, remedy in (
        ("CPUs", CPUS, "--cpus-per-task N or --exclusive"),
        ("memory", MEMORY, "--mem 0 for all of a node, or --mem SIZE"),
    ):
        if not _asks(recipe, flags) and not any(line.partition("=")[0] in flags for line in derived):
            yield f"{subject} by SLURM's default, which may be one task's share; give {remedy}"


def _gpus_used(recipe: Recipe, ranks: int) -> int:
    """Return the GPUs per node that the ranks use, 0 on CPUs: as the cluster says, or else the backend."""
    if recipe.cluster is None:
        return ranks if recipe.flag("--distributed-backend", "nccl") == "nccl" else 0
    return 0 if load_cluster(recipe.cluster).host_bytes_per_s is None else ranks


def _python(recipe: Recipe, wrapper: tuple[str, ...]) -> str:
    in_container = "--container-image" in recipe.slurm or (wrapper and Path(wrapper[0]).name in CONTAINERS)
    return "python3" if in_container else sys.executable


def _asked(recipe: Recipe) -> Iterator[str]:
    """Yield the recipe's flags for sbatch, each with its value."""
    for flag, setting in recipe.slurm.items():
        if not slurm_flags.is_sbatchs(flag):
            continue
        value = ",".join(setting.values)
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(
                f"{setting.place}: {flag} {value!r} does not fit into a #SBATCH line; "
                f"use letters, digits and . , : / @ % = + * ~ & | ( ) [ ] -"
            )
        if flag == "--dependency" and "--chain" in recipe.slurm:
            raise ValueError(f"{setting.place}: --chain makes its own --dependency; remove one of them")
        yield f"{flag}={value}" if setting.values else flag
