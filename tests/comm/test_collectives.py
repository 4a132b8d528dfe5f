"""Collectives mean the same on every fabric, and every fabric counts the same bytes."""

import pytest
import torch

from megatron_cp.comm import GroupFabric, Members, MessageError, SingleFabric, in_process
from megatron_cp.context.trace.events import match
from megatron_cp.grid import Grid
from tests.cases import slow_unless
from tests.comm.test_fabrics import recorded
from tests.ranks import run_ranks

RANKS = [2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16]
EVEN, UNEVEN, EMPTY = "even", "uneven", "empty"


def rows(kind, src, dst):
    """How many rows rank `src` sends rank `dst`."""
    return {EVEN: 2, UNEVEN: (2 * src + dst) % 4, EMPTY: 0}[kind]


def filled(*shape, value, dtype, device="cpu"):
    """Small whole numbers, which bfloat16 adds without rounding."""
    return torch.full(shape, float(value), dtype=dtype, device=device)


def all_to_all(fabric, kind, dtype, device="cpu"):
    me, everyone = fabric.rank, range(fabric.size)
    pieces = [filled(rows(kind, me, peer), 3, value=10 * me + peer, dtype=dtype, device=device) for peer in everyone]
    sends, recvs = [rows(kind, me, peer) for peer in everyone], [rows(kind, peer, me) for peer in everyone]
    return fabric.all_to_all(torch.cat(pieces), sends, recvs)


def reduce_scatter(fabric, kind, dtype, device="cpu"):
    part = 0 if kind == EMPTY else 2
    whole = [filled(part, 3, value=(fabric.rank + 1) * peer, dtype=dtype, device=device) for peer in range(fabric.size)]
    return fabric.reduce_scatter(torch.stack(whole))


def all_gather(fabric, kind, dtype, device="cpu"):
    return fabric.all_gather(filled(0 if kind == EMPTY else 2, 3, value=fabric.rank, dtype=dtype, device=device))


def started_all_gather(fabric, kind, dtype, device="cpu"):
    local = filled(0 if kind == EMPTY else 2, 3, value=fabric.rank, dtype=dtype, device=device)
    gathered = local.new_empty((fabric.size, *local.shape))
    fabric.start_all_gather(gathered, local).wait()
    return gathered


def started_reduce_scatter(fabric, kind, dtype, device="cpu"):
    rows = 0 if kind == EMPTY else 2
    whole = [filled(rows, 3, value=(fabric.rank + 1) * peer, dtype=dtype, device=device) for peer in range(fabric.size)]
    part = torch.empty_like(whole[0])
    fabric.start_reduce_scatter(part, torch.stack(whole)).wait()
    return part


def expected(name, size, rank, kind, dtype):
    if name is all_to_all:
        parts = [filled(rows(kind, src, rank), 3, value=10 * src + rank, dtype=dtype) for src in range(size)]
        return torch.cat(parts)
    part = 0 if kind == EMPTY else 2
    if name in (reduce_scatter, started_reduce_scatter):
        return filled(part, 3, value=rank * size * (size + 1) / 2, dtype=dtype)
    return torch.stack([filled(part, 3, value=src, dtype=dtype) for src in range(size)])


def expected_bytes(name, size, rank, kind, dtype):
    others = [peer for peer in range(size) if peer != rank]
    if name is all_to_all:
        count = sum(rows(kind, rank, peer) for peer in others)
    else:
        count = 0 if kind == EMPTY else 2 * len(others)
    return count * 3 * dtype.itemsize


COLLECTIVES = [all_gather, reduce_scatter, all_to_all, started_all_gather, started_reduce_scatter]
CASES = [
    (collective, kind, dtype)
    for collective in COLLECTIVES
    for kind in ([EVEN, UNEVEN, EMPTY] if collective is all_to_all else [EVEN, EMPTY])
    for dtype in DTYPES
]


def everything(fabric):
    """Result and bytes sent of every case."""
    found = []
    for collective, kind, dtype in CASES:
        before = fabric.sent
        found.append((collective(fabric, kind, dtype), fabric.sent - before))
    return found


def over_gloo():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return everything(GroupFabric(dist.group.WORLD))


def assert_right(per_rank):
    size = len(per_rank)
    for rank, found in enumerate(per_rank):
        for (collective, kind, dtype), (result, sent) in zip(CASES, found, strict=True):
            case = (collective.__name__, kind, dtype)
            assert result.dtype == dtype, case
            assert torch.equal(result, expected(collective, size, rank, kind, dtype)), case
            assert sent == expected_bytes(collective, size, rank, kind, dtype), case


@pytest.mark.parametrize("ranks", RANKS)
def test_collectives_of_threads(ranks):
    assert_right(in_process(ranks, everything))


