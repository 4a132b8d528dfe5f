"""A transformer as the planner sees it: its sizes, parameters, and Megatron's count of floating-point operations."""

from dataclasses import dataclass
from fractions import Fraction

from megatron_cp.recipe.recipe import Recipe


@dataclass(frozen=True)
class Transformer:
    """Sizes of a GPT model under Megatron's names, without biases.

    vocab:    padded
    ffn:      width of a dense MLP
    gated:    whether the MLP has a gate beside its first product (SwiGLU)
    tied:     whether the output layer uses the embedding's weights
    experts:  of a mixture layer; 0 for dense ones, `expert_ffn` wide, of which a token takes `top_k`
    moe_every: every so many layers is a mixture, the first one too
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
        """Of one layer."""
        return self.hidden * (2 * self.query + self.key_value)

    @property
    def matrices(self) -> int:
        """Of one MLP, counted in hidden x width."""
        return 3 if self.gated else 2

    @property
    def moe_layers(self) -> int:
        return -(-self.layers // self.moe_every) if self.experts else 0

    @property
    def expert_parameters(self) -> int:
        """Of all layers, what expert parallelism shards."""
        return self.moe_layers * self.experts * self.matrices * self.hidden * self.expert_ffn

    @property
    def dense_parameters(self) -> int:
        """Of all layers, what every rank of an expert-parallel group holds: attention, norms, routers, dense MLPs."""
        mlp = self.matrices * self.hidden * self.ffn * (self.layers - self.moe_layers)
        shared = self.matrices * self.hidden * self.shared_expert_ffn + self.experts * self.hidden
        return self.layers * (self.attention_parameters + 2 * self.hidden) + mlp + self.moe_layers * shared

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.dense_parameters + self.expert_parameters + embeddings + self.hidden

    def flops(self, seq: int, samples: int, causal: Fraction = Fraction(1, 2)) -> float:
        """Operations of one step as Megatron's --log-throughput counts them, forward and backward, no recomputation.

        causal: the share of the query-key pairs that counts; Megatron counts half, papers before 2025 often all
        """
        mlps = self.ffn * (self.layers - self.moe_layers)
        mlps += self.moe_layers * (self.top_k * self.expert_ffn + self.shared_expert_ffn)
        per_token = self.layers * self.attention_parameters + self.hidden * (self.matrices * mlps + self.vocab)
        pairs = 2 * self.layers * self.query * seq * float(causal)
        return 6.0 * samples * seq * (per_token + pairs)


def model_of(recipe: Recipe) -> Transformer:
    """The model of a recipe's MODEL_ARGS; raises ValueError with the flag that is missing or is no number."""
    hidden, heads = recipe.required("--hidden-size"), recipe.required("--num-attention-heads")
    gated = "--swiglu" in recipe.model_args
    ffn = recipe.number("--ffn-hidden-size", _usual_ffn(hidden, gated))
    experts = recipe.number("--num-experts", 0)
    grouped = "--group-query-attention" in recipe.model_args
    return Transformer(
        recipe.name,
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
    """What Megatron takes where --ffn-hidden-size is left out."""
    return int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden


def _padded_vocab(recipe: Recipe) -> int:
    multiple = recipe.number("--make-vocab-size-divisible-by", 128)
    multiple *= recipe.number("--tensor-model-parallel-size", 1)
    return -(-recipe.required("--vocab-size") // multiple) * multiple
