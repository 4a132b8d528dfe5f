"""The problem of a batch for the model and the ranks of this run, as Megatron's arguments and the command line say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_cp.batches.group_rates import GroupRequest, batch_problem
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.context.auto import default_cluster
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.machine.facts import device_of_run
from megatron_cp.planner.model import model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.recipe.recipe import Recipe, overridden


def problem_of_run(args: Any, argv: Sequence[str]) -> BatchProblem:
    """Return the problem of a step, but for its documents.

    args: parsed and validated
    argv: flags of the command line
    Raises ValueError for sizes that do not divide, and where memory is not known and not given.
    """
    flags = AttentionFlags.of(args)
    # sizes that the arguments of a run have, and its flags need not
    known = ("--vocab-size", str(args.padded_vocab_size), "--nproc-per-node", str(args.world_size))
    empty = Recipe(name="this run", env_vars={}, model_args={}, launch={}, data={})
    recipe = overridden(empty, [*argv, *known])
    model = model_of(recipe)
    parallel = parallel_of(recipe, model.layers)
    # as many microbatches as slots, which the batch of a plan has in the place of Megatron's
    parallel = replace(parallel, micro_batch=1, global_batch=parallel.dp)
    cluster = load_cluster(flags.cluster) if flags.cluster else default_cluster(device_of_run())
    request = GroupRequest(model, parallel, cluster, stretching(record))
    # the smallest of documents, which those of each step replace
    return batch_problem(request, (1,), flags.tokens_per_rank)
