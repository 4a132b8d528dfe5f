"""Describe a transformer for the planner: sizes, parameters, and Megatron's count of floating-point operations."""

from dataclasses import dataclass
from fractions import Fraction

from megatron_cp.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a GPT model under Megatron's names, without biases.

    vocab:    padded
    ffn:      width of a dense MLP
    gated:    the MLP has a gate beside its first product (SwiGLU)
    tied:     the output layer uses the embedding's weights
    experts:  number in a mixture layer, each `expert_ffn` wide; a token is routed to `top_k` of them; 0 without mixture
    moe_every: one layer of so many is a mixture, beginning with the first
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
        return self.hidden * (2 * self.query + self.key_value)

    @property
    def matrices(self) -> int:
        """Weight matrices of hidden x width in one MLP."""
        return 3 if self.gated else 2

    @property
    def moe_layers(self) -> int:
        return -(-self.layers // self.moe_every) if self.experts else 0

    @property
    def expert_parameters(self) -> int:
        """Parameters of all layers that expert parallelism shards."""
        return self.moe_layers * self.experts * self.matrices * self.hidden * self.expert_ffn

    @property
    def dense_parameters(self) -> int:
        """Parameters of all layers that expert parallelism replicates: attention, norms, routers, dense MLPs."""
        mlp = self.matrices * self.hidden * self.ffn * (self.layers - self.moe_layers)
        shared = self.matrices * self.hidden * self.shared_expert_ffn + self.experts * self.hidden
        return self.layers * (self.attention_parameters + 2 * self.hidden) + mlp + self.moe_layers * shared

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.dense_parameters + self.expert_parameters + embeddings + self.hidden

    def flops(self, seq: int, samples: int, causal: Fraction = Fraction(1, 2)) -> float:
        """Return the operations of one step as Megatron's --log-throughput counts them, without recomputation.

        causal: share of the query-key pairs that is counted; half in Megatron, often all in papers before 2025
        """
        mlps = self.ffn * (self.layers - self.moe_layers)
        mlps += self.moe_layers * (self.top_k * self.expert_ffn + self.shared_expert_ffn)
        per_token = self.layers * self.attention_parameters + self.hidden * (self.matrices * mlps + self.vocab)
        pairs = 2 * self.layers * self.query * seq * float(causal)
        return 6.0 * samples * seq * (per_token + pairs)


def model_of(recipe: Recipe) -> Transformer:
    """Return the model of a recipe's MODEL_ARGS; raises ValueError with a flag that is missing or not a number."""
    hidden, heads = recipe.required("--hidden-size"), recipe.required("--num-attention-heads")
    gated = "--swiglu" in recipe.model_args
    ffn = recipe.number("--ffn-hidden-size", _usual_ffn(hidden, gated))
    experts = recipe.number("--num-experts", 0)
    grouped = "--group-query-attention" in recipe.model_args
    return Transformer(
        name=recipe.name,
        layers=recipe.required("--num-layers"),
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=recipe.number("--num-query-groups", 1) if grouped else heads,
        head_dim=recipe.number("--kv-channels", hidden // heads),
        vocab=_padded_vocab(recipe),
        gated=gated,
        tied="--untie-embeddings-and-output-weights" not in recipe.model_args,
        experts=experts,
        top_k=recipe.number("--moe-router-topk", 2) if experts else 0,
        expert_ffn=recipe.number("--moe-ffn-hidden-size", ffn) if experts else 0,
        shared_expert_ffn=recipe.number("--moe-shared-expert-intermediate-size", 0),
        moe_every=recipe.number("--moe-layer-freq", 1),
    )


def _usual_ffn(hidden: int, gated: bool) -> int:
    """Return Megatron's default of --ffn-hidden-size."""
    return int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden


def _padded_vocab(recipe: Recipe) -> int:
    multiple = recipe.number("--make-vocab-size-divisible-by", 128)
    multiple *= recipe.number("--tensor-model-parallel-size", 1)
    return -(-recipe.required("--vocab-size") // multiple) * multiple
