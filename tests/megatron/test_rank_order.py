"""Where Megatron puts the ranks of Megatron-Turing NLG 530B (arXiv:2201.11990)."""

import inspect

import pytest

from megatron_cp.recipe import recipe
from megatron_cp.recipe.command import processes
from megatron_cp.recipe.file import Unset


@pytest.mark.parametrize("nodes", [280, 350, 420])
def test_tensor_parallelism_is_inside_nodes_and_replicas_of_a_stage_are_on_neighbours(nodes: int) -> None:
    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    run = recipe.load("mt-nlg-530b-2k-a100x2240", Unset({}), ["--nnodes", str(nodes)])
    tp, pp = (run.number(f"--{name}-model-parallel-size", 1) for name in ("tensor", "pipeline"))
    world, per_node = processes(run), int(run.launch["--nproc-per-node"].text)
    assert (tp, pp, world, per_node) == (8, 35, 8 * nodes, 8)
    dp = world // (tp * pp)
    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    ranks = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order=order)
    # each tensor-parallel group is a node
    assert ranks.get_ranks("tp") == [list(range(first, first + 8)) for first in range(0, world, 8)]
    # replicas of a stage are at one place of as many neighbouring nodes
    for group in ranks.get_ranks("dp"):
        assert group == list(range(group[0], group[0] + 8 * dp, 8))
    # and a pipeline goes over 35 nodes, from one place to the same place
    for group in ranks.get_ranks("pp"):
        assert [rank // 8 for rank in group] == list(range(group[0] // 8, nodes, dp))
        assert {rank % 8 for rank in group} == {group[0] % 8}
