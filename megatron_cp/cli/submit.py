"""`megatron-cp submit`: submit recipes as SLURM jobs; also prints the script for `megatron-cp render --slurm`."""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megatron_cp import config
from megatron_cp.cli.importing import load
from megatron_cp.cli.train import checked
from megatron_cp.recipe import recipe, slurm_flags
from megatron_cp.recipe.from_command import is_command
from megatron_cp.recipe.recipe import overridden
from megatron_cp.slurm.job import SlurmJob, job_of
from megatron_cp.slurm.script import script

# flags that an unknown one may mean here
OTHERS = (*slurm_flags.KNOWN, "--cluster", "--dry-run")
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE… [--flag VALUE…]",
        help="Recipes, several for an array of jobs; then flags that win over them: Megatron's, torchrun's, sbatch's, "
        "srun's --container-…, and --launcher torchrun|srun, --python, --wrapper WORDS, --requeues, --grace SECONDS, "
        "--signal TERM|USR2@SECONDS, --chain JOBS, --node-gpus, --node-free-gb and --no-preflight.",
    ),
]


def submit(
    words: Words,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script without submitting it.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="NAME|FILE", help="Ask for the nodes of this cluster, not of CLUSTER."),
    ] = None,
) -> None:
    """Submit recipes to SLURM: checked on their nodes first, saved before the time is up, and requeued."""
    if dry_run or "--dry-run" in words:
        print_script(words, cluster)
        return
    jobs = jobs_of(words, cluster)
    text = script(jobs)
    _tell(jobs)
    _make_log_folder(jobs[0])
    for _ in range(jobs[0].chain):
        _sbatch(text)


def print_script(words: Sequence[str], cluster: str | None = None) -> None:
    """Print the script of `RECIPE… --flag VALUE…`, ignoring --slurm and --dry-run among its flags."""
    jobs = jobs_of([word for word in words if word not in ("--slurm", "--dry-run")], cluster)
    print(script(jobs), end="")
    _tell(jobs)


def _tell(jobs: Sequence[SlurmJob]) -> None:
    for text in dict.fromkeys(text for job in jobs for text in job.missing):
        typer.echo(f"megatron-cp: the job asks for {text}", err=True)


def jobs_of(words: Sequence[str], cluster: str | None = None) -> list[SlurmJob]:
    """Return the jobs of `RECIPE… --flag VALUE…` or `--flag VALUE… -- COMMAND…`, flags checked as Megatron does.

    cluster: whose nodes the jobs ask for, instead of the recipes' own; `--cluster NAME` among the flags too
    """
    flags, dashes, command = _split(words)
    site = config.site_file()
    if dashes or (words and is_command(words[0])):
        flags, named = _without_cluster(flags)
        run = overridden(load(command[0], config.environment(), command[1:]), flags, job=True, site=site)
        return [_job(run, named or cluster)]
    names, overrides = _recipes(words)
    overrides, named = _without_cluster(overrides)
    runs = (recipe.load(name, config.environment(), overrides, job=True, site=site) for name in names)
    return [_job(run, named or cluster) for run in runs]


def _job(run: recipe.Recipe, cluster: str | None) -> SlurmJob:
    return job_of(checked(replace(run, cluster=cluster) if cluster else run, OTHERS))


def _recipes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the recipes and the flags; recipes stand before the flags, or where the first one is found among them."""
    if not words:
        raise ValueError("expected a recipe")
    begin = 0
    if words[0].startswith("-"):
        begin = next((index for index, word in enumerate(words) if _is_recipe(word)), 0)
        if not begin:
            raise ValueError(f"expected a recipe, got only flags and values: {shlex.join(words)}")
    end = next((at for at, word in enumerate(words) if at > begin and word.startswith("-")), len(words))
    return list(words[begin:end]), [*words[:begin], *words[end:]]


def _is_recipe(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml") or f"recipes/{word}" in recipe.shipped("recipes")


def _without_cluster(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the flags without `--cluster NAME`, and the name."""
    kept, cluster, rest = [], None, iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--cluster":
            kept.append(word)
            continue
        cluster = value if equals else next(rest, "")
        if not cluster or cluster.startswith("-"):
            raise ValueError("--cluster needs the name of a cluster or a file")
    return kept, cluster


def _split(words: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """Return the flags before `--`, whether it is there, and the command after it, by default all words."""
    if "--" not in words:
        return [], False, list(words)
    at = list(words).index("--")
    if not words[at + 1 :]:
        raise ValueError("expected a command after --, such as torchrun … pretrain_gpt.py …")
    return list(words[:at]), True, list(words[at + 1 :])


def _make_log_folder(job: SlurmJob) -> None:
    """Create the folders of the logs: SLURM ends a job without an error message when one is missing."""
    for flag in ("--output", "--error"):
        folder = Path(job.recipe.slurm[flag].text).parent if flag in job.recipe.slurm else Path()
        if "%" not in str(folder):
            folder.mkdir(parents=True, exist_ok=True)


def _sbatch(text: str) -> None:
    try:
        done = subprocess.run(["sbatch"], input=text, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(
            "this machine has no sbatch; write the script with `megatron-cp render RECIPE --slurm`, submit it elsewhere"
        ) from None
    if done.returncode:
        raise typer.Exit(done.returncode)
