"""Attention in slices of a sequence equals dense attention, on every algorithm, forward and backward."""

from contextlib import nullcontext

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.context import ALGORITHMS
from megatron_cp.context.attend import plan
from megatron_cp.context.documents import documents
from megatron_cp.context.layouts import indices
from megatron_cp.context.slices import KeptKeys, PackedSlices, attend_slice
from tests.cases import slow_unless
from tests.context.dense import dense, problem
from tests.context.test_sinks import grid_for
from tests.tolerances import EXACT

SLICED = [name for name in ALGORITHMS if name != "fpdt"]
HEADS, KV_HEADS = 8, 2


def stretches(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(range(start, start + length) for start, length in zip(starts, lengths, strict=True))


def in_slices(fabric, task, backend, lengths, again=False, **choices):
    """out, dq, dk, dv of this rank's tokens, and where they stand; `again`: each forward runs twice."""
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    layout = "zigzag" if fabric.size > 1 else "contiguous"
    choices |= {"causal": task.causal, "window": task.window, "layout": layout, "kernel": "reference"}
    how = plan(backend, cp=fabric, **axes, **choices)
    kept = KeptKeys(stretches(lengths))
    places, leaves, outs = [], [], []
    for number, tokens in enumerate(kept.tokens):
        mine = torch.tensor(indices(layout, len(tokens), fabric.size, fabric.rank)) + tokens.start
        places.append(mine)
        leaves.append([x[mine].requires_grad_() for x in task[:3]])
        if again:
            with torch.no_grad():
                attend_slice(*leaves[-1], how, kept, number)
        else:
            outs.append(attend_slice(*leaves[-1], how, kept, number))
    for number in reversed(range(len(lengths))):
        if again:
            outs.insert(0, attend_slice(*leaves[number], how, kept, number))
        outs[0 if again else number].backward(task.dout[places[number]])
    assert not kept.slices
    grads = [torch.cat([inputs[i].grad for inputs in leaves]) for i in range(3)]
    return torch.cat(places), (torch.cat(outs).detach(), *grads)


def assert_equals_dense(parts, task):
    expected = dense(task)
    assert sorted(torch.cat([mine for mine, _ in parts]).tolist()) == list(range(len(task.q)))
    for mine, found in parts:
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert (a - b[mine]).abs().max() <= EXACT * b.abs().max(), name


@pytest.mark.parametrize(
    ("ranks", "window"),
    slow_unless([(2, None)], [(2, None), (3, (9, 0)), (4, (40, 0))]),
)
@pytest.mark.parametrize("backend", SLICED)
def test_slices_equal_dense(backend, ranks, window):
    step = 12 * ranks
    task = problem(6 * step, HEADS, KV_HEADS, causal=True)._replace(window=window)
    lengths = [2 * step, step, step, 2 * step]
    assert_equals_dense(in_process(ranks, lambda fabric: in_slices(fabric, task, backend, lengths)), task)


def test_autocast_changes_no_bit_of_slices():
    made = problem(72, HEADS, KV_HEADS, causal=True)
    task = made._replace(**{name: getattr(made, name).float() for name in ("q", "k", "v", "dout")})

    def both(context):
        def run(fabric):
            with context():
                return in_slices(fabric, task, "zigzag", [24, 48])[1]

        return [tensor for found in in_process(2, run) for tensor in found]

    plain, cast = both(nullcontext), both(lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(map(torch.equal, plain, cast))


@pytest.mark.parametrize("window", [None, (9, 0)])
def test_slices_on_one_rank_equal_dense(window):
    task = problem(72, HEADS, KV_HEADS, causal=True)._replace(window=window)
    assert_equals_dense([in_slices(SingleFabric(), task, "zigzag", [24, 13, 12, 23])], task)


@pytest.mark.parametrize("backend", ["zigzag", "ulysses", "all-gather"])
def test_recomputed_slices_equal_dense(backend):
    task = problem(48, HEADS, KV_HEADS, causal=True)
    assert_equals_dense(in_process(2, lambda fabric: in_slices(fabric, task, backend, [24, 12, 12], again=True)), task)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (6, 1)])
def test_slices_of_heads_that_are_shared_unevenly_equal_dense(heads, kv_heads):
    task = problem(72, heads, kv_heads, causal=True)
    assert_equals_dense(in_process(3, lambda fabric: in_slices(fabric, task, "ulysses", [36, 12, 24])), task)


