"""Estimate the largest memory of a rank, by kind."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_cp.context import BACKENDS, PLACEMENTS
from megatron_cp.experts import WEIGHTS
from megatron_cp.experts.dispatch_cost import ALLGATHER
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.slices import model_lengths
from megatron_cp.planner.copies import copies_bytes
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.quantised import TRAVEL, Moved, ParameterKinds, left_bytes, moved
from megatron_cp.planner.vocabulary import head_bytes, message_bytes
from megatron_cp.planner.work import RankConfig, context_attention, layer_kinds, linears_of, mlp_width

BUCKET = 40_000_000
"""Parameters of Megatron's smallest bucket of gradients."""


class MemoryUse(NamedTuple):
    """Bytes of one rank.

    weights, gradients, optimizer: as Megatron keeps them, of all copies and versions of weights that a schedule needs,
                 with what quantised gradients leave over for the next step, and with hosted copies of experts
    activations: kept from forward to backward, of every microbatch in flight
    logits:      of one microbatch, with the cross entropy's copies; of two where the vocabulary lies on all ranks
    buffers:     of context parallelism, of one layer at work, of a bucket of quantised messages, of messages of a
                 vocabulary on all ranks, and of a layer's copies of experts on their way
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
    spread over the data-parallel and context-parallel ranks by the distributed optimizer (arXiv:1910.02054, 3.1), but
    for what of them is in files. FSDP spreads gradients and weights too.
    """
    parameters = dense + experts
    # fp8 keeps each weight and its transpose, and by default a copy in bf16
    weight = parallel.bytes + (2 if parallel.precision == "fp8" and not parallel.fp8_params else 0)
    gradient = gradient_bytes(parallel)
    state = (parallel.state_bytes or (8 if parallel.precision == "float32" else 12)) + parallel.outer_bytes
    state -= parallel.disk_bytes
    owned = of_shards(parallel, dense, experts)
    if parallel.fsdp:
        kept = (owned if parallel.is_sharded(kind) else parameters for kind in ("params", "grads", "optim"))
        weights, gradients, states = (size * count for size, count in zip((weight, gradient, state), kept, strict=True))
        return weights, gradients, states
    if parallel.distributed_optimizer:
        return parameters * weight, parameters * gradient, state * owned
    return parameters * weight, parameters * gradient, parameters * state


def of_shards(parallel: Parallel, dense: float, experts: float) -> float:
    """Return the parameters of one rank's shards, where `dense` and `experts` are spread over data-parallel ranks."""
    return dense / parallel.shards + experts / parallel.expert_shards


def mean_layer_bytes(rank: RankConfig) -> float:
    """Return the bytes that a layer keeps from forward to backward of one microbatch, a mean over all layers."""
    return sum(kind.share * layer_bytes(kind.rank, kind.moe) for kind in layer_kinds(rank))


def layer_bytes(rank: RankConfig, moe: bool) -> float:
    """Return the bytes that a dense or a mixture layer keeps (arXiv:2205.05198, section 4)."""
    model, parallel = rank.model, rank.parallel
    stored = parallel.bytes
    if parallel.recompute == "full":
        kept = 1 / parallel.recompute_layers if parallel.recompute_method == "uniform" else 1
        inputs = kept * stored * rank.split_tokens * model.hidden
        return inputs + keys_for_slices(rank, stored) + kept_attention(rank)
    modules = list(parallel.recomputed) if parallel.recompute == "selective" else []
    modules += ["mlp"] if parallel.frees_mlp_chunks else []
    # inputs of products are kept in the dtype of the products
    taken = 1 if parallel.precision == "fp8" else stored
    # the inputs of two norms, and of the products that follow
    whole = 2 * model.hidden * (stored + (0 if "layernorm" in modules else taken)) * rank.split_tokens
    if model.latent:
        latent = model.latent.q_lora_rank + model.latent.kv_lora_rank + model.latent.qk_pos_emb_head_dim
        whole += latent * (stored + taken) * rank.split_tokens
    mlp, acted = kept_of_mlp(rank, modules, moe)
    queries = 0 if "mla_up_proj" in modules else model.query + kept_of_keys(rank)
    split = (queries + (model.matrices - 1) * mlp) * stored + (model.query + acted) * taken
    if parallel.flash:
        # the row statistics of the softmax
        split += 4 * model.heads
    elif "core_attn" not in modules:
        # scores after softmax and after dropout, and a mask of one byte
        split += 5 * model.heads * rank.seq
    if "core_attn" in modules:
        whole += keys_for_slices(rank, stored) + kept_attention(rank)
    if rank.cluster.unfused:
        # without fused kernels, the activation's and the rotary positions' intermediate results too
        split += (mlp + model.query + model.key_value) * stored
    return whole + split * rank.tokens / parallel.tp


