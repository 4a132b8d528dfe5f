"""New communicators are made like the group that they are for, and by all ranks alike."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_cp.comm import GroupFabric, wires
from megatron_cp.comm.distributed import options_like
from tests.ranks import run_ranks


def test_options_of_nccl_are_copied_into_new_ones() -> None:
    if not dist.is_nccl_available():
        pytest.skip("this torch is built without NCCL")
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    wanted = {"cga_cluster_size": 2, "min_ctas": 4, "max_ctas": 8, "net_name": "IB"}
    for name, value in wanted.items():
        setattr(options.config, name, value)
    made = options_like(options)
    assert made is not options
    assert made.is_high_priority_stream
    assert {name: getattr(made.config, name) for name in wanted} == wanted


def test_options_that_say_nothing_stay_as_nccl_has_them() -> None:
    if not dist.is_nccl_available():
        pytest.skip("this torch is built without NCCL")
    plain = dist.ProcessGroupNCCL.Options()
    made = options_like(plain)
    assert not made.is_high_priority_stream
    assert (made.config.max_ctas, made.config.net_name) == (plain.config.max_ctas, None)


def groups_over_gloo() -> tuple[list[str], list[float], list[float]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # ranks 0 and 1 are in one group more than rank 2
    dist.new_group([0, 1])
    pipeline = dist.new_group([0, 1, 2], group_desc="PIPELINE_MODEL_PARALLEL_GROUP")
    assert isinstance(pipeline, dist.ProcessGroup)
    made = wires(pipeline, 2, timedelta(minutes=5))
    whole = GroupFabric(dist.group.WORLD)
    fabric = whole.subset([2] if rank == 2 else [0, 1])
    again = whole.subset([0] if rank == 0 else [1, 2])
    gathered = [fabric.all_gather(torch.tensor([float(rank)])), again.all_gather(torch.tensor([float(rank)]))]
    names = [wire._group.group_desc for wire in made]
    dist.barrier()
    return names, *(values.flatten().tolist() for values in gathered)


def test_groups_are_named_and_ranks_with_more_groups_than_others_agree_on_them() -> None:
    names = [f"PIPELINE_MODEL_PARALLEL_GROUP_MESSAGES_{number}" for number in range(2)]
    assert run_ranks(3, groups_over_gloo) == [
        (names, [0.0, 1.0], [0.0]),
        (names, [0.0, 1.0], [1.0, 2.0]),
        (names, [2.0], [1.0, 2.0]),
    ]
