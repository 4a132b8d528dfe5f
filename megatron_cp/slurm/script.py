"""Write the script for sbatch.

The settings of a recipe are arrays of quoted words, which are passed on unchanged: no shell evaluates them. The part
that is equal for every recipe is `job.sh`, which follows the arrays.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_cp.findings import about
from megatron_cp.recipe.command import entry_words, flag_words
from megatron_cp.recipe.recipe import Setting
from megatron_cp.recipe.slurm_flags import SRUN
from megatron_cp.slurm.job import FROM_SLURM, SECONDS_TO_REQUEUE, SlurmJob

BODY = Path(__file__).with_name("job.sh")
# flags of LAUNCH that are not passed to torchrun unchanged
PASSED_SEPARATELY = ("entry", "--nnodes", "--nproc-per-node", *FROM_SLURM)


def script(jobs: Sequence[SlurmJob]) -> str:
    """Return a batch script for one recipe, or for an array with a task for each of several recipes.

    Raises ValueError for recipes of an array that request different resources, or save in the same folder.
    """
    first = jobs[0]
    _check_together(jobs)
    settings = _settings(first) if len(jobs) == 1 else _cases(jobs)
    setup = ("", "# lines of SETUP", *first.setup) if first.setup else ()
    lines = ("#!/usr/bin/env bash", *_header(jobs), *setup, "", "set -euo pipefail", f"about={_quoted(about())}")
    return "\n".join((*lines, settings, BODY.read_text()))


def _check_together(jobs: Sequence[SlurmJob]) -> None:
    first = jobs[0]
    for job in jobs[1:]:
        if _shape(job) != _shape(first):
            raise ValueError(
                f"{job.recipe.name} asks for another job than {first.recipe.name}: {_shape(job)} and {_shape(first)}; "
                f"submit them one by one"
            )
    saves = [job.recipe.save for job in jobs if job.recipe.save]
    if len(set(saves)) < len(saves):
        raise ValueError(f"two recipes of the array save in the same folder: {', '.join(map(str, saves))}")


def _shape(job: SlurmJob) -> tuple[object, ...]:
    sizes = (job.nodes, job.ranks_per_node, job.launcher, job.signal, job.grace, job.chain)
    return (*sizes, bool(job.requeues), *job.header, *job.setup)


def _header(jobs: Sequence[SlurmJob]) -> Iterator[str]:
    job = jobs[0]
    name = re.sub(r"[^\w.+-]", "_", job.recipe.name, flags=re.ASCII)
    tasks = job.ranks_per_node if job.launcher == "srun" else 1
    lines = [
        f"--job-name={name}" if len(jobs) == 1 else f"--job-name={name}-and-{len(jobs) - 1}-more",
        "--output=%x-%j.out" if len(jobs) == 1 else "--output=%x-%A_%a.out",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={tasks}",
        # sent to the steps only: this script decides when they have ended
        f"--signal={job.signal}@{job.grace + SECONDS_TO_REQUEUE}",
        "--requeue" if job.requeues else "--no-requeue",
        "--open-mode=append",
    ]
    lines += ["--dependency=singleton"] * (job.chain > 1)
    lines += [f"--array=0-{len(jobs) - 1}"] * (len(jobs) > 1)
    asked = {line.partition("=")[0] for line in job.header}
    kept = [line for line in lines if line.partition("=")[0] not in asked]
    return (f"#SBATCH {line}" for line in (*kept, *job.header))


def _cases(jobs: Sequence[SlurmJob]) -> str:
    cases = [f"{index})\n{_settings(job)};;\n" for index, job in enumerate(jobs)]
    return f'case "$SLURM_ARRAY_TASK_ID" in\n{"".join(cases)}*)\n    exit 1\n    ;;\nesac\n'


def _settings(job: SlurmJob) -> str:
    """Return the variables and arrays of one recipe that `job.sh` reads."""
    recipe = job.recipe
    values = {
        "recipe": recipe.name,
        "nodes": str(job.nodes),
        "ranks_per_node": str(job.ranks_per_node),
        "launcher": job.launcher,
        "requeues": str(job.requeues),
        "preflight": "true" if job.preflight else "false",
        "python": job.python,
        "save": str(recipe.save or "."),
        "corpus_index": job.corpus_index,
    }
    arrays: dict[str, Sequence[str]] = {
        "step": _step_words(job),
        "wrapper": job.wrapper,
        "settings": ["env", *(f"{name}={value}" for name, value in _environment(job).items())],
        "check": ["--gpus", str(job.gpus), "--free-gb", str(job.free_gb)],
        "corpus": job.corpus,
        "train": [*_torchrun_words(job), *entry_words(recipe.launch), *flag_words(recipe.model_args)],
    }
    return "".join([f"{name}={_quoted(value)}\n" for name, value in values.items()]) + "".join(
        _array(name, words) for name, words in arrays.items()
    )


def _environment(job: SlurmJob) -> dict[str, str]:
    # torchrun kills ranks that are still saving after this time
    own = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.grace)} if job.launcher == "torchrun" else {}
    return own | {name: setting.text for name, setting in job.recipe.env_vars.items()}


def _step_words(job: SlurmJob) -> list[str]:
    given = {flag: setting for flag, setting in job.recipe.slurm.items() if flag in SRUN}
    words = list(_mounts(given))
    words += [f"{flag}={','.join(setting.values)}" if setting.values else flag for flag, setting in given.items()]
    if "--cpus-per-task" in job.recipe.slurm:
        # srun no longer inherits it from sbatch
        words.append(f"--cpus-per-task={job.recipe.slurm['--cpus-per-task'].text}")
    return words


def _mounts(given: Mapping[str, Setting]) -> Iterator[str]:
    """Yield srun's flags that mount this folder into a container under its own path, unless the recipe sets them."""
    if "--container-image" in given:
        if "--container-mounts" not in given:
            yield f"--container-mounts={Path.cwd()}:{Path.cwd()}"
        if "--container-workdir" not in given:
            yield f"--container-workdir={Path.cwd()}"


def _torchrun_words(job: SlurmJob) -> list[str]:
    if job.launcher == "srun":
        return []
    others = {flag: setting for flag, setting in job.recipe.launch.items() if flag not in PASSED_SEPARATELY}
    sizes = ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.ranks_per_node)]
    return ["-m", "torch.distributed.run", *sizes, *flag_words(others)]


def _array(name: str, words: Sequence[str]) -> str:
    """Return a bash array with an assignment, or a flag and its values, on each line."""
    if not words:
        return f"{name}=()\n"
    lines: list[list[str]] = []
    for word in words:
        if not lines or word.startswith("-") or name == "settings":
            lines.append([])
        lines[-1].append(_quoted(word))
    return f"{name}=(\n" + "".join(f"    {' '.join(line)}\n" for line in lines) + ")\n"


def _quoted(word: str) -> str:
    if "\0" in word:
        raise ValueError(f"a value with a zero byte cannot be passed to a program: {word!r}")
    # a comma in an array looks like a separator that it is not
    return f"'{word}'" if re.fullmatch(r"[\w@%+=:,./-]*,[\w@%+=:,./-]*", word, re.ASCII) else shlex.quote(word)