def kept_attention(rank: RankConfig) -> float:
    """Return the bytes of a layer's attention that its recomputation finds kept, beside what it keeps anyway.

    Its output and the row statistics, which "selective" keeps anyway, and queries, keys, values and output as they are
    between the exchanges of a backend that has some; one in chunks over time has all but the output in host memory.
    """
    model, parallel = rank.model, rank.parallel
    if not parallel.keep_attention:
        return 0.0
    entry, stored = BACKENDS.get(parallel.backend), parallel.bytes
    output, rows = (model.query * stored, 4 * model.heads) if parallel.recompute == "full" else (0, 0)
    if entry.capabilities.over_time:
        return output * rank.tokens / parallel.tp
    width: float = output + rows
    sharing = entry.head_ranks(parallel.cp, parallel.grid, PLACEMENTS[parallel.placement])
    if entry.capabilities.heads != "none" or (entry.layout and parallel.cp > 1):
        # a KV head that query heads of several ranks need is on each of them
        copies = max(1.0, sharing * parallel.tp / model.kv_heads)
        width += stored * (2 * model.query + copies * kept_of_keys(rank))
    return width * rank.tokens / parallel.tp


def kept_of_keys(rank: RankConfig) -> int:
    """Return the width of what a layer keeps to attend to in the backward pass: keys and values, or their latent."""
    latent = rank.model.latent
    if latent is None or not rank.parallel.latent:
        return rank.model.key_value
    return latent.kv_lora_rank + latent.qk_pos_emb_head_dim


def keys_for_slices(rank: RankConfig, size: float) -> float:
    """Return the bytes of a layer's keys and values, or of their gradients, that wait for other slices; 0 without."""
    if rank.parallel.slices == 1:
        return 0.0
    return size * rank.model.key_value * rank.tokens / rank.parallel.tp


def slice_lengths(rank: RankConfig) -> list[int]:
    """Return the tokens of each slice of a sequence, as training cuts it; ValueError where one would be empty."""
    model, parallel = rank.model, rank.parallel
    if parallel.slices == 1:
        return [rank.seq]
    parameters = sum(weight.inner * weight.columns for weight in model.attention_weights)
    parameters += model.matrices * model.hidden * model.ffn
    multiple = math.lcm(2 * parallel.cp, parallel.cp * (parallel.tp if parallel.sp else 1))
    split = SCHEDULES.get(parallel.schedule_name).split
    return model_lengths(parallel.slices, rank.seq, multiple, parameters, model.query, split)


def kept_of_mlp(rank: RankConfig, modules: Sequence[str], moe: bool) -> tuple[float, float]:
    """Return the widths that an MLP keeps of its first product's output and of its activation's output."""
    model = rank.model
    if ("moe" if moe else "mlp") in modules:
        return 0, 0
    width = mlp_width(rank, moe)
    if not moe:
        return width, width
    if "shared_experts" in modules:
        width -= model.shared_expert_ffn
    return width, width - (rank.routed.busiest * model.expert_ffn if "moe_act" in modules else 0)


