"""Stand-in for `transformer_engine_torch`, the compiled half of TransformerEngine, so that the other runs on a CPU.

The wheel `transformer-engine` installs anywhere; the compiled module between it and CUDA has to be built where a GPU
is. What linears, norms and optimizers call of that module in high precision is written here with torch's operations;
anything else raises with its name when it is called. Enums get the members that TransformerEngine's files name.
"""

import enum
import functools
import importlib
import importlib.util
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "transformer_engine_torch"
CALLS: Counter[str] = Counter()
"""How often each operation was called in this process."""

DTYPES = {
    "kByte": torch.uint8,
    "kInt32": torch.int32,
    "kFloat32": torch.float32,
    "kFloat16": torch.float16,
    "kBFloat16": torch.bfloat16,
}


def is_needed() -> bool:
    """True where TransformerEngine's wheel is installed without its compiled module."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    # from its own wheel it lies in the package or beside it, and so it does where all was built from source
    return not any([*package.rglob(f"{NAME}*.so"), *package.parent.glob(f"{NAME}*.so")])


def install() -> None:
    """Import TransformerEngine with the stand-in; its files, which refuse the CPU, then take tensors for CUDA ones."""
    if NAME in sys.modules:
        return
    sys.modules[NAME] = StandIn(NAME)
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.loader is not None
    # the package's first lines load the compiled module: its folder has to be importable before they run
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    # and those of the folder load CUDA's libraries unless TransformerEngine itself is being built
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    common = importlib.import_module("transformer_engine.common")
    del os.environ["NVTE_PROJECT_BUILDING"]
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    spec.loader.exec_module(package)
    # the package keeps a failed import of its own to itself
    importlib.import_module("transformer_engine.pytorch")
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment, misc]


def _is_cuda(tensor: Tensor) -> bool:
    asks = sys._getframe(1).f_globals.get("__name__", "")
    return asks.startswith("transformer_engine.") or tensor.device.type == "cuda"


class StandIn(types.ModuleType):
    """A module with the operations below, TransformerEngine's enums, and placeholders for everything else."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        vars(self).update({operation.__name__: _counted(operation) for operation in OPERATIONS})
        vars(self).update(get_cudnn_version=lambda: 92400, get_cublasLt_version=lambda: 130100)
        # the first is the older name of the second
        vars(self).update(_num_cublas_streams=1, get_num_cublas_streams=lambda: 1, ubuf_built_with_mpi=lambda: False)
        vars(self).update(get_stream_priority_range=lambda *device: (0, 0))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = _enum_or_class(name) if name[0].isupper() else functools.partial(_missing, name)
        setattr(self, name, made)
        return made


def _counted(operation: Any) -> Any:
    @functools.wraps(operation)
    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[operation.__name__] += 1
        return operation(*args, **kwargs)

    return counted


def _missing(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"the stand-in for {NAME} has no {name}")


def _enum_or_class(name: str) -> type:
    members = sorted(_members().get(name, ()))
    return enum.IntEnum(name, members, start=0) if members else type(name, (), {})


@functools.cache
def _members() -> dict[str, set[str]]:
    """Return the members of each enum that TransformerEngine's files name, as `tex.DType.kByte` or `DType.kByte`."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, set[str]] = {}
    for file in Path(spec.origin).parent.joinpath("pytorch").rglob("*.py"):
        text = re.sub(r"#.*", "", file.read_text())
        if NAME in text:
            names = dict(re.findall(r"^(\w+) = tex\.([A-Z]\w+)$", text, flags=re.MULTILINE))
            for name, member in re.findall(r"\b([A-Z]\w+)\.([A-Za-z]\w+)\b(?!\()", text):
                found.setdefault(names.get(name, name), set()).add(member)
    return found


def _dtype(number: Any, default: torch.dtype) -> torch.dtype:
    return default if number is None else DTYPES[sys.modules[NAME].DType(int(number)).name]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool) -> Tensor:
    """Return op(b) op(a), of matrices stored in rows: cuBLAS has them in columns and so in the other order."""
    left, right = _flat(b), _flat(a)
    return (left.t() if transpose_b else left).matmul(right.t() if transpose_a else right)


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_bytes: int,
    accumulate: bool,
    *_: Any,
    comm_overlap: Any = None,
    alpha: float = 1.0,
    **__: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Multiply as TransformerEngine's only matrix product does: out, gradient of the bias, no GELU, no overlap."""
    assert quantizer is None
    assert comm_overlap is None
    assert not gelu
    assert alpha == 1.0
    made = _product(a, transpose_a, b, transpose_b)
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = _flat(b).sum(0).to(bias.dtype)
        else:
            made = made + bias
    if not transpose_b:
        made = made.view(*b.shape[:-1], made.shape[-1])
    return _into(out, made, accumulate, _dtype(out_dtype, a.dtype)), bias_gradient, None, None


