"""Estimate the largest memory of a rank, by kind."""

from dataclasses import replace
from typing import NamedTuple

from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.work import RankConfig, context_attention


class MemoryUse(NamedTuple):
    """Bytes of one rank.

    weights, gradients, optimizer: as Megatron keeps them
    activations: kept from forward to backward, of every microbatch in flight
    logits:      of one microbatch, with the cross entropy's copies
    buffers:     of context parallelism and of one layer at work
    reserved:    context, libraries and communication buffers
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(self)


def parameter_bytes(parallel: Parallel, dense: float, experts: float) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer state for a rank's dense and expert parameters.

    bf16: 2 bytes, gradients in float32 unless reduced in bf16, and master weights and two moments of Adam in float32,
    spread over the data-parallel and context-parallel ranks by the distributed optimizer (arXiv:1910.02054, 3.1).
    """
    parameters = dense + experts
    # fp8 keeps each weight and its transpose, and by default a copy in bf16
    weight = parallel.bytes + (2 if parallel.precision == "fp8" and not parallel.fp8_params else 0)
    gradient = 4 if parallel.fp32_grads or parallel.precision == "float32" else 2
    state = 8 if parallel.precision == "float32" else 12
    shards = parallel.dp * parallel.cp
    if parallel.fsdp:
        return parameters * weight / shards, parameters * gradient / shards, parameters * state / shards
    if parallel.distributed_optimizer:
        return parameters * weight, parameters * gradient, state * (dense / shards + experts / (shards / parallel.ep))
    return parameters * weight, parameters * gradient, parameters * state


def mean_layer_bytes(rank: RankConfig) -> float:
    """Return the bytes that a layer keeps from forward to backward of one microbatch, a mean over all layers."""
    share = rank.model.moe_layers / rank.model.layers
    return (1 - share) * layer_bytes(rank, moe=False) + share * layer_bytes(rank, moe=True)


def layer_bytes(rank: RankConfig, moe: bool) -> float:
    """Return the bytes that a dense or a mixture layer keeps (arXiv:2205.05198, section 4)."""
    model, parallel = rank.model, rank.parallel
    stored = parallel.bytes
    if parallel.recompute == "full":
        return stored * rank.split_tokens * model.hidden
    # inputs of products are kept in the dtype of the products
    taken = 1 if parallel.precision == "fp8" else stored
    # the inputs of two norms, and of the products that follow
    whole = 2 * model.hidden * (stored + taken) * rank.split_tokens
    mlp = _mlp_width(model, moe)
    split = (model.query + model.key_value + (model.matrices - 1) * mlp) * stored + (model.query + mlp) * taken
    if parallel.flash:
        # the row statistics of the softmax
        split += 4 * model.heads
    elif parallel.recompute == "none":
        # scores after softmax and after dropout, and a mask of one byte
        split += 5 * model.heads * rank.seq
    if rank.cluster.unfused:
        # without fused kernels, the activation's and the rotary positions' intermediate results too
        split += (mlp + model.query + model.key_value) * stored
    return whole + split * rank.tokens / parallel.tp


def _mlp_width(model: Transformer, moe: bool) -> int:
    return model.top_k * (model.expert_ffn + model.hidden) + model.shared_expert_ffn if moe else model.ffn


def stage_parameters(
    model: Transformer, parallel: Parallel, layers: float, first: bool, last: bool
) -> tuple[float, float]:
    """Return the dense and expert parameters of a rank with `layers` layers.

    first, last: add the embedding, or the final norm and the output layer
    """
    share = layers / model.layers
    ends = (int(first) + int(last)) * model.embedding_parameters
    if first and last and model.tied:
        ends = model.embedding_parameters
    experts = model.expert_parameters / parallel.ep
    norm = model.hidden if last else 0
    return (share * model.dense_parameters + ends + norm) / parallel.tp, share * experts / parallel.tp


def rank_memory(rank: RankConfig, layers: float, activations: float, first: bool, last: bool) -> MemoryUse:
    """Return the largest memory of a pipeline rank with `layers` layers.

    activations: most bytes that it keeps at once, of all microbatches in flight
    """
    model, parallel = rank.model, rank.parallel
    logits = 0.0
    if last:
        # the stored logits, and their float32 copy that the cross entropy turns into the gradient
        logits = (parallel.bytes + 8) * rank.tokens * model.vocab / parallel.tp
    # gradients of the widest layer that is at work
    buffers = context_attention(rank).live + parallel.bytes * model.matrices * model.ffn * rank.tokens / parallel.tp
    if parallel.recompute == "full":
        buffers += mean_layer_bytes(replace(rank, parallel=replace(parallel, recompute="none")))
    dense, experts = stage_parameters(model, parallel, layers, first, last)
    weights, gradients, optimizer = parameter_bytes(parallel, dense, experts)
    return MemoryUse(weights, gradients, optimizer, activations, logits, buffers, rank.cluster.reserved_bytes)
