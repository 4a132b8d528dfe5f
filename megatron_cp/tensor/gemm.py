"""Products of two matrices, which engines compute: torch's own, or Stream-K's where that is asked for or predicted."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from megatron_cp import config
from megatron_cp.errors import CannotRun
from megatron_cp.kernels.stream_k_plan import predict, tiling_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that Stream-K multiplies; other products are torch's."""

INTERPRETED = 4
"""Programs under Triton's interpreter, which has no processors to ask for."""


class Multiply(Protocol):
    """The product of a [m, k] and b [k, n], of any strides."""

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the product [m, n]; in `out`, which is contiguous, where it is given."""
        ...


def torch_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return torch's product, on CUDA that of cuBLAS."""
    return torch.mm(a, b, out=out)


class StreamProduct:
    """Stream-K's product (Osama et al. 2023): of everything, or where it is predicted to take less time than torch's.

    calls: products that its kernel has computed
    """

    def __init__(self, *, predicted: bool) -> None:
        if reason := unable(gpu=torch.cuda.is_available()):
            raise CannotRun(f"--tp-gemm stream-k {reason}; use torch")
        # Triton is a package of its own, which products of torch do without
        from megatron_cp.kernels.stream_k import matmul

        self._matmul, self._predicted = matmul, predicted
        self.calls = 0

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        processors = _processors(a.device)
        sizes = len(a), b.shape[1], a.shape[1]
        if a.dtype not in DTYPES or (self._predicted and not _pays(*sizes, a.element_size(), processors)):
            return torch_product(a, b, out)
        self.calls += 1
        return self._matmul(a, b, processors, out=out)


def unable(*, gpu: bool) -> str:
    """Say what Stream-K lacks on a machine with a GPU or without one; empty where it runs."""
    if find_spec("triton") is None:
        return "needs the package triton"
    if not gpu and config.variable("TRITON_INTERPRET") != "1":
        return "needs a CUDA GPU, or Triton's interpreter by TRITON_INTERPRET=1, and this machine has none"
    return ""


@lru_cache(8)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


# a model has a few shapes of products
@lru_cache(256)
def _pays(m: int, n: int, k: int, element: int, processors: int) -> bool:
    return predict(m, n, k, tiling_of(element), processors).pays
