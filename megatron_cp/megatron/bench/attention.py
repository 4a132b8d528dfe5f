"""Measure DotProductAttention, Megatron-LM's own attention of the local spec.

It refuses context parallelism, so that every rank does the whole sequence, and it holds the scores of all pairs.
"""

import warnings

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_cp.bench.comparison import AttentionShape, Comparison, Implementation, RefusedError, sends_nothing
from megatron_cp.comm import largest
from megatron_cp.megatron.machine.cpu import cpu_runtime

ALIVE = 5
"""Tensors as large as the scores that are alive at most, in the backward pass."""


def enter(comparison: Comparison, name: str) -> Implementation:
    """Return the stock module for this shape; raises RefusedError where the scores of all ranks need more memory."""
    _check_memory(comparison)
    with cpu_runtime():
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
        module = _module(comparison.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with cpu_runtime():
            out = module(q, k, v, None)
        # s b (h d) -> s b h d
        return out.unflatten(2, q.shape[2:])

    return Implementation(name, None, attend, sends_nothing, trusted=False)


def _module(shape: AttentionShape) -> DotProductAttention:
    with warnings.catch_warnings():
        # about a default of its own
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        config = _config(shape)
    mask = AttnMaskType.causal if shape.causal else AttnMaskType.no_mask
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp"])
    return DotProductAttention(config, 1, mask, "self", pg_collection=groups)


def _config(shape: AttentionShape) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        attention_dropout=0.0,
        # the fused softmax is a CUDA kernel of the extension that comes with Apex
        masked_softmax_fusion=False,
        bf16=shape.dtype == "bfloat16",
        fp16=shape.dtype == "float16",
    )


def _check_memory(comparison: Comparison) -> None:
    shape, size = comparison.shape, comparison.dtype.itemsize
    scores = shape.batch * shape.heads * shape.seq**2 * size
    if comparison.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(comparison.device)
    else:
        free = psutil.virtual_memory().available // comparison.fabric.size
    # what one rank refuses all refuse
    (missing,) = largest(comparison.fabric, comparison.device, ALIVE * scores - free)
    if missing > 0:
        raise RefusedError(
            f"the scores of all pairs are {scores / 2**30:.1f} GiB, {ALIVE} times that is alive, "
            f"which is {missing / 2**30:.1f} GiB more than a rank has"
        )
