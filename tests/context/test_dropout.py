"""Dropped weights are the same ones under every algorithm, and what cannot drop them is refused by name."""

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.context import ALGORITHMS, AUTO, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.documents import documents
from megatron_cp.context.dropout import DropoutSeed, labelled
from megatron_cp.kernels import KERNELS, choose
from megatron_cp.kernels.dropout import as_digits, from_digits, kept
from megatron_cp.kernels.protocol import DropsWeights
from tests.cases import slow_unless
from tests.context.dense import hidden, problem, relative_error
from tests.context.test_backends import sharded, whole
from tests.context.test_sinks import grid_for
from tests.tolerances import EXACT

DROPPING = [name for name in ALGORITHMS if BACKENDS.get(name).capabilities.softcap]
RATE, SEED = 0.3, 12345


def factors(task, seed=SEED, first_head=0):
    """The factor of each weight of a whole sequence, b h s t, 0 or 1 / (1 - RATE)."""
    q, k = task.q, task.k
    _, _, factor = kept(*labelled(q, k, (range(len(q)),), DropoutSeed(seed, first_head)), RATE)
    return factor.flatten(1, 2)


def dense_dropped(task, factor):
    q, k, v = (x.detach().requires_grad_() for x in task[:3])
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, keys) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden(task), -torch.inf).softmax(-1) * factor
    out = torch.einsum("bhst,tbhd->sbhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), task.dout)


@pytest.mark.parametrize(
    ("ranks", "causal", "window"),
    slow_unless([(3, True, None)], [(3, True, None), (8, True, None), (5, False, None), (4, True, (9, 0))]),
)
@pytest.mark.parametrize("backend", slow_unless(["zigzag", "ulysses", "fpdt"], DROPPING))
def test_dropped_weights_are_those_of_one_rank(backend, ranks, causal, window):
    task = problem(12 * ranks, 8, 2, causal=causal)._replace(window=window)
    grid = grid_for(backend, ranks)
    parts = in_process(
        ranks, lambda fabric: sharded(fabric, task, backend, grid, dropout=RATE, call={"dropout_seed": SEED})
    )
    for found, expected in zip(whole(parts), dense_dropped(task, factors(task)), strict=True):
        assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize(
    "choices", [{"softmax_scale": -0.2}, {"softmax_scale": 0.0}, {"softmax_scale": 1e-40}, {"kernel": "reference"}]
)
def test_one_rank_drops_the_same_weights(choices):
    task = problem(24, 4, 2, causal=True)
    scale = choices.get("softmax_scale", 8**-0.5)
    how = plan("zigzag", causal=True, layout="contiguous", dropout=RATE, **choices)
    out = attend(*task[:3], how, dropout_seed=torch.tensor(SEED))
    scaled = task._replace(q=task.q * (scale * 8**0.5))
    assert relative_error(out, dense_dropped(scaled, factors(task))[0]) <= EXACT
    assert relative_error(attend(*task[:3], how), dense_dropped(scaled, 1.0)[0]) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_survive_every_dtype(dtype):
    numbers = torch.tensor([0, 1, 255, 256, 2**31, 2**62 + 17, -1, -(2**63), 2**63 - 1])
    assert torch.equal(from_digits(as_digits(numbers, dtype)), numbers)


def test_rate_and_independence():
    task = problem(256, 4, 2, causal=False)
    factor = factors(task)
    dropped = (factor == 0).double()
    # of 2 * 4 * 256 * 256 weights
    assert abs(dropped.mean() - RATE) < 0.003
    rows = dropped.flatten(0, 2) - dropped.mean()
    along = (rows[:, 1:] * rows[:, :-1]).mean() / rows.square().mean()
    across = (rows[1:] * rows[:-1]).mean() / rows.square().mean()
    assert max(abs(along), abs(across)) < 0.01
    assert factor.unique().tolist() == pytest.approx([0.0, 1 / (1 - RATE)])
    assert not torch.equal(factor, factors(task, seed=SEED + 1))
    # heads of the second of two tensor-parallel ranks
    second = task._replace(q=task.q[:, :, 2:], k=task.k[:, :, 1:])
    assert torch.equal(factor[:, 2:], factors(second, first_head=2))


def test_documents_drop_weights_by_their_places_in_the_stream():
    ends = [0, 7, 24, 48]
    task = problem(48, 4, 2, causal=True)
    document = torch.bucketize(torch.arange(48), torch.tensor(ends[1:]), right=True)
    packed = ~hidden(task) & (document[:, None] == document)
    parts = in_process(
        2,
        lambda fabric: sharded(
            fabric,
            task,
            "all-gather",
            None,
            dropout=RATE,
            document_layout="blocks",
            call={"dropout_seed": SEED, "documents": documents(ends)},
        ),
    )
    expected = dense_dropped(task._replace(packed=packed), factors(task))
    for found, other in zip(whole(parts), expected, strict=True):
        assert relative_error(found, other) <= EXACT


def test_ranks_with_different_seeds_agree_on_each_query():
    task = problem(24, 4, 2, causal=True)
    parts = in_process(
        2, lambda fabric: sharded(fabric, task, "distflash", None, dropout=RATE, call={"dropout_seed": fabric.rank})
    )
    mine = torch.cat([torch.arange(6), torch.arange(18, 24)])
    factor = factors(task, seed=1)
    factor[:, :, mine] = factors(task, seed=0)[:, :, mine]
    for found, expected in zip(whole(parts), dense_dropped(task, factor), strict=True):
        assert relative_error(found, expected) <= EXACT


def test_the_registry_says_which_kernels_drop():
    assert [entry.name for entry in KERNELS if entry.drops] == ["triton", "reference"]
    assert isinstance(choose("reference", device="cpu", dtype="float32", head_dim=8)[0], DropsWeights)
    kernel, reason = plan(AUTO, dropout=RATE).kernel_of("cpu", "float32", 8)
    assert kernel.name == "reference"
    assert "'torch' does not drop weights" in reason


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"kernel": "torch"},
            "kernel 'torch' does not drop weights; use 'auto' or one of: triton, reference, or leave dropout",
        ),
        ({"backend": "rsa"}, "backend 'rsa' does not drop weights; use backend 'zigzag' or "),
        ({"dropout": 1.0}, "0 to below 1, got 1.0"),
        ({"dropout": True}, "0 to below 1, got True"),
    ],
)
def test_what_cannot_drop_is_refused_by_name(choices, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"backend": "zigzag", "dropout": RATE, **choices})


@pytest.mark.parametrize(
    ("rate", "seed", "message"),
    [
        (0.0, 1, "dropout_seed is for a plan that drops weights, got one without"),
        (RATE, torch.tensor(1.5), "dropout_seed must be a whole number or an int64 tensor with one, got tensor"),
        (RATE, 2**63, "dropout_seed must fit 64 bits"),
        (RATE, DropoutSeed(1, 1 << 16), "tells 65536 sequences and query heads apart, got 1 and 65538"),
    ],
)
def test_seeds_that_mean_nothing_are_refused(rate, seed, message):
    x = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, plan("zigzag", cp=SingleFabric(), dropout=rate), dropout_seed=seed)


def test_a_rank_without_a_seed_is_found_by_all():
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8)
        with pytest.raises(ValueError, match="all ranks must attend by one plan"):
            attend(x, x, x, plan("zigzag", cp=fabric, dropout=RATE), dropout_seed=7 if fabric.rank else None)
        return fabric.sent

    assert in_process(2, body) == [0, 0]