def packed_problem(tokens, ends, window):
    """One attention for each sample, with the pairs that its documents leave."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    near = (distance >= 0) & (distance <= (tokens if window is None else window[0]))
    tasks = []
    for seed, inner in enumerate(ends):
        document = torch.bucketize(torch.arange(tokens), torch.tensor(inner), right=True)
        seen = near & (document[:, None] == document)
        tasks.append(problem(tokens, HEADS, KV_HEADS, causal=True, batch=1, seed=seed)._replace(packed=seen))
    return tasks


def ends_inside(ends, tokens):
    """The ends of a slice's documents; an empty one comes first where the slice starts a document."""
    return [0, *(end - tokens.start for end in (0, *ends) if end in tokens), len(tokens)]


def packed_in_slices(fabric, tasks, ends, backend, lengths, window, **choices):
    """out, dq, dk, dv of this rank's tokens of each slice, whose samples lie one after the other, and their places."""
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    layout, count = "zigzag" if fabric.size > 1 else "contiguous", len(tasks)
    how = plan(backend, cp=fabric, **axes, causal=True, window=window, layout=layout, kernel="reference", **choices)
    parts = stretches(lengths)
    kept = KeptKeys(tuple(range(count * part.start, count * part.stop) for part in parts))
    packed, places, leaves, outs = PackedSlices(parts), [], [], []
    for number, tokens in enumerate(parts):
        inside = [[len(tokens) * i + end for end in ends_inside(each, tokens)] for i, each in enumerate(ends)]
        # as Megatron joins samples: each brings all but its first end
        own = documents(inside[0] + [end for each in inside[1:] for end in each[1:]])
        mine = torch.tensor(indices(layout, count * len(tokens), fabric.size, fabric.rank))
        # of all samples, one after the other
        places.append(mine // len(tokens) * len(tasks[0].q) + tokens.start + mine % len(tokens))
        leaves.append([torch.cat(xs)[places[-1]].requires_grad_() for xs in zip(*(t[:3] for t in tasks), strict=True)])
        outs.append(attend_slice(*leaves[-1], how, kept, number, documents=packed.add(number, own)))
    douts = torch.cat([task.dout for task in tasks])
    for number in reversed(range(len(lengths))):
        outs[number].backward(douts[places[number]])
    assert not kept.slices
    grads = [torch.cat([inputs[i].grad for inputs in leaves]) for i in range(3)]
    return torch.cat(places), (torch.cat(outs).detach(), *grads)


# documents that end in a slice, at its border, and that go on over two borders; ends of each sample
ENDS = {"one sample": [[5, 30, 31, 48, 70]], "two samples": [[5, 30, 31, 48, 70], [24, 61]], "whole": [[]]}
PACKED = [
    (name, case, window, ranks) for name in SLICED for case in ENDS for window in (None, (9, 0)) for ranks in (2, 4)
]
PACKED_BY_DEFAULT = [
    ("zigzag", "two samples", (9, 0), 2),
    ("ulysses", "two samples", None, 2),
    ("all-gather", "one sample", None, 2),
]


@pytest.mark.parametrize(("backend", "case", "window", "ranks"), slow_unless(PACKED_BY_DEFAULT, PACKED))
def test_slices_of_packed_documents_equal_dense(backend, case, window, ranks):
    ends, lengths = ENDS[case], [40, 8, 24, 8]
    tasks = packed_problem(80, ends, window)
    parts = in_process(ranks, lambda fabric: packed_in_slices(fabric, tasks, ends, backend, lengths, window))
    assert sorted(torch.cat([mine for mine, _ in parts]).tolist()) == list(range(80 * len(tasks)))
    expected = [torch.cat(each) for each in zip(*map(dense, tasks), strict=True)]
    for mine, found in parts:
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert (a - b[mine]).abs().max() <= EXACT * b.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["blocks", "document"])
def test_slices_laid_out_by_their_documents_equal_dense(layout):
    ends, lengths = ENDS["two samples"], [40, 16, 24]
    tasks = packed_problem(80, ends, None)
    parts = in_process(
        2, lambda fabric: packed_in_slices(fabric, tasks, ends, "all-gather", lengths, None, document_layout=layout)
    )
    expected = [torch.cat(each) for each in zip(*map(dense, tasks), strict=True)]
    for mine, found in parts:
        for a, b in zip(found, expected, strict=True):
            assert (a - b[mine]).abs().max() <= EXACT * b.abs().max()


