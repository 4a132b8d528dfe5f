"""Lists of tensors with different numbers of rows are gathered and scattered over gloo in the CPU runtime."""

import pytest
import torch
import torch.distributed as dist

from megatron_cp.megatron.machine.cpu import cpu_runtime
from tests.ranks import run_ranks

SIZES = ([3, 0, 5], [0, 0, 2], [4, 4, 4])


def rows_of(rank: int, size: int) -> torch.Tensor:
    return torch.arange(2.0 * size).reshape(size, 2) + 100 * rank


def gathered_and_scattered(sizes: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What a rank gathers, its part of the sum of what all gathered, and the gradient of its rows through Megatron."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = rows_of(rank, sizes[rank])
    with cpu_runtime():
        from megatron.core.tensor_parallel.mappings import (
            gather_from_sequence_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        gathered = [torch.empty(size, 2) for size in sizes]
        dist.all_gather(gathered, mine)
        part = torch.empty_like(mine)
        dist.reduce_scatter(part, [(rank + 1) * each for each in gathered])
        x = mine.clone().requires_grad_()
        whole = gather_from_sequence_parallel_region(x, group=dist.group.WORLD, output_split_sizes=sizes)
        back = reduce_scatter_to_sequence_parallel_region(whole, group=dist.group.WORLD, input_split_sizes=sizes)
        (back * mine).sum().backward()
    dist.barrier()
    return gathered, part, x.grad


@pytest.mark.parametrize("sizes", SIZES, ids=["one has none", "one has all", "equal"])
def test_rows_of_different_numbers_are_gathered_and_added_up(sizes: list[int]) -> None:
    expected = [rows_of(rank, size) for rank, size in enumerate(sizes)]
    for rank, (gathered, part, gradient) in enumerate(run_ranks(3, gathered_and_scattered, sizes)):
        assert all(map(torch.equal, gathered, expected))
        assert torch.equal(part, (1 + 2 + 3) * expected[rank])
        # all three ranks scatter what they have gathered
        assert torch.equal(gradient, 3 * expected[rank])
