"""The order of messages and products, and engines over process groups."""

import pytest
import torch

from megatron_cp.comm import GroupFabric, SingleFabric, in_process
from megatron_cp.context.trace.events import Matmul, Pass, Post, Wait, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.tensor import ENGINES, symmetric
from megatron_cp.tensor.flux import ColumnFlux, RowFlux
from megatron_cp.tensor.summa_2d import column_linear, row_linear
from megatron_cp.tensor.symmetric import FusedOperations, SymmetricEngine
from tests.cases import slow_unless
from tests.ranks import run_ranks
from tests.tensor.dense import close, cut, dense
from tests.tolerances import EXACT

WORDS = {Post: "post", Matmul: "product", Wait: "wait"}


def recorded(ranks, engine, body):
    """Record `body(engine)` on each rank, check that the messages match, and return each rank's words."""
    steps = []
    for rank in range(ranks):
        with Recorder() as recorder:
            made = ENGINES.get(engine).load()(RecordingFabric(recorder, tuple(range(ranks)), rank))
            body(made)
            steps.append(recorder.take())
    match(Pass(tuple(steps), 0))
    return [" ".join(WORDS[type(event)] for event, _ in each if type(event) in WORDS) for each in steps]


def meta(*shape):
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("ranks", range(2, 9))
def test_a_ring_posts_the_next_message_before_it_multiplies(ranks):
    hop = "post product wait"
    assert (
        recorded(ranks, "ring", lambda engine: engine.ag_matmul(meta(4, 6), meta(6, 8)))
        == [" ".join([hop] * (ranks - 1) + ["product"])] * ranks
    )
    assert (
        recorded(ranks, "ring", lambda engine: engine.wgrad(meta(4 * ranks, 8), meta(4, 6)))
        == [" ".join([hop] * (ranks - 1) + ["product"])] * ranks
    )
    assert (
        recorded(ranks, "ring", lambda engine: engine.ag_matmul_and_wgrad(meta(4, 6), meta(6, 8), meta(4 * ranks, 8)))
        == [" ".join(["post product product wait"] * (ranks - 1) + ["product product"])] * ranks
    )
    assert (
        recorded(ranks, "ring", lambda engine: engine.matmul_rs(meta(4 * ranks, 6), meta(6, 8)))
        == [" ".join(["product post"] + ["product wait post"] * (ranks - 2) + ["product wait"])] * ranks
    )


@pytest.mark.parametrize("ranks", [2, 5])
def test_panels_post_the_next_shard_before_they_multiply_one(ranks):
    def linears(engine):
        alone = ENGINES.get("collective").load()(SingleFabric())
        return column_linear(alone, engine), row_linear(alone, engine)

    around = " ".join(["post product wait"] * (ranks - 1) + ["product"])
    home = " ".join(["product post"] + ["product wait post"] * (ranks - 2) + ["product wait"])
    x, shard, dy = meta(12, 6), meta(4, 6), meta(12, 4 * ranks)
    assert recorded(ranks, "panels", lambda engine: linears(engine)[0].forward(x, shard)) == [around] * ranks
    assert recorded(ranks, "panels", lambda engine: linears(engine)[0].input_gradient(dy, shard)) == [around] * ranks
    assert recorded(ranks, "panels", lambda engine: linears(engine)[0].weight_gradient(dy, x)) == [home] * ranks
    x, shard, dy = dy, meta(6, 4), x
    assert recorded(ranks, "panels", lambda engine: linears(engine)[1].forward(x, shard)) == [around] * ranks
    assert recorded(ranks, "panels", lambda engine: linears(engine)[1].input_gradient(dy, shard)) == [around] * ranks
    assert recorded(ranks, "panels", lambda engine: linears(engine)[1].weight_gradient(dy, x)) == [home] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_are_waited_for(ranks):
    gathers = recorded(ranks, "collective", lambda engine: engine.ag_matmul(meta(4, 6), meta(6, 8)))
    scatters = recorded(ranks, "collective", lambda engine: engine.matmul_rs(meta(4 * ranks, 6), meta(6, 8)))
    assert gathers == ["post wait product"] * ranks
    assert scatters == ["product post wait"] * ranks


def over_gloo(sizes):
    """Errors of each engine against the dense linear, over gloo; the bytes that each counts."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as torchs

    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    # the operations themselves are for GPUs; torch has the same in plain collectives
    fused = FusedOperations(torchs._fused_all_gather_matmul_fallback, torchs._fused_matmul_reduce_scatter_fallback)
    makers = {
        "collective": ENGINES.get("collective").load(),
        "ring": ENGINES.get("ring").load(),
        "symmetric": lambda fabric: SymmetricEngine(fabric, operations=fused),
    }
    found = {}
    for name, make in makers.items():
        tokens, inputs, outputs = (size * ranks for size in sizes)
        whole, fabric = dense(tokens, inputs, outputs), GroupFabric(dist.group.WORLD)
        engine, part = make(fabric), lambda tensor, dim: cut(tensor, ranks, rank, dim)
        column, row = ColumnFlux(engine), RowFlux(engine)
        x, dy, shard = part(whole.x, 0), part(whole.dy, 1), part(whole.weight, 0)
        errors = [close(column.forward(x, shard), part(whole.y, 1))]
        dx, dw = column.backward(dy, x, shard)
        errors += [close(dx, part(whole.dx, 0)), close(dw, part(whole.dw, 0))]
        x, dy, shard = part(whole.x, 1), part(whole.dy, 0), part(whole.weight, 1)
        errors += [close(row.forward(x, shard), part(whole.y, 0))]
        dx, dw = row.backward(dy, x, shard)
        errors += [close(dx, part(whole.dx, 1)), close(dw, part(whole.dw, 1))]
        errors += [close(row.weight_gradient(dy, x), part(whole.dw, 1))]
        found[name] = max(errors), fabric.sent
    dist.barrier()
    return found


@pytest.mark.parametrize("ranks", slow_unless([3], [2, 3, 4]))
def test_engines_over_a_process_group_equal_one_rank_and_send_equally_much(ranks):
    for found in run_ranks(ranks, over_gloo, (2, 3, 5)):
        assert max(error for error, _ in found.values()) < EXACT
        assert len({sent for _, sent in found.values()}) == 1


def test_the_symmetric_engine_needs_a_process_group():
    with pytest.raises(Refused, match="engine symmetric runs over a process group, got a LocalFabric; use engine ring"):
        in_process(2, lambda fabric: SymmetricEngine(fabric))


def test_a_torch_without_the_operations_is_named(monkeypatch):
    monkeypatch.setattr(symmetric, "NAMES", ("no_such_operation",))
    with pytest.raises(CannotRun, match=r"needs torch\.ops\.symm_mem\.no_such_operation"):
        symmetric.fused_operations()


@pytest.mark.parametrize(
    ("ranks", "reach", "message"),
    [
        ([0, 8], True, r"GPUs of one node, got the ranks \[0, 8\] on 2 nodes of 8 GPUs; use engine ring"),
        ([0, 1], False, "over NVLink, got 0 and 1, which do not; use engine ring"),
        ([8, 9], True, ""),
    ],
)
def test_ranks_that_cannot_reach_each_others_memory_are_named(monkeypatch, ranks, reach, message):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(symmetric, "get_process_group_ranks", lambda group: ranks)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reach)
    if not message:
        symmetric.refuse_far_ranks(None)
        return
    with pytest.raises(Refused, match=message):
        symmetric.refuse_far_ranks(None)
