"""Stream-K under Triton's interpreter against torch: run in a process with TRITON_INTERPRET=1; prints JSON."""

import json
import random
import sys

import torch

from megatron_cp.kernels.stream_k import matmul
from megatron_cp.kernels.stream_k_plan import StreamTiling

TILING = StreamTiling((16, 16, 16), group=2)


def error(shape: tuple[int, int, int], programs: int, transposed: bool, dtype: torch.dtype) -> float:
    m, n, k = shape
    made = torch.Generator().manual_seed(m * n * k)
    a = torch.randn(m, k, generator=made).to(dtype)
    b = torch.randn(n, k, generator=made).t() if transposed else torch.randn(k, n, generator=made)
    found, expected = matmul(a, b.to(dtype), programs, TILING), a.double() @ b.to(dtype).double()
    assert found.dtype == dtype
    return float((found.double() - expected).abs().max() / expected.abs().max())


def main(count: int) -> None:
    draw = random.Random(1)
    cases = [(tuple(draw.randint(1, 70) for _ in range(3)), draw.randint(1, 9)) for _ in range(count)]
    # one tile; whole waves alone; a rest behind two waves
    cases += [((16, 16, 16), 4), ((64, 32, 40), 4), ((80, 48, 33), 4)]
    errors = [error(shape, programs, bool(i % 2), torch.float32) for i, (shape, programs) in enumerate(cases)]
    print(json.dumps({"count": len(errors), "worst": max(errors)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
