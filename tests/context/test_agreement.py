"""All ranks find a difference of shapes, in any call, before a message whose length depends on them."""

from statistics import median
from time import perf_counter

import pytest
import torch

from megatron_cp.comm import GroupFabric, in_process
from megatron_cp.context import BACKENDS, agreement
from megatron_cp.context import prepare as preparing
from megatron_cp.context.agreement import agree
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.bias import attend_with_bias, attention_probabilities
from megatron_cp.context.layouts import indices
from megatron_cp.grid import Grid
from tests.context.dense import dense, problem, relative_error
from tests.ranks import run_ranks
from tests.tolerances import EXACT

TOKENS, LONGER = 12, 24


def zeros(tokens=TOKENS, batch=1, heads=4):
    return torch.zeros(tokens, batch, heads, 8, dtype=torch.float64)


def refusal(call, *args, **choices):
    """The text of the error, empty without one."""
    try:
        call(*args, **choices)
    except ValueError as error:
        return str(error)
    return ""


def three_calls(fabric, backend, longer):
    """Errors of out in calls before and after one in which rank `longer` holds more tokens, and that one's text."""
    grid = Grid(fabric.size, 1) if BACKENDS.get(backend).needs_grid else None
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    made = plan(backend, cp=fabric, causal=False, kernel="reference", **axes)
    task = problem(TOKENS * fabric.size, 4, 2, causal=False)
    mine = torch.tensor(indices("zigzag", len(task.q), fabric.size, fabric.rank))

    def error():
        out = attend(*(x[mine] for x in task[:3]), made)
        return relative_error(out, dense(task)[0][mine])

    before, x = error(), zeros(LONGER if fabric.rank == longer else TOKENS)
    return before, refusal(attend, x, x, x, made), error()


def over_gloo(backend, longer):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = three_calls(GroupFabric(dist.group.WORLD), backend, longer)
    dist.barrier()
    return found


def assert_found_by_all(results, longer):
    held = ", ".join(f"rank {rank}: {LONGER if rank == longer else TOKENS}" for rank in range(len(results)))
    for before, text, after in results:
        assert text == f"all ranks must hold equally many tokens, got {held}; pad the sequence to a common length"
        assert max(before, after) <= EXACT


def test_gpus_of_several_models_are_refused_on_all_ranks(monkeypatch):
    models = iter(["NVIDIA H100 PCIe", "NVIDIA H200"])
    monkeypatch.setattr(agreement, "gpu_model", lambda device: next(models))
    x = zeros()
    texts = in_process(2, lambda fabric: refusal(attend, x, x, x, plan("ring", cp=fabric, kernel="reference")))
    held = {"rank 0: NVIDIA H100 PCIe, rank 1: NVIDIA H200", "rank 0: NVIDIA H200, rank 1: NVIDIA H100 PCIe"}
    assert texts[0] == texts[1]
    assert texts[0] in {f"all ranks must run on GPUs of one model, got {one}; use equal GPUs" for one in held}


@pytest.mark.parametrize(("ranks", "longer"), [(2, 1), (3, 0)])
@pytest.mark.parametrize("backend", BACKENDS.names)
def test_a_rank_that_is_longer_in_a_later_call_is_found_by_all(backend, ranks, longer):
    assert_found_by_all(in_process(ranks, lambda fabric: three_calls(fabric, backend, longer)), longer)


@pytest.mark.parametrize(("ranks", "longer"), [(2, 1), (3, 0)])
@pytest.mark.parametrize("backend", ["ring", "ulysses"])
def test_a_rank_that_is_longer_in_a_later_call_is_found_by_all_over_gloo(backend, ranks, longer):
    assert_found_by_all(run_ranks(ranks, over_gloo, backend, longer), longer)


@pytest.mark.parametrize("other", [{"batch": 2}, {"heads": 8}], ids=str)
def test_other_shapes_of_one_rank_are_found_by_all(other):
    def body(fabric):
        made = plan("zigzag", cp=fabric)
        x, y = zeros(), zeros(**(other if fabric.rank == 1 else {}))
        attend(x, x, x, made)
        return refusal(attend, y, y, y, made)

    first, second = in_process(2, body)
    assert first == second
    assert first.startswith("all ranks must hold tensors of one shape (s, b, h, d), got rank 0: (12, 1, 4, 8)")
    assert "\n" not in first


def test_longer_keys_of_one_rank_are_found_by_all():
    def body(fabric):
        keys = zeros(LONGER if fabric.rank == 0 else TOKENS)
        return refusal(agree, plan("zigzag", cp=fabric), zeros(), keys, keys, gradients=False)

    assert {text.split(";")[0] for text in in_process(2, body)} == {
        "all ranks must hold equally many tokens, got rank 0: 12 / 24, rank 1: 12"
    }


def test_probabilities_and_bias_compare_shapes_too():
    def body(fabric):
        made, x = plan("rsa", cp=fabric), zeros(LONGER if fabric.rank == 1 else TOKENS)
        bias = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        return refusal(attention_probabilities, x, x, made), refusal(attend_with_bias, x, x, x, bias, made)

    for texts in in_process(2, body):
        assert all("rank 0: 12, rank 1: 24" in text for text in texts)


@pytest.mark.parametrize(("agreed", "device"), [(False, "cpu"), (True, "cpu"), (False, "meta"), (True, "meta")])
def test_a_guarantee_spares_the_comparison_where_the_host_would_wait_for_a_device(monkeypatch, agreed, device):
    compared = []
    monkeypatch.setattr(preparing, "agree", lambda plan, *tensors, **_: compared.append(len(tensors)))
    x = zeros().to(device)
    preparing.prepare(x, x, x, plan("zigzag"), agreed=agreed, gradients=False)
    assert compared == ([] if agreed and device != "cpu" else [3])


def test_a_plan_holds_nothing_that_changes():
    made = plan("zigzag")
    before = vars(made).copy()
    attend(zeros(), zeros(), zeros(), made)
    assert vars(made) == before
    assert hash(made) == hash(plan("zigzag", cp=made.cp))


def timed(backend):
    """Bytes that a rank adds to an unchanged call, microseconds of the comparison, and those of the whole call."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fabric, added = GroupFabric(dist.group.WORLD), []
    gather, made, x = fabric.all_gather, plan(backend, cp=fabric), torch.randn(512, 1, 8, 64)

    def counted(local):
        added.append(local.numel() * local.element_size())
        return gather(local)

    def times(call, repeats):
        call()
        dist.barrier()
        taken = []
        for _ in range(repeats):
            began = perf_counter()
            call()
            taken.append(1e6 * (perf_counter() - began))
        return median(taken)

    fabric.all_gather = counted
    compared = times(lambda: agree(made, x, x, x, gradients=False), 200)
    whole = times(lambda: attend(x, x, x, made), 30)
    dist.barrier()
    return set(added), len(added), compared, whole


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_unchanged_call_costs_one_gather_of_8_bytes(ranks, capsys):
    found = run_ranks(ranks, timed, "zigzag")
    for sizes, gathers, _, _ in found:
        assert (sizes, gathers) == ({8}, 201 + 31)
    _, _, compared, whole = found[0]
    with capsys.disabled():
        print(f"\n{ranks} ranks: {compared:.0f} us to compare, of {whole:.0f} us in attention of 512 tokens per rank")
