"""Estimate the seconds of a pipeline stage for one microbatch: products, attention, passes over memory, collectives.

Assumed overlap: a sequence-parallel linear hides the collectives of its backward behind its two products, except the
gather that undoes a reduce-scatter. With --tp-comm-overlap those of forward are hidden as well, except the first of as
many pieces as there are ranks. Linears of megatron-cp (--tp-comm-type) are priced by `megatron_cp.tensor.cost`; an
output layer in pieces leaves one piece of each of its collectives exposed. The way of tokens to experts and back is
priced by `megatron_cp.experts.dispatch_cost`, beside the products of the busiest rank's experts alone. All other work
within a layer runs in sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_cp.context.choose import Cost, Record
from megatron_cp.context.trace.events import Problem
from megatron_cp.experts import AUTO as AUTO_GATHER
from megatron_cp.experts import TOKENS, WEIGHTS
from megatron_cp.experts.copies import CopiedLoad, SharedExperts, copied
from megatron_cp.experts.dispatch_cost import (
    Dispatch,
    DispatchSize,
    ExpertRanks,
    PassSeconds,
    calls_of,
    dispatch_seconds,
)
from megatron_cp.experts.routed import RoutedRows, routed, rows_of
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.operations import Product, collective_seconds
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.planner.attention import Attention, attention
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.tensor import AUTO, CUBE, MEGATRONS
from megatron_cp.tensor.cost import LayerLinears, cheapest, linear_times


class Seconds(NamedTuple):
    """Seconds of a rank by kind of work.

    products:    matrix products
    attention:   attention kernels
    memory:      norms, activations and other passes over memory
    context:     copies and waits of context parallelism
    collectives: of tensor and expert parallelism that no computation hides
    """

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    context: float = 0.0
    collectives: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        return Seconds(*(a + times * b for a, b in zip(self, other, strict=True)))


class PassTimes(NamedTuple):
    """Times of one microbatch's forward, input gradient and weight gradient."""

    forward: Seconds = Seconds()
    input: Seconds = Seconds()
    weight: Seconds = Seconds()

    def plus(self, other: "PassTimes", times: float = 1.0) -> "PassTimes":
        return PassTimes(*(a.plus(b, times) for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Inputs that determine the work of a rank; `record` makes traces of context parallelism, see `attention`."""

    model: Transformer
    parallel: Parallel
    cluster: Cluster
    seq: int
    record: Record | None = None

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch in a tensor-parallel group."""
        return self.parallel.micro_batch * self.seq / self.parallel.cp

    @property
    def split_tokens(self) -> float:
        """Tokens of a microbatch that norms and residuals of one rank process."""
        return self.tokens / (self.parallel.tp if self.parallel.sp else 1)

    @property
    def routed(self) -> RoutedRows:
        """Rows of experts for each token of a rank in a mixture layer."""
        model = self.model
        if found := self.copied:
            return found.rows
        return routed(model.routing, self.split_tokens, model.top_k, model.experts, self.parallel.ep)

    @property
    def travelling(self) -> RoutedRows:
        """Rows that travel, for each token of a rank, with the share of them that stays where loads are even."""
        return found.travelling if (found := self.copied) else self.routed

    @property
    def copied(self) -> CopiedLoad | None:
        """A mixture layer's load where ranks host copies of experts, None elsewhere."""
        model, parallel = self.model, self.parallel
        if not model.experts or parallel.ep == 1 or not parallel.expert_copies.asked:
            return None
        rows = rows_of(model.routing, self.split_tokens, model.top_k, model.experts)
        size = SharedExperts(model.hidden, model.expert_ffn, model.matrices, parallel.ep)
        return copied(parallel.expert_copies, rows, self.split_tokens, size, parallel.micros)

    @property
    def dispatch(self) -> Dispatch:
        """How tokens travel to experts; where each rank has all of them, there are no pieces.

        Where a run chooses what ranks that share each expert gather, what takes less.
        """
        found = self.parallel.dispatch
        found = found if self.parallel.ep > 1 else found._replace(pieces=1)
        if found.gather != AUTO_GATHER:
            return found
        ways = [found._replace(gather=gather) for gather in (TOKENS, WEIGHTS)]
        return min(ways, key=lambda way: mixture_seconds(self.with_dispatch(way)))

    def with_dispatch(self, dispatch: Dispatch) -> "RankConfig":
        """Return the same rank with another way of tokens."""
        return replace(self, parallel=replace(self.parallel, dispatch=dispatch))

    @property
    def expert_ranks(self) -> ExpertRanks:
        """Ranks that hold one copy of all experts of a layer."""
        return ExpertRanks(self.parallel.ep, self.parallel.expert_tp)

    def dispatched(self, rows: float) -> DispatchSize:
        """Return the size of a mixture layer where each token of a rank makes so many rows of experts."""
        model = self.model
        return DispatchSize(
            self.split_tokens,
            self.split_tokens * rows,
            model.hidden * self.parallel.bytes,
            model.experts,
            model.matrices * model.hidden * model.expert_ffn * self.parallel.bytes,
            max(1, self.parallel.micros),
        )

    @property
    def dtype(self) -> str:
        """Dtype of stored tensors."""
        return "bfloat16" if self.parallel.precision == "fp8" else self.parallel.precision


class LayerKind(NamedTuple):
    """Layers that are alike, as if the model had no others.

    moe:   True for mixture layers
    share: of all layers
    """

    rank: RankConfig
    moe: bool
    share: float


def layer_kinds(rank: RankConfig) -> Iterator[LayerKind]:
    """Yield the dense layers, and the mixture layers with each number of experts."""
    model = rank.model
    if dense := 1 - model.moe_layers / model.layers:
        yield LayerKind(rank, False, dense)
    for experts, layers in model.mixtures.items():
        alike = replace(rank, model=replace(model, experts=experts, layer_experts=())) if model.layer_experts else rank
        yield LayerKind(alike, True, layers / model.layers)


def linears_of(rank: RankConfig, moe: bool) -> LayerLinears:
    """Return the linears of one layer that a scheme of tensor parallelism places; experts are none of them."""
    model = rank.model
    second = model.shared_expert_ffn if moe else model.ffn
    width = model.query + model.key_value
    return LayerLinears(rank.tokens, model.hidden, width, model.query, (model.matrices - 1) * second, second)


def placed(rank: RankConfig) -> RankConfig:
    """Return the rank with the scheme of tensor parallelism that `auto` chooses; others as they are.

    As in a run, linears of transformer-engine that overlap stay.
    """
    parallel = rank.parallel
    if parallel.tp_scheme != AUTO:
        return rank
    if parallel.tp == 1 or not parallel.sp or parallel.tp_overlap:
        return replace(rank, parallel=replace(parallel, tp_scheme=MEGATRONS))
    split = parallel.schedule is not None and SCHEDULES.get(parallel.schedule).split
    layer = linears_of(rank, moe=rank.model.moe_layers == rank.model.layers)
    chosen = cheapest(layer, parallel.tp, rank.cluster, rank.dtype, split=split, engine=parallel.tp_engine).placing
    grid = (chosen.size.tokens, chosen.size.weights) if chosen.scheme == "2d" else None
    return replace(rank, parallel=replace(parallel, tp_scheme=chosen.scheme, tp_grid=grid))


def product_seconds(rank: RankConfig, product: Product, dtype: str) -> float:
    """Return the seconds of a product in a dtype on the rank's cluster."""
    return product.seconds(rank.cluster, dtype, rank.parallel.bytes)


# shares of a layer's launch time in forward, input gradient and weight gradient
LAUNCHES = (0.4, 0.4, 0.2)


def layer(rank: RankConfig, moe: bool = False) -> PassTimes:
    """Return the times of one transformer layer."""
    launched = PassTimes(*(Seconds(memory=rank.cluster.layer_s * share) for share in LAUNCHES))
    work = _linears(rank, moe).plus(_attention(rank)).plus(_elementwise(rank, moe))
    return work.plus(_collectives(rank, moe)).plus(launched)


def ends(rank: RankConfig) -> tuple[PassTimes, PassTimes]:
    """Return the times of the first and the last stage beside their layers."""
    return _embedding(rank), _head(rank)


def _linears(rank: RankConfig, moe: bool) -> PassTimes:
    products = [*_of_attention(rank), *_of_mlp(rank, moe)]
    fp8 = rank.parallel.precision == "fp8"
    dtype = rank.parallel.precision
    forward = sum(product_seconds(rank, product, dtype) for product in products)
    # dY W^T and X^T dY have the same three dimensions in another order
    work = PassTimes(*(Seconds(products=forward),) * 3)
    if not fp8:
        return work
    # a cast reads two bytes and writes the value and its transpose in one byte each
    casts = [
        product.times * 4 * product.rows * width for product in products for width in (product.inner, product.columns)
    ]
    forward_cast, backward_cast = (sum(casts[at::2]) / rank.cluster.touch_bytes_per_s for at in (0, 1))
    return work.plus(PassTimes(Seconds(memory=forward_cast), Seconds(memory=backward_cast)))


def _of_attention(rank: RankConfig, up: bool = False) -> Iterator[Product]:
    """Yield the products of one layer's attention; with `up` those of MLA's up-projections alone."""
    t = rank.parallel.placing.size.tokens
    weights = rank.model.attention_weights
    if rank.parallel.latent:
        # the up-projection of keys and values is part of attention's loop
        del weights[-2]
    for weight in weights:
        inner = weight.inner / (t if weight.split == "inner" else 1)
        columns = weight.columns / (t if weight.split == "columns" else 1)
        if weight.up or not up:
            # a weight that each rank has whole sees the rank's own tokens
            whole = Product(rank.split_tokens, inner, columns)
            yield _placed(rank, inner, columns, row=weight.split == "inner") if weight.split else whole


def _placed(rank: RankConfig, inner: float, columns: float, *, row: bool) -> Product:
    """Return a product of the tokens that a rank's linears see, in as many pieces as its engine makes."""
    placing = rank.parallel.placing
    if placing.scheme == CUBE:
        return Product(rank.tokens, inner, columns)
    pieces, panels = placing.pieces, placing.panels
    inner, columns = (inner / panels, columns) if row else (inner, columns / panels)
    return Product(rank.tokens / placing.size.weights / pieces, inner, columns, pieces * panels)


def _of_mlp(rank: RankConfig, moe: bool, shared: bool = False) -> Iterator[Product]:
    """Yield the products of one layer's MLP; with `shared` those of its shared experts alone."""
    model, t, tokens = rank.model, rank.parallel.placing.size.tokens, rank.tokens
    first = model.matrices - 1
    if not moe:
        yield _placed(rank, model.hidden, first * model.ffn / t, row=False)
        yield _placed(rank, model.ffn / t, model.hidden, row=True)
        return
    if not shared:
        yield from _of_experts(rank)
        yield Product(tokens, model.hidden, model.experts)
    if model.shared_expert_ffn:
        yield _placed(rank, model.hidden, first * model.shared_expert_ffn / t, row=False)
        yield _placed(rank, model.shared_expert_ffn / t, model.hidden, row=True)


def _of_experts(rank: RankConfig) -> Iterator[Product]:
    """Yield the products of a rank's experts, each for every piece of the tokens or group of ranks."""
    model, way = rank.model, rank.dispatch
    pieces = calls_of(way, rank.expert_ranks, rank.cluster)
    etp = 1 if way.gather == WEIGHTS else rank.parallel.expert_tp
    local = model.experts / rank.parallel.ep + (rank.copied.hosts if rank.copied else 0)
    each = rank.tokens / rank.parallel.tp * etp * rank.routed.busiest / local / pieces
    yield Product(each, model.hidden, (model.matrices - 1) * model.expert_ffn / etp, local * pieces)
    yield Product(each, model.expert_ffn / etp, model.hidden, local * pieces)


MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
"""Modules that --recompute-modules names and that are modelled."""


def recomputed(rank: RankConfig, moe: bool) -> Seconds:
    """Return the seconds of a layer's forward that "selective" repeats in backward, core attention left out."""
    model, parallel = rank.model, rank.parallel
    modules = set(parallel.recomputed) if parallel.recompute == "selective" else set()
    products: list[Product] = []
    elements = 0.0
    if "mla_up_proj" in modules:
        products += _of_attention(rank, up=True)
    if "layernorm" in modules:
        # two norms are read and written
        elements += 4 * rank.split_tokens * model.hidden
    of_mlp = {"moe", "moe_act", "shared_experts"} if moe else {"mlp"}
    whole = parallel.recomputes_mlp(moe)
    if whole:
        products += _of_mlp(rank, moe)
    elif moe and "shared_experts" in modules:
        products += _of_mlp(rank, moe, shared=True)
    if whole or modules & of_mlp:
        width = mlp_width(rank, moe) - (rank.routed.busiest * model.hidden if moe else 0)
        elements += rank.tokens / parallel.tp * model.matrices * width
    exchange = _exchange(rank).forward if moe and "moe" in modules else 0.0
    passes = elements * parallel.bytes / (rank.cluster.elementwise_bytes_per_s or rank.cluster.touch_bytes_per_s)
    seconds = sum(product_seconds(rank, product, parallel.precision) for product in products)
    return Seconds(products=seconds, memory=passes, collectives=exchange)


def mlp_width(rank: RankConfig, moe: bool) -> float:
    """Return the width of what an MLP keeps for each token: of experts with the dispatched token itself."""
    model = rank.model
    if not moe:
        return model.ffn
    return rank.routed.busiest * (model.expert_ffn + model.hidden) + model.shared_expert_ffn


def _experts(rank: RankConfig) -> float:
    """Return the seconds of the products of a rank's experts in forward, or for input or weight gradients."""
    return sum(product_seconds(rank, product, rank.parallel.precision) for product in _of_experts(rank))


def _exchange(rank: RankConfig) -> PassSeconds:
    """Return the seconds in which tokens are sent to their experts and back, and none of these computes."""
    parallel, one = rank.parallel, _experts(rank)
    # where weight gradients wait in a queue, input gradients alone are beside the messages
    split = parallel.schedule is not None and SCHEDULES.get(parallel.schedule).split
    size = rank.dispatched(rank.travelling.busiest)
    return dispatch_seconds(
        rank.dispatch, size, rank.expert_ranks, rank.cluster, PassSeconds(one, one if split else 2 * one)
    )


def mixture_seconds(rank: RankConfig) -> float:
    """Return the seconds of a mixture layer's experts and of their tokens' ways for a microbatch, in both passes."""
    return 3 * _experts(rank) + _exchange(rank).total


def mtp(rank: RankConfig) -> PassTimes:
    """Return the times of a layer of multi-token prediction beside its transformer layer: a product and its loss."""
    joined = Product(rank.tokens, 2 * rank.model.hidden, rank.model.hidden / rank.parallel.tp)
    seconds = Seconds(products=product_seconds(rank, joined, rank.parallel.precision))
    return PassTimes(seconds, seconds, seconds).plus(_head(rank))


def context_attention(rank: RankConfig, windowed: bool = False) -> Attention:
    """Return the cost of one sequence's attention in one layer, as its share of a microbatch.

    windowed: True for a layer with the model's window
    """
    cluster = rank.cluster.every(rank.parallel.tp).shared_by(rank.parallel.micro_batch)
    return attention(problem_of(rank, windowed), cluster, rank.record)


def problem_of(rank: RankConfig, windowed: bool = False) -> Problem:
    """Return the attention of one sequence in one layer, with the heads of one tensor-parallel rank."""
    model, parallel = rank.model, rank.parallel
    heads, kv_heads = model.heads // parallel.tp, max(1, model.kv_heads // parallel.tp)
    return Problem(
        backend=parallel.backend,
        ranks=parallel.cp,
        seq=rank.seq,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=model.head_dim,
        dtype=rank.dtype,
        grid=parallel.grid,
        placement=parallel.placement,
        device=rank.cluster.device if parallel.fused_merge else "cpu",
        window=model.window if windowed else None,
        # every CUDA kernel that `auto` takes does
        windows=windowed and rank.cluster.device == "cuda",
        latent=(model.latent.kv_lora_rank, model.latent.qk_pos_emb_head_dim)
        if model.latent and parallel.latent
        else None,
    )


def _attention(rank: RankConfig) -> PassTimes:
    if not rank.parallel.flash:
        return _score_matrices(rank)
    share = rank.model.windowed / rank.model.layers
    forward, backward = Seconds(), Seconds()
    for windowed, part in ((False, 1 - share), (True, share)):
        if part:
            found = context_attention(rank, windowed)
            forward, backward = forward.plus(_of(found.forward), part), backward.plus(_of(found.backward), part)
    if rank.parallel.recompute == "selective" and rank.parallel.attends_again:
        backward = backward.plus(forward)
    b = rank.parallel.micro_batch
    return PassTimes(Seconds().plus(forward, b), Seconds().plus(backward, b))


def _of(cost: Cost) -> Seconds:
    return Seconds(attention=cost.kernels, context=cost.copies + cost.idle)


def _score_matrices(rank: RankConfig) -> PassTimes:
    """Return the times of attention that writes all scores and masks them afterwards (arXiv:2205.05198, 4.1)."""
    model, parallel = rank.model, rank.parallel
    matrices = parallel.micro_batch * model.heads / parallel.tp
    product = Product(rank.seq, model.head_dim, rank.seq, 1.0)
    seconds = matrices * (product_seconds(rank, product, rank.dtype) - rank.cluster.call_s) + rank.cluster.call_s
    scores = matrices * rank.seq**2 / (rank.cluster.elementwise_bytes_per_s or rank.cluster.touch_bytes_per_s)
    # bytes per score; forward: softmax reads and writes, dropout reads, writes and keeps a mask of one byte
    forward = Seconds(attention=2 * seconds, memory=(4 + 5) * scores)
    backward = Seconds(attention=4 * seconds, memory=(6 + 5) * scores)
    return PassTimes(forward, backward.plus(forward) if parallel.recompute == "selective" else backward)


# elements read and written per token: times the hidden size, the width of queries, keys and values, and the MLP's
FUSED = ((10, 2, 3), (12, 2, 5))


def _elementwise(rank: RankConfig, moe: bool) -> PassTimes:
    """Return the times of norms, residuals, rotary positions and the activation."""
    model, parallel, cluster = rank.model, rank.parallel, rank.cluster
    touch = cluster.touch_bytes_per_s
    width = model.query + model.key_value
    mlp = rank.routed.busiest * model.expert_ffn + model.shared_expert_ffn if moe else model.ffn
    gate = model.matrices - 1
    passes = []
    for hidden, rotary, activation in FUSED:
        elements = rank.split_tokens * hidden * model.hidden
        elements += rank.tokens / parallel.tp * (rotary * width + (activation if gate == 2 else activation - 1) * mlp)
        # dispatched to experts and combined: each copy of a token is read and written twice
        elements += rank.split_tokens * 4 * rank.routed.mean * model.hidden if moe else 0
        passes.append(Seconds(memory=elements * parallel.bytes / (cluster.elementwise_bytes_per_s or touch)))
    return PassTimes(*passes)


def _collectives(rank: RankConfig, moe: bool) -> PassTimes:
    parallel = rank.parallel
    gather, scatter, reduce = hidden_state_seconds(rank)
    forward = backward = 2 * reduce
    if parallel.sp:
        pieces = parallel.tp if parallel.tp_overlap else 1
        forward = 2 * (gather + scatter) / pieces
        backward = 2 * gather / pieces + 2 * _behind_products(rank, gather + scatter)
    weight = 0.0
    if parallel.tp_scheme != MEGATRONS:
        split = parallel.schedule is not None and SCHEDULES.get(parallel.schedule).split
        layer = linears_of(rank, moe)
        _, forward, backward, weight = linear_times(layer, parallel.placing, rank.cluster, rank.dtype, split=split)
    if moe:
        exchange = _exchange(rank)
        forward, backward = forward + exchange.forward, backward + exchange.backward
    return PassTimes(Seconds(collectives=forward), Seconds(collectives=backward), Seconds(collectives=weight))


def hidden_state_seconds(rank: RankConfig) -> tuple[float, float, float]:
    """Return the seconds of an all-gather, a reduce-scatter and an all-reduce of a microbatch's hidden states."""
    size = rank.tokens * rank.model.hidden * rank.parallel.bytes
    gather, scatter, reduce = (
        collective_seconds(rank.cluster, kind, size, rank.parallel.tp, 1) for kind in ("gather", "scatter", "reduce")
    )
    return gather, scatter, reduce


def _behind_products(rank: RankConfig, seconds: float) -> float:
    """Return the exposed part of collectives that run beside products: all where the computing rank moves the bytes."""
    return seconds if rank.cluster.inside.busy_s_per_byte else 0.0


def _embedding(rank: RankConfig) -> PassTimes:
    """Return the times of the embedding: rows are read and written, and added up in backward."""
    size = rank.tokens * rank.model.hidden * rank.parallel.bytes / rank.cluster.touch_bytes_per_s
    gather, scatter, reduce = hidden_state_seconds(rank)
    forward, backward = (scatter, gather) if rank.parallel.sp else (reduce, 0.0)
    return PassTimes(
        Seconds(memory=2 * size, collectives=forward), Seconds(), Seconds(memory=3 * size, collectives=backward)
    )


LOSS_BYTES = 26
"""Bytes read and written per logit of a loss: cast to float32, maximum, difference, exponential, sum."""


def _head(rank: RankConfig) -> PassTimes:
    """Return the times of the output layer and its cross entropy in float32 (vocabulary-parallel, arXiv:1909.08053)."""
    columns, pieces = rank.model.vocab / rank.parallel.tp, rank.parallel.placing.output_pieces
    product = Product(rank.tokens / pieces, rank.model.hidden, columns, pieces)
    seconds = Seconds(products=product_seconds(rank, product, rank.dtype))
    logits = rank.tokens * columns / (rank.cluster.loss_bytes_per_s or rank.cluster.touch_bytes_per_s)
    gather, scatter, reduce = hidden_state_seconds(rank)
    forward, backward, late = (0.0, reduce, 0.0)
    if rank.parallel.sp:
        forward, backward = gather, _behind_products(rank, gather + scatter)
    if pieces > 1:
        share = 1 if rank.cluster.inside.busy_s_per_byte else 1 / pieces
        forward, backward, late = gather * share, scatter * share, gather * share
    # backward, bytes per logit: gradient in place, cast back
    loss = Seconds(memory=LOSS_BYTES * logits, collectives=forward)
    gradient = Seconds(memory=14 * logits, collectives=backward)
    whole = PassTimes(seconds.plus(loss), seconds.plus(gradient), seconds.plus(Seconds(collectives=late)))
    if not rank.parallel.loss_chunks:
        return whole
    # each chunk is computed again, with its exchanges, and no weight gradient waits
    return PassTimes(whole.forward, whole.input.plus(whole.weight).plus(whole.forward), Seconds())