def stage_parameters(
    model: Transformer, parallel: Parallel, layers: float, first: bool, last: bool
) -> tuple[float, float]:
    """Return the dense and expert parameters of a rank with `layers` layers, those of all copies.

    first, last: add the embedding, or the final norm and the output layer; a tied one is one weight without a pipeline
                 and where the vocabulary lies on all ranks, each of which then has a part of both
    """
    share = layers / model.layers
    ends = _embeddings(model, parallel, first, last)
    experts = model.expert_parameters / (parallel.ep * parallel.expert_tp)
    rest = model.hidden + model.mtp * model.mtp_parameters if last else 0
    whole = share * model.layers * sum(one.inner * one.columns for one in model.attention_weights if not one.split)
    # tensor parallelism splits all but MLA's down-projections
    dense = whole + (share * model.dense_parameters - whole + ends + rest) / parallel.tp
    return dense, share * experts


def _embeddings(model: Transformer, parallel: Parallel, first: bool, last: bool) -> float:
    """Return the parameters of the embedding and the output layer."""
    if parallel.barriers:
        return (1 if model.tied else 2) * model.embedding_parameters / parallel.pp
    if first and last and model.tied and parallel.pp == 1:
        return model.embedding_parameters
    return (int(first) + int(last)) * model.embedding_parameters


def kinds_of(model: Transformer, parallel: Parallel, layers: float, first: bool, last: bool) -> ParameterKinds:
    """Return the parameters of `stage_parameters` as quantised messages sort them.

    Norms, routers, embedding and output layer stay exact; experts that other ranks share travel as ever.
    """
    dense, experts = stage_parameters(model, parallel, layers, first, last)
    latent = model.latent.q_lora_rank + model.latent.kv_lora_rank if model.latent else 0
    of_layers = model.layers * (2 * model.hidden + latent) + model.moe_layers * model.experts * model.hidden
    rest = model.hidden * (1 + 3 * model.mtp) if last else 0
    exact = (layers / model.layers * of_layers + _embeddings(model, parallel, first, last) + rest) / parallel.tp
    apart = parallel.ep > 1 or parallel.expert_tp != parallel.tp
    return ParameterKinds(dense - exact + (0 if apart else experts), exact, experts if apart else 0)


def moved_in_a_step(parallel: Parallel, kinds: ParameterKinds) -> tuple[Moved, Moved]:
    """Return what a reduction of gradients and a gather of weights move.

    Weights travel in the dtype that they are stored in; with --fp8-param-gather those of linears are stored in fp8.
    """
    gradients, messages = gradient_bytes(parallel), parallel.messages
    of_linears = 1 if parallel.precision == "fp8" and parallel.fp8_params else parallel.bytes
    return (
        moved(messages.of_gradients, kinds, gradients, gradients),
        moved(messages.of_weights, kinds, of_linears, parallel.bytes),
    )


def gradient_bytes(parallel: Parallel) -> int:
    """Return the bytes in which a gradient is accumulated and reduced."""
    return 4 if parallel.fp32_grads or parallel.precision == "float32" else 2


def _gathered_weights(rank: RankConfig) -> float:
    """Return the bytes of the largest weight that a grid gathers, and of its gradient; 0 where none is gathered.

    In panels there are parts of one gradient instead, the sum in float32, and all tokens of a column.
    """
    placing = rank.parallel.placing
    grid, stored = placing.size, rank.parallel.bytes
    if grid.weights == 1:
        return 0.0
    widest = max(linear.weight for linear in linears_of(rank, moe=False).linears)
    if placing.panels > 1:
        return (4 + 2 * stored) * widest / grid.grid.ranks + stored * rank.tokens / grid.weights * rank.model.hidden
    return 2 * stored * widest / grid.tokens


