"""Attention of any shape, mask, layout and grid equals dense attention, or is refused in one line on every rank."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cp.comm import in_process
from megatron_cp.context import BACKENDS, PLACEMENTS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import LAYOUTS, indices
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid, divisors
from tests.context.dense import Problem, dense, relative_error
from tests.context.test_modes import MODES
from tests.fuzz.conftest import Cases
from tests.fuzz.strategies import mostly
from tests.tolerances import EXACT

pytestmark = pytest.mark.slow

SIDES = st.none() | st.just(-1) | st.integers(0, 12)
STRIDES = ["plain", "batch first", "heads first", "every second token", "last dim strided"]
PLAIN = "plain"
# zero makes attention a mean; one of float32's smallest numbers is next to it; below zero the softmax is turned over
SCALES = st.none() | st.floats(0.01, 2) | st.sampled_from([0.0, -0.3, -1.0, 1e-39])


class Case(NamedTuple):
    """One attention; sizes are those of the whole sequence."""

    backend: str
    inner: int
    outer: int
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    window: Any
    layout: str
    placement: str
    chunks: int | None
    stripe: int
    strides: str
    scale: Any
    kernel: str
    on_grid: bool
    mode: str
    seed: int


CASES = st.builds(
    Case,
    backend=st.sampled_from([entry.name for entry in BACKENDS]),
    inner=st.integers(1, 3),
    outer=st.integers(1, 3),
    tokens=mostly(72, st.integers(1, 6).map(lambda n: 4 * n) | st.integers(0, 30)),
    batch=mostly(1, st.sampled_from([2, 0])),
    heads=mostly(12, st.sampled_from([4, 6, 8, 2, 1])),
    kv_heads=st.sampled_from([1, 2, 4, 6, 3]),
    dim=st.sampled_from([4, 8, 1]),
    causal=st.booleans(),
    window=mostly(None, st.tuples(SIDES, SIDES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    placement=mostly("head-first", st.sampled_from(sorted(PLACEMENTS))),
    chunks=mostly(None, st.integers(1, 3)),
    stripe=mostly(1, st.sampled_from([2, 4])),
    strides=st.sampled_from(STRIDES),
    scale=SCALES,
    kernel=st.sampled_from(["reference", "reference", "torch", "auto"]),
    on_grid=mostly(False, st.just(True)),
    mode=mostly(PLAIN, st.sampled_from(sorted(MODES))),
    seed=st.integers(0, 2**31),
)


def strided(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values at other places in memory."""
    if kind == "batch first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "heads first":
        return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if kind == "every second token":
        return torch.stack((tensor, tensor), dim=1).flatten(0, 1)[::2]
    if kind == "last dim strided":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor


