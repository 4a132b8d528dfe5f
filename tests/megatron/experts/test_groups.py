"""Ranks that the estimate takes for those that hold the same experts are Megatron's expert data parallelism."""

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_cp.planner.parallel import Parallel


@pytest.mark.parametrize(
    "sizes", [{"dp": 4, "ep": 2}, {"tp": 2, "dp": 4, "ep": 2}, {"tp": 2, "dp": 4, "ep": 4, "etp": 1}]
)
def test_the_ranks_with_the_same_experts_are_those_of_megatron(sizes):
    parallel = Parallel(**sizes, global_batch=sizes["dp"])
    groups = RankGenerator(
        tp=parallel.expert_tp,
        ep=parallel.ep,
        dp=parallel.world // (parallel.expert_tp * parallel.ep * parallel.pp),
        pp=parallel.pp,
        cp=1,
        order="tp-cp-ep-dp-pp",
    ).get_ranks("dp")
    stride = parallel.expert_tp * parallel.ep
    assert groups[0] == [at * stride for at in range(parallel.expert_shards)]