@pytest.mark.parametrize("scale", [-0.5, 0.25])
def test_slices_take_any_scale(scale):
    task = problem(24, 2, 2, causal=True)
    whole = in_slices(SingleFabric(), task, "zigzag", [24], softmax_scale=scale)
    cut = in_slices(SingleFabric(), task, "zigzag", [12, 6, 6], softmax_scale=scale)
    for a, b in zip(cut[1], whole[1], strict=True):
        assert (a - b).abs().max() <= EXACT * b.abs().max()


@pytest.mark.parametrize(
    ("backend", "choices", "reason"),
    [
        ("fpdt", {}, "takes no slices; take one without chunks"),
        ("ring", {"chunks": 2}, "takes no slices; take one without chunks"),
        ("ring", {"causal": False}, "slices need a causal mask"),
    ],
)
def test_plans_that_take_no_slices_are_refused(backend, choices, reason):
    x = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match=reason):
        attend_slice(x, x, x, plan(backend, **choices), KeptKeys((range(4), range(4, 8))), 0)


def zeros(heads=2, batch=1, dtype=torch.float32):
    return torch.zeros(4, batch, heads, 8, dtype=dtype, requires_grad=True)


# of slice 1, whose slice 0 is zeros()
UNLIKE_SLICES = {
    "heads": (lambda how: (zeros(heads=4), how), "q s b h d = s (1, 2, 8) in slice 0, q s b h d = s (1, 4, 8) in 1"),
    "batch": (lambda how: (zeros(batch=2), how), "q s b h d = s (1, 2, 8) in slice 0, q s b h d = s (2, 2, 8) in 1"),
    "dtype": (lambda how: (zeros(dtype=torch.float64), how), "torch.float32 in slice 0, torch.float64 in 1"),
    "backend": (lambda how: (zeros(), plan("ulysses", cp=how.cp)), "ring in slice 0, ulysses in 1"),
}


def test_slices_that_are_attended_otherwise_are_refused_by_all():
    def body(fabric):
        how, found = plan("ring", cp=fabric), {}
        for name, (made, _) in UNLIKE_SLICES.items():
            for everywhere in (True, False):
                kept, first = KeptKeys((range(8), range(8, 16))), zeros()
                attend_slice(first, first, first, how, kept, 0)
                y, another = made(how) if everywhere or fabric.rank else (zeros(), how)
                with pytest.raises(ValueError, match=r"slice|all ranks must") as refused:
                    attend_slice(y, y, y, another, kept, 1)
                found[name, everywhere] = str(refused.value)
        kept = KeptKeys((range(8), range(8, 16)))
        for number, text in ((1, "needs the keys of slice 0"), (2, "numbered from 0 to 1, got 2"), (-1, "got -1")):
            with pytest.raises(ValueError, match=text):
                attend_slice(first, first, first, how, kept, number)
        attend_slice(first, first, first, how, kept, 0)
        with pytest.raises(ValueError, match=r"slice=0 of 2.*slice=1 of 2"):
            attend_slice(first, first, first, how, kept, fabric.rank)
        return found

    first, second = in_process(2, body)
    assert first == second
    for name, (_, text) in UNLIKE_SLICES.items():
        assert first[name, True].startswith(f"all slices of a sequence must be attended alike, got {text}; give all")
        assert "slices of a sequence must" in first[name, False] or "all ranks must hold tensors" in first[name, False]


def test_backward_passes_of_slices_in_another_order_are_refused():
    kept, first = KeptKeys((range(4), range(4, 8))), zeros()
    outs = [attend_slice(first, first, first, plan("ring"), kept, number) for number in (0, 1)]
    outs[0].sum().backward(retain_graph=True)
    for number, after in ((1, 0), (0, 0)):
        with pytest.raises(ValueError, match=f"got that of slice {number} after that of slice {after}; keep the order"):
            outs[number].sum().backward()


def test_a_slice_of_another_length_is_refused():
    x = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match="slice 1 has 6 tokens over all ranks, got 4 on 1"):
        attend_slice(x, x, x, plan("ring"), KeptKeys((range(4), range(4, 10))), 1)
