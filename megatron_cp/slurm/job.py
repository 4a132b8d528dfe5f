"""The job that a recipe asks for, with everything checked that SLURM would refuse late or not at all."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.recipe import slurm_flags
from megatron_cp.recipe.command import RENDEZVOUS_FLAGS, complete, corpus_words, runs_through_us
from megatron_cp.recipe.recipe import COMMAND_LINE, Recipe, Setting, with_flag

LAUNCHERS = ("torchrun", "srun")
REQUEUES = 10
# how long saving may take, together with the step that is under way
GRACE_SECONDS = 300
# from the warning to the limit, on top of the grace, to decide and requeue
SECONDS_TO_REQUEUE = 30
FREE_GB = 1
# what a recipe says of how nodes find each other is for starting them by hand
FROM_SLURM = (*RENDEZVOUS_FLAGS, "--node-rank", "--rdzv-id", "--rdzv-conf", "--local-addr")

_HEADER_VALUE = re.compile(r"[\w.,:/@%=+*~&|()\[\]-]*", re.ASCII)


@dataclass(frozen=True)
class SlurmJob:
    """A recipe as a job: its nodes, how its ranks are started, how often it is requeued, and what a node must have."""

    recipe: Recipe
    nodes: int
    ranks_per_node: int
    launcher: str
    python: str
    requeues: int
    grace: int
    chain: int
    gpus: int
    free_gb: int
    preflight: bool
    header: tuple[str, ...]
    corpus: tuple[str, ...]
    corpus_index: str


def job_of(recipe: Recipe) -> SlurmJob:
    """The job of a recipe; raises ValueError with place, rule and way out for what cannot be one."""
    nodes, ranks = _count(recipe, "--nnodes"), _count(recipe, "--nproc-per-node")
    launcher, grace = _launcher(recipe), _number(recipe, "--grace", GRACE_SECONDS)
    chain, requeues = _number(recipe, "--chain", 1), _requeues(recipe)
    gpus = _number(recipe, "--node-gpus", _gpus_asked(recipe) or _gpus_used(recipe, ranks))
    if 0 < gpus < ranks:
        raise ValueError(f"{ranks} ranks on a node with {gpus} GPUs; lower --nproc-per-node or ask for more GPUs")
    python = recipe.slurm["--python"].text if "--python" in recipe.slurm else _python(recipe)
    return SlurmJob(
        recipe=_told_to_stop(complete(recipe), grace),
        nodes=nodes,
        ranks_per_node=ranks,
        launcher=launcher,
        python=python,
        requeues=requeues,
        grace=grace,
        chain=chain,
        gpus=gpus,
        free_gb=_number(recipe, "--node-free-gb", FREE_GB),
        preflight="--no-preflight" not in recipe.slurm,
        header=tuple(_asked(recipe)),
        corpus=("-m", "megatron_cp", *corpus_words(recipe)) if recipe.builds_corpus else (),
        corpus_index=f"{recipe.data['--output'].text}.idx" if recipe.builds_corpus else "",
    )


def _count(recipe: Recipe, flag: str) -> int:
    setting = recipe.launch.get(flag, Setting(("1",), ""))
    if not setting.text.isdecimal() or int(setting.text) < 1:
        raise ValueError(f"{setting.place}: a job needs {flag} as a number, got {setting.text!r}")
    return int(setting.text)


def _number(recipe: Recipe, flag: str, default: int) -> int:
    setting = recipe.slurm.get(flag)
    if setting is None:
        return default
    if not setting.text.isdecimal() or (flag == "--chain" and int(setting.text) < 1):
        raise ValueError(f"{setting.place}: {flag} takes a whole number, got {setting.text!r}")
    return int(setting.text)


def _launcher(recipe: Recipe) -> str:
    setting = recipe.slurm.get("--launcher", Setting(LAUNCHERS[:1], ""))
    if setting.text not in LAUNCHERS:
        raise ValueError(f"{setting.place}: --launcher is {' or '.join(LAUNCHERS)}, got {setting.text!r}")
    for flag, said in recipe.launch.items():
        if flag in FROM_SLURM and said.place == COMMAND_LINE:
            raise ValueError(f"{said.place}: in a job {flag} follows from SLURM; take it out")
        if setting.text == "srun" and flag not in ("entry", "--nnodes", "--nproc-per-node", *FROM_SLURM):
            raise ValueError(f"{said.place}: {flag} is torchrun's, and --launcher srun starts no torchrun")
    return setting.text


def _requeues(recipe: Recipe) -> int:
    """How often the job may be requeued, which needs a checkpoint that each attempt goes on from."""
    able = recipe.save is not None and runs_through_us(recipe)
    # of a chain, the next job goes on instead
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
    way_out = "name where to begin with --pretrained-checkpoint, or take --requeues 0 and no --chain"
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
        raise ValueError(f"{place}: a job is told to stop by SIGTERM, which torchrun passes on; take --exit-signal out")


def _told_to_stop(recipe: Recipe, grace: int) -> Recipe:
    """The recipe with --load where it saves, and with Megatron's own ways to save and leave in time."""
    if recipe.save is None:
        return recipe
    added = {"--load": (str(recipe.save),), "--exit-signal-handler": ()}
    if limit := _minutes(recipe):
        before = -(-(grace + SECONDS_TO_REQUEUE) // 60)
        if limit <= before:
            place = recipe.slurm["--time"].place
            raise ValueError(f"{place}: --time of {limit} minutes leaves none to train before saving; lower --grace")
        # should the signal be lost on its way
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
    """The GPUs of a node that the job asks SLURM for, as far as that is said per node; 0 where it is not."""
    for flag, pattern in (("--gpus-per-node", r"(?:[\w.-]+:)?(\d+)"), ("--gres", r"(?:.*,)?gpu(?::[^:,]+)?:(\d+).*")):
        match = re.fullmatch(pattern, recipe.slurm[flag].text) if flag in recipe.slurm else None
        if match:
            return int(match[1])
    return 0


def _gpus_used(recipe: Recipe, ranks: int) -> int:
    """The GPUs of a node that the ranks use, by the cluster that the recipe is made for; 0 on CPUs or without one."""
    on_gpus = recipe.cluster is not None and load_cluster(recipe.cluster).host_bytes_per_s is not None
    return ranks if on_gpus else 0


def _python(recipe: Recipe) -> str:
    # a container has its own
    return "python3" if "--container-image" in recipe.slurm else sys.executable


def _asked(recipe: Recipe) -> Iterator[str]:
    """Lines for sbatch of what the recipe asks of the cluster, each flag with its value."""
    for flag, setting in recipe.slurm.items():
        if flag not in slurm_flags.SBATCH:
            continue
        value = ",".join(setting.values)
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(
                f"{setting.place}: {flag} {value!r} does not fit into a #SBATCH line; "
                f"use letters, digits and . , : / @ % = + * ~ & | ( ) [ ] -"
            )
        if flag == "--dependency" and "--chain" in recipe.slurm:
            raise ValueError(f"{setting.place}: --chain makes its own --dependency; take one of them out")
        yield f"{flag}={value}" if setting.values else flag