def _into(out: Tensor | None, made: Tensor, accumulate: bool, dtype: torch.dtype) -> Tensor:
    if out is None:
        return made.to(dtype)
    made = made.view(out.shape)
    return out.add_(made) if accumulate else out.copy_(made)


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transpose_a: bool,
    b: Sequence[Tensor],
    transpose_b: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    sizes: Sequence[int],
    bias: Sequence[Tensor],
    bias_dtype: Any,
    single_output: bool,
    pre_gelu: Any,
    grad: bool,
    workspace: Any,
    workspace_bytes: int,
    accumulate: bool,
    *_: Any,
) -> Sequence[Tensor]:
    """Multiply pairs of matrices, into one output after another or into rows of the only one."""
    outs = out[0].split([len(_flat(each)) for each in b]) if single_output else out
    for index, (left, right, into) in enumerate(zip(a, b, outs, strict=True)):
        made = _product(left, transpose_a, right, transpose_b)
        if bias[index].numel():
            if grad:
                bias[index].copy_(_flat(right).sum(0))
            else:
                made = made + bias[index]
        _into(into, made, accumulate, into.dtype)
    return bias


def _scale(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def rmsnorm_fwd(
    given: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, zero_centered: bool
) -> tuple[Tensor, None, Tensor]:
    """Return the norm, nothing for a mean, and 1 / root mean square of each row."""
    assert quantizer is None
    inverse = torch.rsqrt(given.float().pow(2).mean(-1) + eps)
    made = (given.float() * inverse[:, None]).to(given.dtype) * _scale(weight, zero_centered)
    return _into(out, made, False, _dtype(dtype, given.dtype)), None, inverse


def rmsnorm_bwd(
    gradient: Tensor, given: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight."""
    normal = given.float() * inverse[:, None]
    scaled = gradient.float() * _scale(weight, zero_centered)
    made = inverse[:, None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return made.to(given.dtype), (gradient.float() * normal).sum(0).to(weight.dtype)


def layernorm_fwd(
    given: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm, mean and 1 / standard deviation of each row."""
    assert quantizer is None
    mean = given.float().mean(-1)
    inverse = torch.rsqrt(given.float().var(-1, unbiased=False) + eps)
    made = (given.float() - mean[:, None]) * inverse[:, None] * _scale(weight, zero_centered) + bias.float()
    return _into(out, made, False, _dtype(dtype, given.dtype)), mean, inverse


def layernorm_bwd(
    gradient: Tensor, given: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias."""
    normal = (given.float() - mean[:, None]) * inverse[:, None]
    scaled = gradient.float() * _scale(weight, zero_centered)
    made = scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)
    weights = (gradient.float() * normal).sum(0).to(weight.dtype)
    return (inverse[:, None] * made).to(given.dtype), weights, gradient.float().sum(0).to(weight.dtype)


def multi_tensor_scale(chunk: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], scale: float) -> None:
    """Write each tensor of the first list times `scale` to its place in the second."""
    for given, out in zip(*tensors, strict=True):
        out.copy_(given * scale)


def multi_tensor_scale_tensor(chunk: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], scale: Tensor) -> None:
    """Do the same with a scale on the device."""
    multi_tensor_scale(chunk, overflow, tensors, scale.item())


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together and, if wanted, of each."""
    norms = torch.stack([tensor.float().norm() for tensor in tensors[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    tensors: Sequence[Sequence[Tensor]],
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    decay: float,
) -> None:
    """Take a step of Adam, or AdamW (`decoupled`); lists: gradients, parameters, moments and perhaps fp32 masters."""
    gradients, parameters, firsts, seconds, *masters = tensors
    correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for index, (gradient, parameter, first, second) in enumerate(
        zip(gradients, parameters, firsts, seconds, strict=True)
    ):
        master = masters[0][index] if masters else parameter
        value, grad = master.float(), gradient.float()
        if not decoupled:
            grad = grad + decay * value
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / correct1) / ((second / correct2).sqrt() + eps)
        master.copy_(value - rate * (update + decay * value if decoupled else update))
        if masters:
            parameter.copy_(master)


OPERATIONS = (
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    multi_tensor_scale,
    multi_tensor_scale_tensor,
    multi_tensor_l2norm,
    multi_tensor_adam,
)