def _gathered_tokens(rank: RankConfig) -> float:
    """Return the bytes of the tokens of all ranks of a layer's experts, where Megatron's allgather dispatcher has them.

    They are there before experts compute, and what the experts make of them before it is added up.
    """
    gathers = rank.model.experts and rank.dispatch.dispatcher == ALLGATHER and rank.expert_ranks.all > 1
    return rank.expert_ranks.all * rank.split_tokens * rank.model.hidden * rank.parallel.bytes if gathers else 0.0


def _attention_workspace(rank: RankConfig) -> float:
    """Return the bytes that a fused kernel's backward takes beside its inputs and results on a GPU.

    dQ in float32, and with grouped heads dK and dV of every query head: so measured on an H100 (docs/gpu_h100.md).
    """
    if not rank.parallel.flash or rank.cluster.device != "cuda":
        return 0.0
    model, parallel = rank.model, rank.parallel
    grouped = 2 * parallel.bytes if model.kv_heads < model.heads else 0
    return (4 + grouped) * model.heads / parallel.tp * model.head_dim * rank.tokens


def rank_memory(
    rank: RankConfig, layers: float, activations: float, first: bool, last: bool, versions: int = 1
) -> MemoryUse:
    """Return the largest memory of a pipeline rank with `layers` layers, those of all copies.

    activations: most bytes that it keeps at once, of all microbatches in flight
    versions:    of the weights
    """
    model, parallel = rank.model, rank.parallel
    logits = 0.0
    if parallel.barriers:
        logits = head_bytes(rank)
    elif last:
        losses = 1 + model.mtp
        # the stored logits, and their float32 copy that the cross entropy turns into the gradient
        logits = losses * (parallel.bytes + 8) * rank.tokens * model.vocab / parallel.tp
        if parallel.loss_chunks:
            # backward makes and frees those of one chunk of one loss
            logits /= losses * parallel.loss_chunks
    # gradients of the widest layer that is at work
    mlp = parallel.bytes * model.matrices * model.ffn * rank.tokens / parallel.tp
    if parallel.frees_mlp_chunks and not model.moe_layers:
        # of one chunk, with what it computes again
        mlp *= 2 / parallel.mlp_chunks
    buffers = context_attention(rank).live + mlp
    buffers += _attention_workspace(rank)
    buffers += _gathered_tokens(rank)
    lengths = slice_lengths(rank)
    # of the longest slice; gradients of keys of all but the last wait in float32
    buffers *= max(lengths) / rank.seq
    buffers += layers * keys_for_slices(rank, 4) * (1 - lengths[-1] / rank.seq) + _gathered_weights(rank)
    buffers += message_bytes(rank, last) if parallel.barriers else 0.0
    if parallel.recompute == "full":
        at_work = parallel.recompute_layers if parallel.recompute_method == "uniform" else 1
        again = at_work * mean_layer_bytes(replace(rank, parallel=replace(parallel, recompute="none")))
        buffers += again * max(lengths) / rank.seq
    dense, experts = stage_parameters(model, parallel, layers, first, last)
    weights, gradients, optimizer = parameter_bytes(parallel, dense, experts)
    if parallel.messages.asked:
        kinds = kinds_of(model, parallel, layers, first, last)
        gradients += left_bytes(parallel, rank.cluster, kinds.coded)
        if parallel.overlap_grad_reduce:
            buffers += TRAVEL * min(BUCKET, kinds.in_hops)
        else:
            # one bucket of all, after the backward pass has freed the activations
            buffers = max(buffers, TRAVEL * kinds.in_hops - activations - logits)
    weights += (versions - 1) * (dense + experts) * parallel.bytes
    if model.experts and rank.dispatch.gather == WEIGHTS:
        # all shards of a rank's experts stay from the first microbatch of a step to the next step
        weights += parallel.expert_tp * experts * parallel.bytes
    copied, moved = copies_bytes(rank, layers)
    weights, buffers = weights + copied, buffers + moved
    return MemoryUse(weights, gradients, optimizer, activations, logits, buffers, rank.cluster.reserved_bytes)
