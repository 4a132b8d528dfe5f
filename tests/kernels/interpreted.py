"""What the Triton kernels compute under Triton's interpreter, against torch: run in a process with TRITON_INTERPRET=1.

Prints one JSON object: the largest errors by case.
"""

import json
import sys

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from megatron_cp.comm import LocalFabric, in_process
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import indices
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.merging import ASSUMED, BY_TORCH, ONE_BY_ONE, SEVERAL, Merging
from megatron_cp.grid import most_square
from megatron_cp.kernels.fused_merge import Part, add, merge
from tests.context.dense import dense, problem, relative_error

_convert = interpreter._convert_float


def _to_nearest(values: np.ndarray, before: tl.dtype, after: tl.dtype, rounding: object) -> np.ndarray:
    """Round float32 to bfloat16 as a GPU does, to the nearest; the interpreter cuts off."""
    if (before, after) != (tl.float32, tl.bfloat16):
        return _convert(values, before, after, rounding)
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = _to_nearest

TOKENS, BATCH, HEADS, DIM = 40, 2, 3, 24
POLICIES = {"torch": BY_TORCH, "one": ONE_BY_ONE, "several": SEVERAL}


def parts(count: int, dtype: torch.dtype) -> list[Part]:
    """Attention of so many parts; the first covers all rows, others the last ones, a stretch, or all.

    Row 3 is without keys in all parts, row 5 in the first and row 25 in the others; what lies there is not a number.
    """
    generator = torch.Generator().manual_seed(count)
    found = []
    for index in range(count):
        first, last = [(0, TOKENS), (TOKENS // 2, TOKENS), (7, 30), (0, TOKENS)][index % 4]
        # the layout of a kernel's results: b h s d
        x = torch.randn(BATCH, HEADS, last - first, DIM, generator=generator).to(dtype).permute(2, 0, 1, 3)
        lse = 4 * torch.randn(BATCH, HEADS, last - first, generator=generator).permute(2, 0, 1)
        for row in (3, 5 if index == 0 else 25):
            if first <= row < last:
                x[row - first], lse[row - first] = torch.nan, -torch.inf
        found.append(Part(first, x, lse))
    return found


def whole(part: Part) -> tuple[Tensor, Tensor]:
    """A part in float64 with zeros and -inf in the rows that it does not cover or that have no key."""
    assert part.lse is not None
    out = torch.zeros(TOKENS, BATCH, HEADS, DIM, dtype=torch.float64)
    lse = torch.full((TOKENS, BATCH, HEADS), -torch.inf, dtype=torch.float64)
    rows = slice(part.first, part.first + len(part.x))
    out[rows], lse[rows] = part.x.double().nan_to_num(0.0), part.lse.double()
    return out, lse


def merged(count: int, dtype: torch.dtype, rounded: bool) -> dict[str, object]:
    """Errors of one launch with an accumulator and `count` - 1 parts that is written over, or rounded to `dtype`."""
    given = parts(count, dtype)
    assert given[0].lse is not None
    out, lse = given[0].x.float().contiguous(), given[0].lse.contiguous()
    outs, lses = (torch.stack(each) for each in zip(*map(whole, given), strict=True))
    expected_lse = lses.logsumexp(0)
    weights = (lses - expected_lse).exp().nan_to_num(0.0)
    given[0] = Part(0, out, lse)
    result = torch.empty_like(out, dtype=dtype if rounded else torch.float32)
    merge(given, result if rounded else out, lse)
    found = result if rounded else out
    seen = expected_lse > -torch.inf
    return {
        "out": relative_error(found, (weights[..., None] * outs).sum(0)),
        "lse": relative_error(lse[seen], expected_lse[seen]),
        "rows without keys": bool((lse[~seen] == -torch.inf).all() and (found[~seen] == 0).all() and (~seen).any()),
    }


def added(count: int, dtype: torch.dtype) -> bool:
    """Compare one launch with torch, which adds one part after the other, to the bit."""
    given = [Part(part.first, part.x.nan_to_num(0.0)) for part in parts(count, dtype)][1:]
    total = torch.randn(TOKENS, BATCH, HEADS, DIM)
    expected = total.clone()
    for part in given:
        expected[part.first : part.first + len(part.x)] += part.x
    add([Part(0, total), *given], total)
    rounded = torch.empty_like(total, dtype=dtype)
    add([Part(0, total)], rounded)
    return torch.equal(total, expected) and torch.equal(rounded, expected.to(dtype))


def single(dtype: torch.dtype) -> bool:
    """Check that a part that stays alone comes back as it went in: the tensor itself, and from a launch to the bit."""
    (part,) = parts(1, dtype)
    x, lse = part.x.nan_to_num(0.0), part.lse
    assert lse is not None
    merging, total = SoftmaxMerge(x), Sum(x)
    merging.add(slice(0, TOKENS), x, lse)
    total.add(slice(0, TOKENS), x)
    kept = merging.result()[0] is x and merging.result()[1] is lse and total.result() is x
    out, out_lse = torch.empty_like(x), torch.empty_like(lse)
    merge([Part(0, x, lse)], out, out_lse)
    return kept and torch.equal(out, x) and torch.equal(out_lse, lse)


def errors(
    backend: str, ranks: int, dtype: torch.dtype, merging: Merging, causal: bool, window: int | None
) -> list[float]:
    """Errors of out, dq, dk and dv of an algorithm against dense attention in float64."""
    task = problem(8 * ranks, max(4, ranks), 2 if ranks % 2 == 0 else 1, causal=causal, dim=16, batch=1)
    task = task._replace(
        window=None if window is None else (window, 0 if causal else window),
        **{name: getattr(task, name).to(dtype) for name in ("q", "k", "v", "dout")},
    )
    grid = most_square(ranks) if backend in ("double-ring", "usp") else None

    def body(fabric: LocalFabric) -> tuple[list[Tensor], Tensor]:
        ASSUMED.set(merging)
        mine = torch.tensor(indices("zigzag", len(task.q), ranks, fabric.rank))
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
        made = plan(backend, cp=fabric, causal=causal, window=task.window, kernel="reference", **axes)
        leaves = [x[mine].requires_grad_() for x in (task.q, task.k, task.v)]
        out = attend(*leaves, made)
        return [out.detach(), *torch.autograd.grad(out, leaves, task.dout[mine])], mine

    results = in_process(ranks, body)
    found = []
    for index, expected in enumerate(dense(task)):
        joined = torch.empty_like(expected)
        for tensors, mine in results:
            joined[mine] = tensors[index].double()
        found.append(relative_error(joined, expected))
    return found


def main(dtypes: list[str], counts: list[int], algorithms: list[tuple[str, int, str, bool, int | None]]) -> None:
    answer: dict[str, dict[str, object]] = {"single": {}, "merged": {}, "added": {}, "algorithms": {}}
    for name in dtypes:
        dtype = getattr(torch, name)
        answer["single"][name] = single(dtype)
        for count in counts:
            answer["added"][f"{count} {name}"] = added(count, dtype)
            for rounded in (False, True):
                answer["merged"][f"{count} {name} {rounded}"] = merged(count, dtype, rounded)
    for backend, ranks, name, causal, window in algorithms:
        answer["algorithms"][f"{backend} {ranks} {name} {causal} {window}"] = {
            policy: errors(backend, ranks, getattr(torch, name), merging, causal, window)
            for policy, merging in POLICIES.items()
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