@pytest.mark.parametrize("ranks", RANKS)
def test_collectives_of_some_ranks_of_a_fabric(ranks):
    cases = [case for case in CASES if case[0] in (all_gather, reduce_scatter, all_to_all)]

    def body(whole):
        # the last rank of the fabric is none of them; the others count from the other end
        if whole.rank == ranks:
            return None
        fabric = Members(whole, range(ranks))
        fabric = fabric.subset(range(ranks)[::-1])
        for collective, kind, dtype in cases:
            before = fabric.sent
            result = collective(fabric, kind, dtype)
            assert torch.equal(result, expected(collective, ranks, fabric.rank, kind, dtype))
            assert fabric.sent - before == expected_bytes(collective, ranks, fabric.rank, kind, dtype)
        return fabric.rank

    assert in_process(ranks + 1, body) == [*range(ranks)[::-1], None]


@pytest.mark.parametrize("ranks", slow_unless([3], RANKS))
def test_collectives_of_processes(ranks):
    assert_right(run_ranks(ranks, over_gloo))


@pytest.mark.parametrize(("collective", "kind", "dtype"), CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_recording_notes_the_bytes_that_are_sent(ranks, collective, kind, dtype):
    shapes = []
    run = recorded(ranks, lambda fabric: shapes.append(collective(fabric, kind, dtype, device="meta").shape))
    match(run)
    assert run.sent == [expected_bytes(collective, ranks, rank, kind, dtype) for rank in range(ranks)]
    assert shapes == [expected(collective, ranks, rank, kind, dtype).shape for rank in range(ranks)]


def test_a_single_rank_keeps_what_it_has():
    fabric, x = SingleFabric(), torch.arange(6.0).view(1, 6)
    assert torch.equal(fabric.reduce_scatter(x), x[0])
    assert torch.equal(fabric.all_to_all(x, [1], [1]), x)
    assert fabric.sent == 0


def test_a_sum_of_narrow_numbers_is_rounded_once():
    def body(fabric):
        # 256 + 1 is no bfloat16, 256 + 1 + 1 is
        return fabric.reduce_scatter(filled(3, 1, value=256 if fabric.rank == 0 else 1, dtype=torch.bfloat16))

    assert [x.item() for x in in_process(3, body)] == [258.0] * 3


@pytest.mark.parametrize(
    ("sends", "recvs", "message"),
    [
        ([1, 1, 0], [1, 1, 0], "takes 2 counts"),
        ([3, -1], [1, 1], "0 or more"),
        ([1, 2], [1, 2], "add up to its 2 rows"),
        ([1, 1], [0, 1], "agree on its own"),
    ],
)
def test_counts_that_do_not_fit_are_refused(sends, recvs, message):
    def body(fabric):
        place = slice(None) if fabric.rank == 0 else slice(None, None, -1)
        return fabric.all_to_all(torch.ones(2, 1), sends[place], recvs[place])

    with pytest.raises(MessageError, match=message):
        in_process(2, body)


def test_parts_that_are_not_one_per_rank_are_refused():
    with pytest.raises(MessageError, match="one part per rank, 2, got"):
        in_process(2, lambda fabric: fabric.reduce_scatter(torch.ones(3, 1)))


FAULTS = {
    "dtype": lambda x: x.to(torch.float64),
    "shape": lambda x: x.new_empty((*x.shape[:-1], 4)),
    "stride": lambda x: x.new_empty((*x.shape, 2))[..., 0],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("start", ["start_all_gather", "start_reduce_scatter"])
def test_a_collective_whose_tensors_do_not_fit_is_refused_by_threads_and_recordings(start, which, fault):
    def body(fabric, device="cpu"):
        tensors = [torch.ones(2, 2, 3, device=device), torch.ones(2, 3, device=device)]
        tensors[which] = FAULTS[fault](tensors[which])
        getattr(fabric, start)(*(tensors if start == "start_all_gather" else tensors[::-1])).wait()

    for run in (lambda: in_process(2, body), lambda: recorded(2, lambda fabric: body(fabric, "meta"))):
        with pytest.raises(MessageError, match=r"takes one part of each|must be contiguous"):
            run()


@pytest.mark.parametrize(("sizes", "names"), [((3, 2), ("inner", "outer")), ((2, 3, 2), ("row", "column", "depth"))])
def test_the_axes_of_a_grid_are_rows_of_a_box_of_ranks(sizes, names):
    grid = Grid(*sizes, names=names)
    # the first axis varies fastest, so it is the last dim
    box = torch.arange(grid.ranks).view(*reversed(sizes))
    for place, axis in enumerate(names):
        lines = box.movedim(-1 - place, -1).reshape(-1, sizes[place]).tolist()
        assert grid.size(axis) == sizes[place]
        for rank in range(grid.ranks):
            assert grid.members(axis, rank) == next(line for line in lines if rank in line)


@pytest.mark.parametrize(("sizes", "names"), [((2,), ("a", "b")), ((2, 2), ("a", "a")), ((2, 0), ("a", "b"))])
def test_a_grid_that_is_none_is_refused(sizes, names):
    with pytest.raises(ValueError, match="one positive size for each of its axes"):
        Grid(*sizes, names=names)