def attended(case: Case, task: Problem) -> list[Any]:
    """out, dq, dk, dv of each rank with its positions, or the refusal that each rank saw."""
    ranks = case.inner * case.outer
    grid = Grid(case.inner, case.outer) if case.on_grid or BACKENDS.get(case.backend).needs_grid else None

    def body(fabric: Any) -> Any:
        try:
            axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
            made = plan(
                case.backend,
                cp=fabric,
                causal=case.causal,
                window=case.window,
                softmax_scale=case.scale,
                kernel=case.kernel,
                placement=case.placement,
                layout=case.layout,
                chunks=case.chunks,
                stripe=case.stripe,
                **axes,
            )
            if task.q.shape[0] % ranks or not len(task.q):
                mine = torch.arange(task.q.shape[0] // ranks)
            else:
                mine = torch.tensor(indices(case.layout, task.q.shape[0], ranks, fabric.rank, case.stripe))
            leaves = [strided(x[mine], case.strides).detach().requires_grad_() for x in task[:3]]
            out = MODES.get(case.mode, attend)(*leaves, made)
            out.backward(strided(task.dout[mine], case.strides))
            return mine, (out.detach(), *(leaf.grad for leaf in leaves))
        except Refused as refusal:
            return refusal

    return in_process(ranks, body)


def problem_of(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    shapes = [(case.tokens, case.batch, n, case.dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    window = None if case.window is None else tuple(None if side == -1 else side for side in case.window)
    return Problem(*tensors, case.causal, window)


def whole(parts: list[Any], case: Case) -> list[torch.Tensor]:
    results = []
    for index in range(4):
        shape = (case.tokens, *parts[0][1][index].shape[1:])
        result = torch.full(shape, torch.nan, dtype=torch.float64)
        for mine, tensors in parts:
            result[mine] = tensors[index]
        results.append(result)
    return results


def cancelled(task: Problem, scale: float) -> dict[str, torch.Tensor]:
    """Terms whose difference is zero in the gradients of queries that see one key: dP and its mean over the keys."""
    group = task.q.shape[2] // task.k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (task.k, task.v))
    terms = scale * (task.dout * v).abs().sum(-1, keepdim=True)
    return {"dq": terms * k, "dk": (terms * task.q.abs()).unflatten(2, (-1, group)).sum(3)}


SEEN = Case(
    "zigzag", 1, 2, 8, 1, 4, 4, 8, True, None, "zigzag", "head-first", None, 1, "plain", None, "torch", False, PLAIN, 0
)


@given(CASES)
@example(SEEN._replace(strides="last dim strided"))
@example(SEEN._replace(batch=0))
@example(SEEN._replace(backend="bidirectional", outer=3, tokens=3, layout="contiguous", causal=False))
@example(SEEN._replace(tokens=0))
@example(SEEN._replace(backend="auto", heads=6, kv_heads=3))
@example(SEEN._replace(backend="ulysses", heads=2, kv_heads=1, kernel="auto"))
@example(SEEN._replace(backend="striped", window=(3, 0), tokens=24))
@example(SEEN._replace(window=(0, 0), layout="contiguous"))
@example(SEEN._replace(backend="ulysses", outer=3, tokens=3, heads=6, kv_heads=6, layout="striped"))
@example(SEEN._replace(backend="all-gather", outer=3, tokens=3, layout="contiguous"))
@example(SEEN._replace(backend="auto", mode="non-reentrant checkpoint"))
@example(SEEN._replace(backend="auto", mode="reentrant checkpoint"))
@example(SEEN._replace(mode="autocast", kernel="reference"))
@example(SEEN._replace(backend="rsa", mode="autocast", kernel="reference"))
@example(SEEN._replace(scale=0.0))
@example(SEEN._replace(scale=-1.0))
def test_attention_is_right_or_refused(counted: Cases, case: Case) -> None:
    # ranks hold equally many tokens, so that no other length is ever seen
    case = case._replace(tokens=case.tokens // (case.inner * case.outer) * (case.inner * case.outer))
    with counted.one():
        task = problem_of(case)
        parts = attended(case, task)
        refusals = [part for part in parts if isinstance(part, Refused)]
        if refusals:
            counted.refused += 1
            assert len(refusals) == len(parts), "all ranks refuse, or none"
            assert len({str(refusal) for refusal in refusals}) == 1
            assert str(refusals[0])
            assert "\n" not in str(refusals[0])
            return
        # dense attention scales by 1 / sqrt(d): the rest of the scale is in its queries
        rest = 1 if case.scale is None else case.scale * case.dim**0.5
        scale = rest * case.dim**-0.5
        out, dq, dk, dv = dense(task._replace(q=task.q * rest))
        expected = (out, dq * rest, dk, dv)
        for name, found, right in zip(("out", "dq", "dk", "dv"), whole(parts, case), expected, strict=True):
            assert found.shape == right.shape, name
            if right.numel():
                assert torch.isfinite(found).all(), name
                if right.any():
                    assert relative_error(found, right) <= 10 * EXACT, name
                else:
                    assert found.abs().max() <= 10 * EXACT * cancelled(task, scale)[name].abs().max(), name


@given(
    st.sampled_from([entry.name for entry in BACKENDS]),
    st.lists(st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([2, 4]), st.booleans()), min_size=2, max_size=4),
)
def test_a_change_on_some_ranks_only_is_refused_by_all(
    counted: Cases, backend: str, calls: list[tuple[int, int, bool]]
) -> None:
    """Calls in a row whose length or heads change, on all ranks or on rank 1 only."""
    entry = BACKENDS.get(backend)
    ranks, grid = (4, Grid(2, 2)) if entry.needs_grid else (2, None)
    shapes = [calls[0]]
    for tokens, heads, everywhere in calls[1:]:
        shapes.append((tokens, heads, everywhere or (tokens, heads) == shapes[-1][:2]))

    def body(fabric: Any) -> Any:
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
        made = plan(backend, cp=fabric, **axes)
        for index, (tokens, heads, everywhere) in enumerate(shapes):
            last = shapes[index - 1] if index else shapes[0]
            own = (tokens, heads) if everywhere or fabric.rank == 1 else last[:2]
            q = torch.randn(own[0], 1, own[1], 4, dtype=torch.float64)
            try:
                attend(q, q, q, made)
            except Refused as refusal:
                return index, str(refusal)
            assert everywhere or own == last[:2] == (tokens, heads), "a change on rank 1 only went through"
        return None

    with counted.one():
        found = in_process(ranks, body)
        assert len(set(found)) == 1, found
        counted.refused += found[0] is not None
        odd = [index for index, (_, _, everywhere) in enumerate(shapes) if index and not everywhere]
        if odd:
            assert found[0] is not None
            assert found[0][0] <= odd[0]


@given(st.lists(st.sampled_from(sorted({n for p in range(1, 13) for n in divisors(p)})), min_size=2, max_size=3))
def test_every_position_is_on_one_rank(counted: Cases, sizes: list[int]) -> None:
    ranks, blocks, *stripe = sizes
    with counted.one():
        for layout in LAYOUTS:
            tokens = 2 * ranks * blocks * (stripe[0] if stripe else 1)
            held = [indices(layout, tokens, ranks, rank, *stripe[: layout == "striped"]) for rank in range(ranks)]
            assert sorted(position for part in held for position in part) == list(range(tokens))
            assert all(before < after for part in held for before, after in pairwise(part))
