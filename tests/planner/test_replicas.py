"""What replicas exchange: experts around the ranks that hold the same ones, weights in the dtype that they have."""

import pytest

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel

H100 = load_cluster("dgx-h100-ib")

# a layer: attention of 4 x 8 x 8, a router of 4 x 8, two norms of 8, 4 experts of 3 x 8 x 16; ends of 32 x 8, a norm
MIXTURE = Transformer(
    name="mixture",
    layers=1,
    hidden=8,
    ffn=16,
    heads=2,
    kv_heads=2,
    head_dim=4,
    vocab=32,
    experts=4,
    top_k=2,
    expert_ffn=16,
)
ATTENTION, EXPERTS, REST = 4 * 8 * 8, 4 * 3 * 8 * 16, 4 * 8 + 2 * 8 + 2 * 32 * 8 + 8


def of(**sizes) -> Estimate:
    parallel = Parallel(global_batch=sizes.get("dp", 1), overlap_grad_reduce=False, overlap_param_gather=False, **sizes)
    return estimate(MIXTURE, parallel, H100, 16)


def data_bytes(**sizes) -> float:
    return sum(level.data for level in of(**sizes).traffic)


@pytest.mark.parametrize(
    ("sizes", "around", "around_same_experts"),
    [
        # each rank has the half of the experts, which one other has too
        ({"dp": 4, "ep": 2}, (ATTENTION + REST) * 3 / 4, EXPERTS / 2 * 1 / 2),
        ({"dp": 2, "cp": 2, "ep": 2}, (ATTENTION + REST) * 3 / 4, EXPERTS / 2 * 1 / 2),
        # nobody else has them
        ({"dp": 4, "ep": 4}, (ATTENTION + REST) * 3 / 4, 0),
        # without expert parallelism they are reduced as all others
        ({"dp": 4}, (ATTENTION + REST) * 3 / 4, EXPERTS * 3 / 4),
        # whole experts beside split attention: 8 ranks, 2 of which have the same fourth of the experts
        ({"tp": 2, "dp": 4, "ep": 4, "etp": 1}, (ATTENTION + REST) / 2 * 3 / 4, EXPERTS / 4 * 1 / 2),
    ],
)
def test_gradients_and_weights_of_experts_travel_among_the_ranks_that_hold_the_same_ones(
    sizes, around, around_same_experts
):
    # float32 gradients there, bf16 weights back
    assert data_bytes(**sizes) == pytest.approx(6 * (around + around_same_experts))
    # without a distributed optimizer gradients are added, which moves them twice
    assert data_bytes(**sizes, distributed_optimizer=False) == pytest.approx(8 * (around + around_same_experts))
    assert data_bytes(**sizes, fsdp=True) == pytest.approx(8 * (around + around_same_experts))


def test_seconds_of_both_groups_and_on_which_links():
    # 16 ranks on two nodes: the four with the same experts are 4 apart, two on each node
    found = of(dp=16, ep=4)
    far = H100.between
    assert far is not None
    around, same = (ATTENTION + REST) * 15 / 16, EXPERTS / 4 * 3 / 4
    # one latency for each doubling, of a reduction and of a gather
    of_all = 6 * around / H100.group_rate("scatter", 16, 1) + 2 * 4 * far.least_s
    of_same = 6 * same / H100.group_rate("scatter", 4, 4) + 2 * 2 * far.least_s
    assert found.parts.data == pytest.approx(of_all + of_same)
    # of the hops of a ring one in eight, and one in two, leaves a node
    assert found.traffic.between.data == pytest.approx(6 * (around / 8 + same / 2))


def test_instances_of_the_optimizer_share_out_the_ranks_with_the_same_experts():
    # 8 ranks, 4 of which have the same half of the experts; two instances of 4 and of 2 ranks
    inside = 6 * ((ATTENTION + REST) * 3 / 4 + EXPERTS / 2 * 1 / 2)
    # shards are added up between two instances
    between = 4 * 2 * 1 / 2 * ((ATTENTION + REST) / 4 + EXPERTS / 2 / 2)
    assert data_bytes(dp=8, ep=2, instances=2) == pytest.approx(inside + between)
    with pytest.raises(ValueError, match="--num-distributed-optimizer-instances 4 must divide the 2 ranks that hold"):
        of(dp=8, ep=4, instances=4)


@pytest.mark.parametrize(("kept", "linear"), [(False, 2), (True, 1)], ids=["copy in bf16", "fp8 alone"])
def test_weights_in_fp8_travel_as_they_are_stored(kept, linear):
    # float32 gradients of all; of weights, linears alone are stored in fp8
    expected = (4 + linear) * (ATTENTION + EXPERTS) + (4 + 2) * REST
    assert data_bytes(dp=4, precision="fp8", fp8_params=kept) == pytest.approx(expected * 3 / 4)
    shared = (4 + linear) * (ATTENTION * 3 / 4 + EXPERTS / 2 * 1 / 2) + (4 + 2) * REST * 3 / 4
    assert data_bytes(dp=4, ep=2, precision="fp8", fp8_params=kept) == pytest.approx(shared)
    # the time falls with the bytes
    slow, fast = (of(dp=4, precision="fp8", fp8_params=fp8).parts.data for fp8 in (False, True))
    assert fast < slow
