"""Attention by Triton under its interpreter, against the reference: run in a process with TRITON_INTERPRET=1.

Prints one JSON object: the largest errors by case, and whether the dropped weights are those of the reference.
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
from megatron_cp.context.dropout import DropoutSeed, labelled
from megatron_cp.context.layouts import indices
from megatron_cp.kernels.dropout import COLUMNS, kept
from megatron_cp.kernels.protocol import Kernel, Window
from megatron_cp.kernels.reference import ReferenceKernel
from megatron_cp.kernels.triton_flash import TritonKernel
from tests.context.dense import Problem, problem, relative_error
from tests.kernels import interpreted

SEED = 54321

# bfloat16 is rounded to nearest
assert interpreter._convert_float is interpreted._to_nearest
_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bfloat16(self, a, b, *rest):
    """Multiply numbers of bfloat16, which the interpreter keeps as bits and multiplies as such."""
    wide = (
        interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if x.dtype == tl.bfloat16
        else x
        for x in (a, b)
    )
    return _dot(self, *wide, *rest)


interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16


def tile(queries: int, keys: int, heads: int, groups: int, dim: int, value_dim: int, rate: float) -> Problem:
    """q, k, v and dout of a tile, with the columns of dropout behind q and k where weights are dropped."""
    rows = problem(queries, heads, groups, causal=False, dim=dim, value_dim=value_dim)
    columns = problem(keys, heads, groups, causal=False, dim=dim, value_dim=value_dim, seed=1)
    task = rows._replace(k=columns.k, v=columns.v)
    if not rate:
        return task
    # keys from another place of the sequence than queries
    q, _ = labelled(task.q, task.q, (range(1000, 1000 + queries),), DropoutSeed(SEED))
    _, k = labelled(task.k, task.k, (range(77, 77 + keys),), DropoutSeed(SEED))
    return task._replace(q=q, k=k)


def run(kernel: Kernel, task: Problem, dim: int, causal: bool, window: Window | None) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv."""
    how = {"scale": dim**-0.5, "causal": causal} | ({} if window is None else {"window": window})
    out, lse = kernel.forward(*task[:3], **how)
    return out, lse, *kernel.backward(task.dout, *task[:3], out, lse, **how)


def strided(x: Tensor) -> Tensor:
    """The same values between others, as a rank's tiles lie."""
    around = x.new_full((len(x) + 2, x.shape[1], x.shape[2] + 1, x.shape[3]), torch.nan)
    around[1:-1, :, 1:] = x
    return around[1:-1, :, 1:]


def errors(
    sizes: list[int], causal: bool, window: Window | None, rate: float, dtype: torch.dtype
) -> dict[str, float | bool]:
    """Errors of one tile against the reference in float64 on the same numbers."""
    task = tile(*sizes, rate)
    given = task._replace(**{name: strided(getattr(task, name).to(dtype)) for name in ("q", "k", "v", "dout")})
    wide = task._replace(**{name: getattr(given, name).double() for name in ("q", "k", "v", "dout")})
    window = None if window is None else tuple(window)
    kernels = (TritonKernel(), ReferenceKernel())
    made = [kernel.dropping(rate) if rate else kernel for kernel in kernels]
    found = run(made[0], given, sizes[4], causal, window)
    expected = run(made[1], wide, sizes[4], causal, window)
    names = ("out", "lse", "dq", "dk", "dv")
    # a single key has no gradient for q and k but rounding
    answer = {
        name: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for name, a, b in zip(names, found, expected, strict=True)
    }
    plain = not rate or not any(grad[..., -COLUMNS:].any() for grad in found[2:4])
    return answer | {"dtypes": found[1].dtype == torch.float32 and plain}


def same_weights(queries: int, keys: int, heads: int, groups: int, rate: float) -> bool:
    """Compare the dropped weights with the reference's: with equal scores, values of ones and zeros show each."""
    task = tile(queries, keys, heads, groups, 8, 8, rate)
    q, k = (x.float() for x in task[:2])
    q[..., :-COLUMNS] = 0
    v = torch.eye(keys)[:, None, None].expand(keys, q.shape[1], groups, keys).contiguous()
    out, _ = TritonKernel(rate).forward(q, k, v, scale=1.0, causal=False)
    _, _, factor = kept(q, k, rate)
    # b g r s t -> s b (g r) t
    factor = factor.flatten(1, 2).permute(2, 0, 1, 3)
    return torch.equal(out != 0, factor != 0) and bool((out != 0).any()) and bool((out == 0).any())


def across_ranks(backend: str, ranks: int, rate: float) -> dict[str, float]:
    """Errors of an algorithm with this kernel, against one rank with the reference in float64."""
    task = problem(8 * ranks, 4, 2, causal=True, dim=16, batch=1)

    def body(fabric: LocalFabric, kernel: Kernel, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        mine = torch.tensor(indices("zigzag", len(task.q), fabric.size, fabric.rank))
        leaves = [x[mine].to(dtype).requires_grad_() for x in task[:3]]
        out = attend(*leaves, plan(backend, cp=fabric, kernel=kernel, dropout=rate), dropout_seed=SEED)
        return mine, [out.detach(), *torch.autograd.grad(out, leaves, task.dout[mine].to(dtype))]

    ((_, expected),) = in_process(1, lambda fabric: body(fabric, ReferenceKernel(), torch.float64))
    found = [torch.zeros_like(x) for x in expected]
    for mine, parts in in_process(ranks, lambda fabric: body(fabric, TritonKernel(), torch.float32)):
        for total, part in zip(found, parts, strict=True):
            total[mine] = part.double()
    return {name: relative_error(a, b) for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True)}


def main(tiles: list[list], weights: list[list], algorithms: list[list]) -> None:
    answer: dict[str, dict[str, object]] = {
        "tiles": {json.dumps(case): errors(*case[:-1], getattr(torch, case[-1])) for case in tiles},
        "weights": {json.dumps(case): same_weights(*case) for case in weights},
        "algorithms": {json.dumps(case): across_ranks(*case) for case in algorithms},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
