"""Describe a transformer for the planner: sizes, parameters, and Megatron's count of floating-point operations."""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.experts import MEGATRONS, ROUTERS
from megatron_cp.experts.pyramid import experts_of_layers
from megatron_cp.experts.routed import EVEN, Routing
from megatron_cp.recipe.recipe import Recipe
from megatron_cp.units import is_whole


class Weight(NamedTuple):
    """One weight matrix of attention, inner x columns.

    split: dimension that tensor parallelism splits, "inner" or "columns"; None for a matrix that each rank has whole
    up:    True if it is one of MLA's up-projections
    """

    inner: int
    columns: int
    split: str | None
    up: bool = False


class Latent(NamedTuple):
    """Sizes of multi-latent attention (arXiv:2405.04434, 2.1), as Megatron names them; no q_lora_rank is 0."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int

    @property
    def mean_head_dim(self) -> int:
        """Mean over keys and values, which are of unequal width."""
        return (self.qk_head_dim + self.qk_pos_emb_head_dim + self.v_head_dim) // 2

    def weights(self, hidden: int, heads: int) -> list[Weight]:
        """Return the weights of one layer's attention."""
        queries, values = heads * (self.qk_head_dim + self.qk_pos_emb_head_dim), heads * self.v_head_dim
        down = [Weight(hidden, self.q_lora_rank, None)] if self.q_lora_rank else []
        down.append(Weight(hidden, self.kv_lora_rank + self.qk_pos_emb_head_dim, None))
        up = [
            Weight(self.q_lora_rank or hidden, queries, "columns", bool(self.q_lora_rank)),
            Weight(self.kv_lora_rank, heads * self.qk_head_dim + values, "columns", True),
        ]
        return [*down, *up, Weight(values, hidden, "inner")]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a GPT model under Megatron's names, without biases.

    vocab:    padded
    ffn:      width of a dense MLP
    gated:    the MLP has a gate beside its first product (SwiGLU)
    tied:     the output layer uses the embedding's weights
    experts:  number in a mixture layer, each `expert_ffn` wide; a token is routed to `top_k` of them; 0 without mixture
    layer_experts: number in each layer, where they differ; of dense layers it is not read
    routing:  what the router drops, and how it loads experts
    moe_every: one layer of so many is a mixture, beginning with the first
    moe_pattern: for each layer, 1 where it is a mixture; it wins over `moe_every`
    window:   (left, right) keys that queries of `windowed` layers see beside their own; None for no window
    latent:   sizes of multi-latent attention, whose heads are then `latent.mean_head_dim` wide
    mtp:      layers of multi-token prediction after the last one, with a product 2 hidden wide and a loss each
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_expert_ffn: int = 0
    moe_every: int = 1
    moe_pattern: tuple[int, ...] = ()
    layer_experts: tuple[int, ...] = ()
    routing: Routing = EVEN
    window: tuple[int | None, int | None] | None = None
    windowed: int = 0
    latent: Latent | None = None
    mtp: int = 0

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all key heads and value heads together."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention."""
        norms = self.latent.q_lora_rank + self.latent.kv_lora_rank if self.latent else 0
        return norms + sum(weight.inner * weight.columns for weight in self.attention_weights)

    @property
    def attention_weights(self) -> list[Weight]:
        """Weight matrices of one layer's attention, in the order of their products."""
        if self.latent:
            return self.latent.weights(self.hidden, self.heads)
        return [
            Weight(self.hidden, self.query + self.key_value, "columns"),
            Weight(self.query, self.hidden, "inner"),
        ]

    @property
    def mtp_parameters(self) -> int:
        """Parameters of one layer of multi-token prediction beside its transformer layer: a product and three norms."""
        return 2 * self.hidden**2 + 3 * self.hidden

    @property
    def matrices(self) -> int:
        """Weight matrices of hidden x width in one MLP."""
        return 3 if self.gated else 2

    @property
    def moe_layers(self) -> int:
        if self.moe_pattern:
            return sum(self.moe_pattern)
        return -(-self.layers // self.moe_every) if self.experts else 0

    @property
    def mixtures(self) -> Counter[int]:
        """Number of mixture layers with each number of experts."""
        if not self.layer_experts:
            return Counter({self.experts: self.moe_layers} if self.moe_layers else {})
        pattern = self.moe_pattern or [int(at % self.moe_every == 0) for at in range(self.layers)]
        return Counter(
            experts for experts, mixture in zip(self.layer_experts, pattern, strict=True) if mixture and self.experts
        )

    @property
    def expert_parameters(self) -> int:
        """Parameters of all layers that expert parallelism shards."""
        return self._experts_of_all_layers * self.matrices * self.hidden * self.expert_ffn

    @property
    def dense_parameters(self) -> int:
        """Parameters of all layers that expert parallelism replicates: attention, norms, routers, dense MLPs."""
        mlp = self.matrices * self.hidden * self.ffn * (self.layers - self.moe_layers)
        shared = self.moe_layers * self.matrices * self.hidden * self.shared_expert_ffn
        routers = self._experts_of_all_layers * self.hidden
        return self.layers * (self.attention_parameters + 2 * self.hidden) + mlp + shared + routers

    @property
    def _experts_of_all_layers(self) -> int:
        return sum(experts * layers for experts, layers in self.mixtures.items())

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        layers = self.dense_parameters + self.expert_parameters
        mtp = self.mtp * (layers // self.layers + self.mtp_parameters)
        return layers + embeddings + self.hidden + mtp

    def flops(self, seq: int, samples: int, causal: Fraction = Fraction(1, 2)) -> float:
        """Return the operations of one step as Megatron's --log-throughput counts them, without recomputation.

        causal: share of the query-key pairs that is counted; half in Megatron, often all in papers before 2025
        """
        mlps = self.ffn * (self.layers - self.moe_layers)
        mlps += self.moe_layers * (self.top_k * self.expert_ffn + self.shared_expert_ffn)
        layers = self.layers * self.attention_parameters + self.hidden * self.matrices * mlps
        # those of multi-token prediction are taken as the mean of the others
        per_token = layers * (1 + self.mtp / self.layers)
        per_token += self.mtp * 2 * self.hidden**2 + (1 + self.mtp) * self.hidden * self.vocab
        pairs = 2 * (self.layers + self.mtp) * self.query * seq * float(causal)
        return 6.0 * samples * seq * (per_token + pairs)


def model_of(recipe: Recipe) -> Transformer:
    """Return the model of a recipe's MODEL_ARGS; raises ValueError with a flag that is missing or not a number."""
    hidden, heads = recipe.required("--hidden-size"), recipe.required("--num-attention-heads")
    swiglu = "--swiglu" in recipe.model_args
    ffn = recipe.number("--ffn-hidden-size", _usual_ffn(hidden, swiglu))
    experts = recipe.number("--num-experts", 0)
    grouped = "--group-query-attention" in recipe.model_args
    latent, layers = _latent(recipe), recipe.required("--num-layers")
    window = _window(recipe)
    every = recipe.flag("--moe-layer-freq", "1")
    return Transformer(
        name=recipe.name,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=recipe.number("--num-query-groups", 1) if grouped and not latent else heads,
        head_dim=latent.mean_head_dim if latent else recipe.number("--kv-channels", hidden // heads),
        vocab=_padded_vocab(recipe),
        gated=swiglu or "--quick-geglu" in recipe.model_args,
        tied="--untie-embeddings-and-output-weights" not in recipe.model_args,
        experts=experts,
        top_k=recipe.number("--moe-router-topk", 2) if experts else 0,
        expert_ffn=recipe.number("--moe-ffn-hidden-size", ffn) if experts else 0,
        shared_expert_ffn=recipe.number("--moe-shared-expert-intermediate-size", 0),
        moe_every=recipe.number("--moe-layer-freq", 1) if is_whole(every) else 1,
        moe_pattern=() if is_whole(every) or not experts else _pattern(recipe, "--moe-layer-freq", layers),
        layer_experts=_layer_experts(recipe, experts, layers),
        routing=_routing(recipe) if experts else EVEN,
        window=window,
        windowed=_windowed(recipe, layers) if window else 0,
        latent=latent,
        mtp=_count(recipe, "--mtp-num-layers"),
    )


def _count(recipe: Recipe, flag: str) -> int:
    """Return a number that may be 0."""
    return 0 if recipe.flag(flag, "0") == "0" else recipe.number(flag, 0)


def _layer_experts(recipe: Recipe, experts: int, layers: int) -> tuple[int, ...]:
    """Return the experts of each layer where --moe-layer-experts says them."""
    text = recipe.flag("--moe-layer-experts", "")
    return tuple(experts_of_layers(text, experts, layers)) if text and experts else ()


def _routing(recipe: Recipe) -> Routing:
    """Return how the router deals out tokens; Megatron's own has no groups, and no capacity for a factor below 0."""
    text = recipe.flag("--moe-expert-capacity-factor", "")
    if text and not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
        place = recipe.model_args["--moe-expert-capacity-factor"].place
        raise Refused(f"{place}: --moe-expert-capacity-factor takes a number such as 1.25, got {text!r}")
    factor = float(text) if text and float(text) > 0 else None
    ours = ROUTERS.get(recipe.flag("--moe-router", MEGATRONS)).choices is not None
    return Routing(
        factor=factor,
        group=recipe.number("--moe-group-tokens", 0) or None if ours else None,
        padded=factor is not None and "--moe-pad-expert-input-to-capacity" in recipe.model_args,
    )


def _latent(recipe: Recipe) -> Latent | None:
    if "--multi-latent-attention" not in recipe.model_args:
        return None
    return Latent(
        q_lora_rank=_count(recipe, "--q-lora-rank"),
        kv_lora_rank=recipe.number("--kv-lora-rank", 32),
        qk_head_dim=recipe.number("--qk-head-dim", 128),
        qk_pos_emb_head_dim=recipe.number("--qk-pos-emb-head-dim", 64),
        v_head_dim=recipe.number("--v-head-dim", 128),
    )


def _window(recipe: Recipe) -> tuple[int | None, int | None] | None:
    text = recipe.flag("--window-size", "")
    if not text:
        return None
    sides = text.strip("() ").replace(" ", "").split(",")
    if len(sides) != 2 or not all(re.fullmatch(r"-1|\d+", side) for side in sides):
        place = recipe.model_args["--window-size"].place
        raise Refused(f"{place}: --window-size takes two ints such as 127,0, got {text!r}")
    left, right = (None if side == "-1" else int(side) for side in sides)
    return left, right


def _windowed(recipe: Recipe, layers: int) -> int:
    """Return the number of layers with a window: all, all but each n-th, or those of a pattern."""
    every = recipe.flag("--window-attn-skip-freq", "")
    if not every:
        return layers
    if is_whole(every):
        return layers - layers // recipe.number("--window-attn-skip-freq", 1)
    return sum(_pattern(recipe, "--window-attn-skip-freq", layers))


def _pattern(recipe: Recipe, flag: str, layers: int) -> tuple[int, ...]:
    """Return a flag's list of a 0 or 1 for each layer, written as in ([0]*3+[1]*45)."""
    text, place = recipe.model_args[flag].text, recipe.model_args[flag].place
    terms = re.sub(r"[\s()]", "", text).split("+")
    parsed = [re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", term) for term in terms]
    found = [int(one) for term in parsed if term for one in term[1].split(",") * int(term[2] or 1)]
    if not all(parsed) or len(found) != layers:
        raise Refused(
            f"{place}: {flag} takes a number, or lists such as [0]*3+[1]*{max(1, layers - 3)} for {layers} layers, got "
            f"{text!r}"
        )
    return tuple(found)


def _usual_ffn(hidden: int, gated: bool) -> int:
    """Return Megatron's default of --ffn-hidden-size."""
    return int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden


def _padded_vocab(recipe: Recipe) -> int:
    multiple = recipe.number("--make-vocab-size-divisible-by", 128)
    multiple *= recipe.number("--tensor-model-parallel-size", 1)
    return -(-recipe.required("--vocab-size") // multiple) * multiple
