"""ALiBi: every algorithm equals dense attention with the bias of distances, and what it cannot go with is refused."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, AUTO
from megatron_cp.context.alibi import alibi_slopes
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.bias import attend_with_bias
from megatron_cp.context.documents import documents
from megatron_cp.context.layouts import indices
from megatron_cp.context.slices import KeptKeys, attend_slice
from tests.cases import slow_unless
from tests.context.dense import hidden, problem, relative_error
from tests.context.test_backends import sharded, whole
from tests.context.test_sinks import grid_for
from tests.ranks import run_ranks
from tests.tolerances import EXACT

SLOPES = alibi_slopes(8)


def dense_alibi(task, slopes=SLOPES, sink=None):
    q, k, v = (x.detach().double().requires_grad_() for x in task[:3])
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    places = torch.arange(len(q), dtype=torch.float64)
    bias = torch.tensor(slopes, dtype=torch.float64)[:, None, None] * (places - places[:, None])
    scores = torch.einsum("sbhd,tbhd->bhst", q, keys) * q.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(hidden(task), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, torch.full((*scores.shape[:3], 1), sink, dtype=scores.dtype)], -1)
    out = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1)[..., : len(q)], values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), task.dout.double())


@pytest.mark.parametrize(("ranks", "window"), slow_unless([(3, None)], [(3, None), (8, None), (4, (9, 0))]))
@pytest.mark.parametrize("backend", slow_unless(["zigzag", "ulysses", "fpdt", "rsa"], ALGORITHMS))
def test_alibi_equals_dense(backend, ranks, window):
    task = problem(12 * ranks, 8, 2, causal=True)._replace(window=window)
    grid = grid_for(backend, ranks)
    parts = in_process(ranks, lambda fabric: sharded(fabric, task, backend, grid, alibi=SLOPES))
    for found, expected in zip(whole(parts), dense_alibi(task), strict=True):
        assert relative_error(found, expected) <= EXACT


def test_alibi_of_packed_documents_beside_a_sink():
    ends, task = [0, 7, 24, 48], problem(48, 8, 2, causal=True)
    document = torch.bucketize(torch.arange(48), torch.tensor(ends[1:]), right=True)
    packed = ~hidden(task) & (document[:, None] == document)
    call = {"documents": documents(ends), "sink": 0.5}
    parts = in_process(
        2, lambda fabric: sharded(fabric, task, "all-gather", None, alibi=SLOPES, document_layout="blocks", call=call)
    )
    for found, expected in zip(whole(parts), dense_alibi(task._replace(packed=packed), sink=0.5), strict=True):
        assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_alibi_is_added_to_scores_of_any_scale(scale):
    task = problem(24, 8, 2, causal=True)
    how = plan("zigzag", layout="contiguous", alibi=SLOPES, softmax_scale=scale)
    scaled = task._replace(q=task.q * scale * 8**0.5)
    assert relative_error(attend(*task[:3], how), dense_alibi(scaled)[0]) <= EXACT


# slopes of eight heads are powers of two, which every dtype holds
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_alibi_far_from_the_first_token(dtype, error):
    task = problem(1024, 8, 1, causal=True, batch=1)
    task = task._replace(**{name: getattr(task, name).to(dtype) for name in ("q", "k", "v", "dout")})
    how = plan("zigzag", layout="contiguous", alibi=SLOPES, kernel="reference")
    assert relative_error(attend(*task[:3], how, sink=0.5), dense_alibi(task, sink=0.5)[0]) <= error


def compiled():
    """The gradients of a compiled attention with ALiBi on two ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    how = plan("zigzag", cp=dist.group.WORLD, alibi=SLOPES, kernel="reference")
    attention = torch.compile(lambda q, k, v: attend(q, k, v, how), backend="aot_eager", fullgraph=True)
    task = problem(24, 8, 2, causal=True)
    mine = torch.tensor(indices("zigzag", 24, 2, dist.get_rank()))
    leaves = [x[mine].requires_grad_() for x in task[:3]]
    out = attention(*leaves)
    result = mine, (out.detach(), *torch.autograd.grad(out, leaves, task.dout[mine]))
    dist.barrier()
    return result


@pytest.mark.slow
def test_compiled_alibi_equals_dense():
    task = problem(24, 8, 2, causal=True)
    for found, expected in zip(whole(run_ranks(2, compiled)), dense_alibi(task), strict=True):
        assert relative_error(found, expected) <= EXACT


def test_slopes_of_the_paper():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(16)[:2] == [2**-0.5, 0.5]
    assert alibi_slopes(12) == [*alibi_slopes(8), *alibi_slopes(16)[:8:2]]
    assert alibi_slopes(1) == [2.0**-8]
    with pytest.raises(ValueError, match="each of 1 or more query heads, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"causal": False}, "alibi needs causal attention"),
        ({"softcap": 3.0}, "leave one of the two out"),
        ({"alibi": [1.0, -0.5]}, "a finite slope of 0 or more for each query head"),
        ({"alibi": []}, "a finite slope of 0 or more for each query head"),
    ],
)
def test_plans_that_cannot_have_alibi_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"backend": AUTO, "alibi": SLOPES, **choices})


def test_calls_that_cannot_have_alibi_are_refused():
    x = torch.zeros(4, 1, 2, 8)
    how = plan("rsa", layout="contiguous", alibi=SLOPES)
    with pytest.raises(ValueError, match="alibi has slopes of 8 query heads, got q of 2"):
        attend(x, x, x, how)
    with pytest.raises(ValueError, match="leave alibi out and add it to the bias"):
        attend_with_bias(x, x, x, torch.zeros(1, 2, 4, 4), how)
    with pytest.raises(ValueError, match="slices take no alibi"):
        attend_slice(x, x, x, plan("zigzag", alibi=SLOPES), KeptKeys((range(4),)), 0)


def test_ranks_with_other_slopes_are_found():
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8)
        with pytest.raises(ValueError, match="all ranks must attend by one plan"):
            attend(x, x, x, plan("zigzag", cp=fabric, alibi=[0.5, 0.1 * fabric.rank]))
        return fabric.sent

    assert in_process(2, body) == [0, 0]
