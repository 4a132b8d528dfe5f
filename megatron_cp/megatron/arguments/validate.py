"""`megatron-cp validate`: Megatron's own checks of a recipe and ours, for a cluster that is not here.

They run in a fresh process that believes it is rank 0 of the whole run: Megatron reads the environment, sets variables
and keeps state while it checks. Nothing there can reach a GPU.
"""

import contextlib
import io
import json
import pickle
import re
import subprocess
import sys
from argparse import ArgumentParser
from typing import Any, NamedTuple

from megatron_cp import config
from megatron_cp.errors import CannotRun, Refused, one_line
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.planner.parallel import cluster_for
from megatron_cp.recipe.command import check_processes, flag_words, processes, runs_through_us
from megatron_cp.recipe.recipe import Recipe

# a laptop's, not the cluster's
NOT_INHERITED = ("CUDA_", "NCCL_", "NVTE_", "SLURM_", "TORCH_")
# what makes a Python process load something; to look at a recipe is not to run it
NOT_TAKEN = ("LD_", "PYTHON", "PATH")
# Megatron sets these three from --attention-backend, to the values below, and stops when one says otherwise
SET_BY_MEGATRON = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
BY_BACKEND = {"local": "000", "flash": "100", "fused": "010", "unfused": "001", "auto": "111"}


class Run(NamedTuple):
    """A recipe with its cluster and the number of its processes."""

    recipe: Recipe
    cluster: Cluster
    world_size: int


def run_of(recipe: Recipe, cluster: str | None = None) -> Run:
    """The run on `cluster`, by default the recipe's own.

    Raises ValueError when there is none, or when its nodes are not what LAUNCH asks for.
    """
    described = cluster_for(recipe, cluster)
    check_processes(recipe)
    world_size = processes(recipe)
    if world_size is None:
        raise Refused("the number of processes is not known; give --nproc-per-node and --nnodes as numbers")
    per_node = int(recipe.launch["--nproc-per-node"].text) if "--nproc-per-node" in recipe.launch else 1
    if per_node > described.ranks_per_node:
        place = recipe.launch["--nproc-per-node"].place
        raise Refused(
            f"{place}: --nproc-per-node {per_node}, but a node of {described.name} has {described.ranks_per_node} GPUs"
        )
    if world_size > per_node and described.between is None:
        place = recipe.launch["--nnodes"].place
        raise Refused(f"{place}: {described.name} is one node; leave --nnodes out or take another cluster")
    return Run(recipe, described, world_size)


def environment(run: Run) -> dict[str, str]:
    """The environment of rank 0, as far as it bears on checks: the recipe's variables and torchrun's, and no GPU."""
    inherited = {name: value for name, value in config.environment().items() if not name.startswith(NOT_INHERITED)}
    own = {name: setting.text for name, setting in run.recipe.env_vars.items() if not name.startswith(NOT_TAKEN)}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(run.world_size), "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **own, **ranks}


def validate(run: Run) -> list[str]:
    """Check the run in a fresh process; what was assumed. Raises ValueError with the one line that matters."""
    child = subprocess.run(
        [sys.executable, "-m", "megatron_cp.megatron.arguments.validate"],
        input=pickle.dumps(run),
        env=environment(run),
        capture_output=True,
    )
    lines = child.stdout.decode(errors="replace").splitlines()
    if child.returncode or not lines:
        said = child.stderr.decode(errors="replace").strip().splitlines()
        raise CannotRun(f"the checks ended with status {child.returncode}: {said[-1] if said else 'no word'}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "refused" in answer:
        raise Refused(answer["refused"])
    return list(answer["assumed"])


def examine(run: Run) -> list[str]:
    """The checks themselves, in a process whose environment is `environment(run)`; see `validate`."""
    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.arguments.assumed_machine import assumed
    from megatron_cp.megatron.machine.environment import environment_for_gpus

    _check_environment(run.recipe)
    ours, words = runs_through_us(run.recipe), flag_words(run.recipe.model_args)
    sys.argv = ["validate", *words]
    with contextlib.redirect_stdout(io.StringIO()), assumed(run.cluster) as told:
        if ours:
            environment_for_gpus(words)
        with hooks.apply(("flags", "checks") if ours else ("flags",)):
            try:
                _until_the_tokenizer(run.recipe)
            except (ValueError, AssertionError, NotImplementedError) as error:
                raise Refused(_with_places(one_line(error), run.recipe)) from error
    return told


def _check_environment(recipe: Recipe) -> None:
    backend = recipe.flag("--attention-backend", "auto")
    for name, wanted in zip(SET_BY_MEGATRON, BY_BACKEND.get(backend, ""), strict=False):
        setting = recipe.env_vars.get(name)
        if setting is not None and setting.text != wanted:
            raise Refused(
                f"{setting.place}: {name} is {setting.text!r}, but Megatron sets it to {wanted} for "
                f"--attention-backend {backend} and stops when it differs; take it out, or pass another backend"
            )


def _until_the_tokenizer(recipe: Recipe) -> None:
    """What a training script does before it builds the tokenizer, and what would be refused after it."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_cp.megatron.arguments import recipe_flags, stock_rules

    def checked(parser: ArgumentParser) -> ArgumentParser:
        recipe_flags.check(recipe.model_args, parser)
        return parser

    args = arguments.parse_args(checked)
    arguments.validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    model = core_transformer_config_from_args(args)
    init_num_microbatches_calculator(
        args.rank,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )
    stock_rules.check_pipeline(args, model)
    # of somebody else's layers nothing is known
    if args.spec is None or args.spec[0].startswith("megatron."):
        stock_rules.check_attention(args)


def _with_places(text: str, recipe: Recipe) -> str:
    """The line with the places of the flags that it names: as a flag, as Megatron's argument, or by a quoted value."""
    if any(setting.place in text for setting in recipe.model_args.values()):
        return text
    words = set(re.findall(r"--[a-z0-9-]+|[a-z0-9]+(?:_[a-z0-9]+)+|'[^']*'", text))
    places = [
        f"{setting.place} {flag} {setting.text}".rstrip()
        for flag, setting in recipe.model_args.items()
        if words & {flag, flag[2:].replace("-", "_"), *map(repr, setting.values)}
    ]
    return f"{text} ({'; '.join(places)})" if places else text


def main() -> None:
    """The fresh process: a run on stdin, one line of JSON on stdout."""
    run: Run = pickle.load(sys.stdin.buffer)
    try:
        answer: dict[str, Any] = {"assumed": examine(run)}
    except ValueError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
