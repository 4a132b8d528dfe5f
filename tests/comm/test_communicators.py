"""New communicators are made like the group that they are for, and by all ranks alike."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_cp.comm import GroupFabric, backwards, wires
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


def subsets_of_a_part() -> tuple[list[str], list[float], list[float]]:
    """Subsets of groups that are a part of the run, whose ranks have made unequal numbers of groups before."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = [dist.new_group(ranks, group_desc="TENSOR_MODEL_PARALLEL_GROUP") for ranks in ([0, 1], [2])][rank == 2]
    assert isinstance(own, dist.ProcessGroup)
    # a name that only its members make: ranks 0 and 1 are in one group more than rank 2, and have counted one more;
    # where their next groups are not counted alike, one of rank 2 has the name of one of ranks 0 and 1, and both wait
    if rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
    part = GroupFabric(own)
    single, all_of_it = part.subset([part.rank]), part.subset(range(part.size))
    names = [fabric.group.group_desc for fabric in (single, all_of_it)]
    gathered = [fabric.all_gather(torch.tensor([float(rank)])).flatten().tolist() for fabric in (single, all_of_it)]
    dist.barrier()
    return names, *gathered


def test_subsets_of_a_part_of_the_run_are_made_by_all_ranks_alike() -> None:
    names = ["TENSOR_MODEL_PARALLEL_GROUP_SUBSET"] * 2
    assert run_ranks(3, subsets_of_a_part) == [
        (names, [0.0], [0.0, 1.0]),
        (names, [1.0], [0.0, 1.0]),
        (names, [2.0], [2.0]),
    ]


def ranks_from_the_other_end() -> tuple[str, int]:
    dist.init_process_group("gloo")
    pipeline = dist.new_group([0, 1, 2], group_desc="PIPELINE_MODEL_PARALLEL_GROUP")
    assert isinstance(pipeline, dist.ProcessGroup)
    made = backwards(pipeline)
    dist.barrier()
    return made.group_desc, made.rank()


def test_a_group_from_the_other_end_is_named_after_its_group() -> None:
    assert run_ranks(3, ranks_from_the_other_end) == [
        ("PIPELINE_MODEL_PARALLEL_GROUP_BACKWARDS", 2 - rank) for rank in range(3)
    ]


def test_groups_are_named_and_ranks_with_more_groups_than_others_agree_on_them() -> None:
    names = [f"PIPELINE_MODEL_PARALLEL_GROUP_MESSAGES_{number}" for number in range(2)]
    assert run_ranks(3, groups_over_gloo) == [
        (names, [0.0, 1.0], [0.0]),
        (names, [0.0, 1.0], [1.0, 2.0]),
        (names, [2.0], [1.0, 2.0]),
    ]
