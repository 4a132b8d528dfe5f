"""What `megatron_cp` offers a training loop: plans of groups and meshes, cut tensors, positions."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import megatron_cp
from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.context.layouts import LAYOUTS, indices
from megatron_cp.context.plan import plan
from megatron_cp.context.sharding import positions, shard, unshard
from tests.ranks import run_ranks

NAMES = ("attend", "plan", "positions", "shard", "unshard")


def test_the_package_lists_what_a_loop_uses():
    assert set(NAMES) <= set(dir(megatron_cp))
    assert megatron_cp.__all__ == list(NAMES)
    assert megatron_cp.plan is plan
    assert [getattr(megatron_cp, name).__name__ for name in NAMES] == list(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'planned'"):
        _ = megatron_cp.planned


def test_listing_the_package_imports_no_torch():
    script = "import sys, megatron_cp; dir(megatron_cp); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_cut_comes_back(name):
    whole = torch.arange(2 * 24 * 3).view(2, 24, 3)

    def body(fabric):
        how = plan("ring", cp=fabric, layout=name, causal=False)
        mine = shard(whole, how, dim=1)
        assert positions(how, 24).tolist() == list(indices(name, 24, 4, fabric.rank))
        assert torch.equal(mine, whole[:, positions(how, 24)])
        assert torch.equal(unshard(mine, how, dim=-2), whole)
        return mine.shape[1]

    assert in_process(4, body) == [6] * 4


def test_stripes_are_cut_by_their_length():
    def body(fabric):
        how = plan("striped", cp=fabric, layout="striped", stripe=2)
        return positions(how, 8).tolist()

    assert in_process(2, body) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_gradients_go_through_a_cut():
    whole = torch.randn(4, 2, requires_grad=True)
    shard(whole, plan("zigzag", cp=SingleFabric())).sum().backward()
    assert torch.equal(whole.grad, torch.ones(4, 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda how: shard(torch.ones(6, 1), how), "6"),
        (lambda how: shard(torch.ones(8), how, dim=1), "dim 1 must be one of 1 dims"),
        (lambda how: positions(how, 0), "tokens is the length of the whole sequence"),
    ],
)
def test_what_cannot_be_cut_is_refused(call, text):
    def body(fabric):
        with pytest.raises(ValueError, match=text):
            call(plan("zigzag", cp=fabric))

    in_process(2, body)


UNLIKE = {
    "tokens": (
        lambda rank, how: unshard(torch.ones(8 if rank else 4), how),
        "equally many tokens, got rank 0: 4, rank",
    ),
    "width": (lambda rank, how: unshard(torch.ones(4, 2 - rank), how), "tensors of one shape"),
    "dtype": (lambda rank, how: unshard(torch.ones(4).to([torch.int32, torch.float32][rank]), how), "one dtype, got "),
    "dim": (lambda rank, how: unshard(torch.ones(4, 4), how, dim=rank), "all ranks must attend by one plan"),
    "sparse": (lambda rank, how: unshard(torch.eye(4).to_sparse() if rank else torch.eye(4), how), "rank 1: a tensor"),
    "odd": (lambda rank, how: unshard(torch.ones(3), how), "needs S divisible by 2"),
}


def test_what_one_rank_puts_together_otherwise_is_refused_by_all():
    def body(fabric):
        found = {}
        for name, (call, _) in UNLIKE.items():
            with pytest.raises(ValueError, match=r"\w") as refused:
                call(fabric.rank, plan("zigzag", cp=fabric))
            found[name] = str(refused.value)
        with pytest.raises(ValueError, match="one plan"):
            unshard(torch.ones(4), plan("zigzag", cp=fabric, layout=["zigzag", "contiguous"][fabric.rank]))
        return found

    first, second = in_process(2, body)
    assert first == second
    for name, (_, text) in UNLIKE.items():
        assert text in first[name], name
        assert "\n" not in first[name]


def groups_and_meshes():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    q = torch.randn(8, 1, 2, 4)
    made = [plan("zigzag", cp=cp) for cp in (dist.group.WORLD, init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)))]
    outs = [unshard(megatron_cp.attend(*[shard(q, how)] * 3, how), how) for how in made]
    assert all(how.sent for how in made)
    texts = []
    flat = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    for choices in ({}, {"cp": flat}):
        with pytest.raises(ValueError, match="cp ") as refused:
            plan("zigzag", **choices)
        texts.append(str(refused.value))
    alone = megatron_cp.attend(q, q, q, plan("zigzag", cp=SingleFabric()))
    dist.barrier()
    return outs, alone, texts, plan("zigzag", cp=flat["cp"]).cp.size


def test_a_plan_takes_groups_and_meshes_and_no_job_without_one():
    for outs, alone, (left_out, flat), size in run_ranks(2, groups_and_meshes):
        for out in outs:
            torch.testing.assert_close(out, alone)
        assert left_out.startswith("cp is left out in a job of 2 processes")
        assert flat == "cp must be a mesh of one dim, got 2; take one of its dims: mesh['cp']"
        assert size == 2
