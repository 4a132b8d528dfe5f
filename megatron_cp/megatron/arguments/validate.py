"""`megatron-cp validate`: Megatron's own checks of a recipe and ours, for a cluster that is not here.

They run in a fresh process with the environment of rank 0 of the run: Megatron reads the environment, sets variables
and keeps state while it checks. Nothing there can reach a GPU.
"""

import contextlib
import functools
import io
import json
import pickle
import subprocess
import sys
from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_cp import config
from megatron_cp.errors import CannotRun, Refused, one_line
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.megatron.arguments import recipe_flags
from megatron_cp.megatron.run import has_our_layers
from megatron_cp.planner.of_recipe import cluster_for
from megatron_cp.recipe.command import check_processes, flag_words, processes, runs_through_us
from megatron_cp.recipe.recipe import ENTRY, Recipe

if TYPE_CHECKING:
    from megatron_cp.megatron.arguments.assumed_machine import Gpu
    from megatron_cp.megatron.machine.facts import Machine

# variables of this machine, which say nothing about the cluster
NOT_INHERITED = ("CUDA_", "NCCL_", "NVTE_", "SLURM_", "TORCH_")
# variables that make a Python process load code, which checking a recipe must not do
NOT_TAKEN = ("LD_", "PYTHON", "PATH")
# Megatron sets these three from --attention-backend, to the values below, and stops when one says otherwise
SET_BY_MEGATRON = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
BY_BACKEND = {"local": "000", "flash": "100", "fused": "010", "unfused": "001", "auto": "111"}

# transformer-engine's products of low precision need at least this GPU
LEAST_CAPABILITY = {"--fp8-format": (8, 9), "--fp4-format": (10, 0)}


class ClusterRun(NamedTuple):
    """A recipe with its cluster and the number of its processes."""

    recipe: Recipe
    cluster: Cluster
    world_size: int


def run_of(recipe: Recipe, cluster: str | None = None) -> ClusterRun:
    """Return the run on `cluster`, by default the recipe's own.

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
    return ClusterRun(recipe, described, world_size)


def environment(run: ClusterRun) -> dict[str, str]:
    """Return the environment of rank 0 for the checks: the recipe's variables and torchrun's, and no GPU."""
    inherited = {name: value for name, value in config.environment().items() if not name.startswith(NOT_INHERITED)}
    own = {name: setting.text for name, setting in run.recipe.env_vars.items() if not name.startswith(NOT_TAKEN)}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(run.world_size), "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **own, **ranks}


def validate(run: ClusterRun) -> list[str]:
    """Check the run in a fresh process and return what was assumed; raises ValueError with one line."""
    child = subprocess.run(
        [sys.executable, "-m", "megatron_cp.megatron.arguments.validate"],
        input=pickle.dumps(run),
        env=environment(run),
        capture_output=True,
    )
    lines = child.stdout.decode(errors="replace").splitlines()
    if child.returncode or not lines:
        said = child.stderr.decode(errors="replace").strip().splitlines()
        raise CannotRun(f"the checks ended with status {child.returncode}: {said[-1] if said else 'no output'}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "refused" in answer:
        raise Refused(answer["refused"])
    return list(answer["assumed"])


def examine(run: ClusterRun) -> list[str]:
    """Run the checks in a process whose environment is `environment(run)`; see `validate`."""
    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.arguments.assumed_machine import assumed, gpu_of
    from megatron_cp.megatron.machine.environment import copies_beside, environment_for_gpus

    _check_environment(run.recipe)
    if gpu := gpu_of(run.cluster):
        _check_precision(run.recipe, gpu)
    ours, words = runs_through_us(run.recipe), flag_words(run.recipe.model_args)
    sys.argv = ["validate", *words]
    names = ["flags", *(["connections"] if ours and copies_beside(words) else [])]
    with contextlib.redirect_stdout(io.StringIO()), assumed(run.cluster) as there, hooks.apply(names):
        if ours:
            environment_for_gpus(words)
        try:
            _until_the_tokenizer(run.recipe, there.machine if ours else None)
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise Refused(recipe_flags.with_places(one_line(error), run.recipe)) from error
    return there.told


def _check_environment(recipe: Recipe) -> None:
    backend = recipe.flag("--attention-backend", "auto")
    for name, wanted in zip(SET_BY_MEGATRON, BY_BACKEND.get(backend, ""), strict=False):
        setting = recipe.env_vars.get(name)
        if setting is not None and setting.text != wanted:
            raise Refused(
                f"{setting.place}: {name} is {setting.text!r}, but Megatron sets it to {wanted} for "
                f"--attention-backend {backend} and stops when it differs; take it out, or pass another backend"
            )


def _check_precision(recipe: Recipe, gpu: "Gpu") -> None:
    for flag, least in LEAST_CAPABILITY.items():
        setting = recipe.model_args.get(flag)
        if setting is not None and gpu.capability < least:
            needed, found = (".".join(map(str, capability)) for capability in (least, gpu.capability))
            raise Refused(
                f"{setting.place}: {flag} needs compute capability {needed}, got {found} of {gpu.name}; leave {flag} "
                f"out, or take a cluster of later GPUs"
            )


def _until_the_tokenizer(recipe: Recipe, machine: "Machine | None") -> None:
    """Do what a training script does before it builds the tokenizer, and check what would be refused after it.

    machine: that our own checks are asked about; None for a run that does not go through us
    """
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_cp.megatron.arguments import checks, command_line, entry, stock_rules, upstream_faults

    def checked(parser: ArgumentParser) -> ArgumentParser:
        recipe_flags.check(recipe.model_args, parser)
        return parser

    args = arguments.parse_args(checked)
    check = arguments.validate_args
    if machine:
        check = functools.partial(checks.validate_for, machine, check)
    check(args, {"tokenizer_type": "GPT2BPETokenizer"})
    upstream_faults.refuse_upstream_faults(args, te=machine is None or machine.te)
    if "entry" not in recipe.launch or recipe.launch["entry"].text == ENTRY:
        entry.refuse_unread(args)
    elif machine:
        command_line.check_script(sys.argv[1:], has_our_layers(args))
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
    # nothing is known about layers of a third party
    if args.spec is None or args.spec[0].startswith("megatron."):
        stock_rules.check_attention(args)


def main() -> None:
    """Read a run from stdin and print one line of JSON, in the fresh process."""
    run: ClusterRun = pickle.load(sys.stdin.buffer)
    try:
        answer: dict[str, Any] = {"assumed": examine(run)}
    except ValueError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
