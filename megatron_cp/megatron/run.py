"""The run that this process is part of: its command line, its settings and its own log lines.

`Settings` is all that our layers and schedules read of Megatron's parsed arguments. A flag of ours is one field of
AttentionFlags or PipelineFlags: the parser, the search for it on a command line, the copy on a model's config and
everything that reads it follow from that field.
"""

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

from megatron_cp import config
from megatron_cp.batches import ALGORITHMS
from megatron_cp.context import BACKENDS, Backend
from megatron_cp.context import PLACEMENTS as AXES_OF_HEADS
from megatron_cp.context.checks import able, takes_document_layout
from megatron_cp.context.document_layouts import NAMES as DOCUMENT_LAYOUTS
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.layouts import STRIPED
from megatron_cp.errors import Refused
from megatron_cp.experts import AUTO as AUTO_PRODUCT
from megatron_cp.experts import DEEPSPEED_MOE, EXCHANGES, PRODUCTS, ROUTERS, TWO_HOP, ExpertExchange
from megatron_cp.experts import MEGATRONS as MEGATRONS_EXCHANGE
from megatron_cp.experts import NONE as NO_PLACEMENT
from megatron_cp.experts import PLACEMENTS as EXPERT_PLACEMENTS
from megatron_cp.hardware.cluster_file import shipped_clusters
from megatron_cp.kernels import AUTO, KERNELS
from megatron_cp.pipeline import SCHEDULES, TABLE_FILE, on_v
from megatron_cp.pipeline.costs_file import Model
from megatron_cp.pipeline.offload import AUTO as LIMIT_FROM_MEMORY
from megatron_cp.pipeline.offload import Offload, limit_of
from megatron_cp.pipeline.placement import ONE_PIPE
from megatron_cp.pipeline.schedule import HOST, MOVE_TARGETS, PEER
from megatron_cp.pipeline.slices import model_lengths
from megatron_cp.replicas import AVERAGE, OUTERS, QUANTISATIONS, OuterOptimizer, Quantisation
from megatron_cp.tensor import DEFAULT_ENGINE, ENGINES, GEMMS, MEGATRONS, SCHEMES, TORCH

HEAD_FIRST = "head-first"


def on_stripes(entry: Backend) -> bool:
    """True if this algorithm works on stripes."""
    return entry.layout == STRIPED


def takes_placement(entry: Backend) -> bool:
    """True if --cp-placement chooses the axis on which this algorithm exchanges heads."""
    return entry.capabilities.placement


class Flag(NamedTuple):
    """A field's part of --help and the type of its value; the text is made only when help is asked for.

    A flag of type bool takes no value.
    """

    metavar: Callable[[], str]
    help: Callable[[], str]
    type: Callable[[str], Any]
    nargs: str | None = None


def _flag(
    default: Any,
    metavar: Callable[[], str],
    help: Callable[[], str],
    type: Callable[[str], Any] = str,
    nargs: str | None = None,
) -> Any:
    return field(default=default, metadata={"flag": Flag(metavar, help, type, nargs)})


def _one_of(*names: str) -> str:
    return "{" + ",".join(names) + "}"


class _Flags:
    """Flags with a common prefix: the field `memory_limit` of prefix `pp` is --pp-memory-limit and pp_memory_limit."""

    prefix: ClassVar[str]
    title: ClassVar[str]

    @classmethod
    def attributes(cls) -> dict[str, str]:
        """Return for each field the name that parsed arguments and configs have it under."""
        return {each.name: f"{cls.prefix}_{each.name}" for each in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def names(cls) -> list[str]:
        """Return the flags as they are written on a command line."""
        return ["--" + attribute.replace("_", "-") for attribute in cls.attributes().values()]

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add the flags to Megatron's parser, in a group of their own."""
        group = parser.add_argument_group(title=cls.title)
        for name, each in zip(cls.names(), fields(cls), strict=True):  # type: ignore[arg-type]
            flag: Flag = each.metadata["flag"]
            if flag.type is bool:
                group.add_argument(name, action="store_true", help=flag.help())
                continue
            group.add_argument(
                name,
                default=each.default,
                metavar=flag.metavar(),
                help=flag.help(),
                type=flag.type,
                nargs=flag.nargs,
            )

    @classmethod
    def of(cls, source: Any) -> Self:
        """Read the flags off parsed arguments or a config; what it does not have keeps its default."""
        present = {name: attr for name, attr in cls.attributes().items() if hasattr(source, attr)}
        return cls(**{name: getattr(source, attribute) for name, attribute in present.items()})

    def copy_to(self, target: Any) -> None:
        """Set the attributes of a config, which travel with every copy of it."""
        for name, attribute in self.attributes().items():
            setattr(target, attribute, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class AttentionFlags(_Flags):
    """Flags of context-parallel attention, beside Megatron's own --cp-comm-type, which chooses the algorithm."""

    prefix = "cp"
    title = "context-parallel attention (megatron-cp)"

    kernel: str = _flag(
        AUTO,
        lambda: _one_of(AUTO, *KERNELS.names),
        lambda: (
            "Attention kernel on one device; auto takes the fastest one that the machine has and says why. "
            "The algorithm between the ranks is chosen with --cp-comm-type: "
            + ", ".join("=".join([entry.name, *entry.aliases]) for entry in BACKENDS)
            + "."
        ),
    )
    placement: str = _flag(
        HEAD_FIRST,
        lambda: _one_of(*AXES_OF_HEADS),
        lambda: (
            f"With --cp-comm-type {able(takes_placement, str)}, which of the two "
            "--hierarchical-context-parallel-sizes exchanges heads: head-first the first (neighbouring ranks), "
            "context-first the second."
        ),
    )
    stripe: int = _flag(
        1,
        lambda: "TOKENS",
        lambda: (
            f"With --cp-comm-type {able(on_stripes, str)}, tokens in a block that one rank owns; longer blocks make "
            "larger tiles and a coarser balance."
        ),
        int,
    )
    chunks: int | None = _flag(
        None,
        lambda: "PIECES",
        lambda: (
            "Cut attention into so many pieces over time, with what waits in host memory (FPDT). Takes every "
            f"--cp-comm-type but {', '.join(entry.name for entry in BACKENDS if not entry.capabilities.chunks)}."
        ),
        int,
    )
    cluster: str | None = _flag(
        None,
        lambda: "NAME|FILE",
        lambda: (
            "With --cp-comm-type auto, --tp-comm-type auto or --moe-comm-type tutel, the cluster that is chosen for: "
            + ", ".join(shipped_clusters())
            + ", or a YAML file; by default the one that ships for this machine's GPU."
        ),
    )
    softcap: float | None = _flag(
        None,
        lambda: "SCORE",
        lambda: (
            "Cap attention scores: SCORE * tanh(score / SCORE) takes the place of each. By --cp-kernel "
            + ", ".join(entry.name for entry in KERNELS if entry.caps)
            + "."
        ),
        float,
    )
    sink: float | None = _flag(
        None,
        lambda: "LOGIT",
        lambda: (
            "A fixed attention sink: one more logit in every softmax, which takes a share of the weights and has no "
            "value. A learned one of each head is --softmax-type learnable, one of 0 is --softmax-type off-by-one."
        ),
        float,
    )
    alibi: bool = _flag(
        False,
        lambda: "",
        lambda: (
            "ALiBi: each score falls with the distance of its key, by a slope of the query head. For models that are "
            "trained with --position-embedding-type none."
        ),
        bool,
    )
    keep_attention: bool = _flag(
        False,
        lambda: "",
        lambda: (
            "With --recompute-granularity, keep output and row statistics of attention, so that its forward and its "
            "communication are not repeated; full recomputation takes that much more memory, which estimate counts."
        ),
        bool,
    )
    loss_chunks: int | None = _flag(
        None,
        lambda: "N",
        lambda: (
            "Compute output layer and loss in N chunks of a rank's tokens, one after the other, and again in the "
            "backward pass, so that the logits of one chunk alone are in memory (FPDT, ALST). "
            "--mlp-chunks-for-training does so with dense MLPs."
        ),
        int,
    )
    latent: bool = _flag(
        False,
        lambda: "",
        lambda: (
            "With --multi-latent-attention, send the compressed latent of a token in place of the keys and values of "
            "all heads, and expand it on the rank that attends to it. Takes --cp-comm-type "
            f"{able(lambda entry: entry.capabilities.latent, str)}, between local linears."
        ),
        bool,
    )
    self_check: bool = _flag(
        False,
        lambda: "",
        lambda: (
            "At the start, compare each attention of the model with dense attention on a small batch, forward and "
            "backward, by the kernel and on the devices of the run; end it where they differ by more than rounding."
        ),
        bool,
    )
    document_layout: str = _flag(
        STREAM,
        lambda: _one_of(*DOCUMENT_LAYOUTS),
        lambda: (
            "With --dataloader-inter-document-masking or --sft, the tokens of each context-parallel rank: stream as "
            "Megatron cuts them, document zigzag over each document, blocks of equal work, auto for each microbatch "
            "stream or blocks, whichever is faster by prediction. Takes --cp-comm-type "
            f"{', '.join(entry.name for entry in BACKENDS if takes_document_layout(entry))}; all-gather sends least."
        ),
    )

    plan: str | None = _flag(
        None,
        lambda: _one_of(*ALGORITHMS.names),
        lambda: (
            "Divide the data-parallel ranks into groups anew for every microbatch, each with a context-parallel size "
            "of its own, by the lengths of the documents: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in ALGORITHMS)
            + ". --global-batch-size counts documents. In megatron_cp.pretrain_gpt."
        ),
    )
    tokens_per_rank: int | None = _flag(
        None,
        lambda: "TOKENS",
        lambda: (
            "With --cp-plan, most tokens of a rank in a microbatch, before pads; by default what memory holds by the "
            "estimate."
        ),
        int,
    )


@dataclass(frozen=True, kw_only=True)
class PipelineFlags(_Flags):
    """Flags of pipeline schedules; without a schedule everything is left to Megatron."""

    prefix = "pp"
    title = "pipeline schedules (megatron-cp)"

    schedule: str | None = _flag(
        None,
        lambda: _one_of(*SCHEDULES.names),
        lambda: (
            "Order of forwards and backwards over the pipeline, instead of Megatron's own: "
            + "; ".join(f"{rule.name}: {rule.what}" for rule in SCHEDULES)
            + f"; {TABLE_FILE}FILE: a table of your own, as simulate --table takes it. "
            "Chunks per rank come from --num-virtual-stages-per-pipeline-rank and its kin."
        ),
    )
    placement: str | None = _flag(
        None,
        lambda: _one_of(*ONE_PIPE),
        lambda: (
            "With --pp-schedule auto, whether stages go around the ranks, which is the default, or down and up again."
        ),
    )
    costs: str | None = _flag(
        None,
        lambda: "FILE",
        lambda: (
            "With --pp-schedule auto, the times and activations of every stage that it schedules for: YAML or JSON, "
            "as --pp-profile-steps writes it."
        ),
    )
    profile_steps: int | None = _flag(
        None,
        lambda: "STEPS",
        lambda: (
            "With --pp-schedule auto and without --pp-costs, measure them in the first steps, at least 2, schedule "
            "for them from then on, and leave them beside the checkpoints of --save."
        ),
        int,
    )
    memory_limit: float | None = _flag(
        None,
        lambda: "M_B",
        lambda: (
            "Most activations of a rank, in what its layers keep of one microbatch (M_B): auto stays below it, a "
            "fixed schedule that needs more is refused."
        ),
        float,
    )
    offload: str | None = _flag(
        None,
        lambda: "CHUNKS",
        lambda: (
            "Keep the activations of at most so many chunks on a rank, from their forward to their backward; those "
            f"needed last move away meanwhile. {LIMIT_FROM_MEMORY}: the most that fit under --pp-memory-limit."
        ),
    )
    offload_to: str | None = _flag(
        None,
        lambda: _one_of(*MOVE_TARGETS),
        lambda: (
            "Where --pp-offload moves them: to the host's memory, which is the default, or to the peer, the rank as "
            "far from the other end of the pipeline."
        ),
    )

    vocab_parallel: int | None = _flag(
        None,
        lambda: "{1,2}",
        lambda: (
            "With --pp-schedule "
            + " and ".join(rule.name for rule in SCHEDULES if rule.takes_vocabulary)
            + ", the rows of the LM head, its loss and the rows of the embedding over all ranks of the pipeline, which "
            "wait for each other 1 or 2 times in every microbatch. 1 keeps fewer activations and needs the memory of a "
            "sum of all ranks' gradients on the last one."
        ),
        int,
    )
    slices: int | None = _flag(
        None,
        lambda: "K",
        lambda: (
            "Send every sequence through the pipeline in K slices of about equal cost, which shorten the bubble and "
            "the activations of the first ranks: with "
            + ", ".join(rule.name for rule in SCHEDULES if rule.takes_slices)
            + "."
        ),
        int,
    )

    @property
    def sliced(self) -> bool:
        """True if sequences are cut."""
        return self.slices is not None and self.slices > 1

    @property
    def moves(self) -> Offload | None:
        """The limit of chunks and the target; ValueError for what is no limit."""
        return None if self.offload is None else Offload(limit_of(self.offload), self.offload_to or HOST)

    @property
    def moves_activations(self) -> bool:
        """True if activations leave a rank between forward and backward."""
        return self.offload is not None or (self.schedule is not None and SCHEDULES.get(self.schedule).lends)

    @property
    def lends(self) -> bool:
        """True if they go to another rank."""
        return self.moves_activations and (self.offload is None or self.offload_to == PEER)

    @property
    def on_v(self) -> bool:
        """True if the schedule places stages on the V."""
        return on_v(self.schedule, self.placement)

    @property
    def two_copies(self) -> bool:
        """True if the schedule sends microbatches through two copies of the model."""
        return self.schedule is not None and SCHEDULES.get(self.schedule).two_copies

    @property
    def splits(self) -> bool:
        """True if the schedule splits backwards into input and weight gradients."""
        return self.schedule is not None and SCHEDULES.get(self.schedule).split


@dataclass(frozen=True, kw_only=True)
class TensorFlags(_Flags):
    """Flags of tensor-parallel linears; without them all of it is left to Megatron."""

    prefix = "tp"
    title = "tensor-parallel linears (megatron-cp)"

    comm_type: str = _flag(
        MEGATRONS,
        lambda: _one_of(*SCHEMES.names),
        lambda: (
            "How the ranks of --tensor-model-parallel-size share the linears of attention and MLPs: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in SCHEMES)
            + "."
        ),
    )
    grid: Sequence[str] | None = _flag(
        None,
        lambda: "RANKS",
        lambda: (
            "TOKENS WEIGHTS: with --tp-comm-type 2d or 2.5d, ranks over which tokens and weights are gathered, whose "
            "product is the tensor-parallel size; by default the most square, and auto is the fastest on the cluster."
        ),
        nargs="+",
    )
    engine: str = _flag(
        AUTO,
        lambda: _one_of(AUTO, *ENGINES.names),
        lambda: (
            "How linears communicate around their products: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in ENGINES)
            + f". {AUTO} is {DEFAULT_ENGINE}."
        ),
    )
    gemm: str = _flag(
        TORCH,
        lambda: _one_of(*GEMMS.names),
        lambda: (
            "How linears compute their products: " + "; ".join(f"{entry.name}: {entry.what}" for entry in GEMMS) + "."
        ),
    )

    @property
    def chosen(self) -> bool:
        """True if scheme or grid are still to be chosen for a cluster."""
        return self.comm_type == AUTO or (SCHEMES.get(self.comm_type).grid and list(self.grid or ()) == [AUTO])

    @property
    def ours(self) -> bool:
        """True if the linears are not Megatron's own."""
        return self.comm_type != MEGATRONS


@dataclass(frozen=True, kw_only=True)
class ExpertFlags(_Flags):
    """Flags of experts, beside Megatron's own --moe-grouped-gemm."""

    prefix = "moe"
    title = "experts (megatron-cp)"

    grouped_product: str = _flag(
        AUTO_PRODUCT,
        lambda: _one_of(AUTO_PRODUCT, *PRODUCTS.names),
        lambda: (
            "With --moe-grouped-gemm and --transformer-impl local, how a rank multiplies the tokens of its experts: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in PRODUCTS)
            + f". {AUTO_PRODUCT} takes grouped-mm where torch has a kernel for the GPU and the dtype, loop elsewhere, "
            "and says why."
        ),
    )
    comm_type: str = _flag(
        MEGATRONS_EXCHANGE,
        lambda: _one_of(*EXCHANGES.names),
        lambda: (
            "How tokens travel to experts of other ranks and back: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in EXCHANGES)
            + "."
        ),
    )
    ranks_per_node: int | None = _flag(
        None,
        lambda: "N",
        lambda: "With --moe-comm-type two-hop, ranks on a node; by default as many as torchrun has started there.",
        int,
    )

    pieces: int = _flag(
        1,
        lambda: "N",
        lambda: (
            "Cut routed tokens into N pieces: while experts compute one, the next is on its way, forward and backward. "
            + "By default "
            + ", ".join(f"{entry.pieces} with --moe-comm-type {entry.name}" for entry in EXCHANGES if entry.pieces > 1)
            + "."
        ),
        int,
    )
    router: str = _flag(
        MEGATRONS_EXCHANGE,
        lambda: _one_of(*ROUTERS.names),
        lambda: "The experts that a token sees: " + "; ".join(f"{entry.name}: {entry.what}" for entry in ROUTERS) + ".",
    )
    group_tokens: int | None = _flag(
        None,
        lambda: "N",
        lambda: (
            f"With --moe-router {' or '.join(entry.name for entry in ROUTERS if entry.choices)}, consecutive tokens of "
            "a sample that share out an expert's capacity; by default all tokens of a rank in a microbatch."
        ),
        int,
    )
    layer_experts: str | None = _flag(
        None,
        lambda: "LAYER:EXPERTS,…",
        lambda: (
            "Experts of a layer and of all later ones, multiples of --num-experts, which the layers before have: "
            "13:64,23:128 (DeepSpeed-MoE's pyramid)."
        ),
    )

    placement: str = _flag(
        NO_PLACEMENT,
        lambda: _one_of(NO_PLACEMENT, *EXPERT_PLACEMENTS.names),
        lambda: (
            f"Copies of busy experts in spare slots of other ranks, or {NO_PLACEMENT}: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in EXPERT_PLACEMENTS)
            + "."
        ),
    )
    replica_slots: int | None = _flag(
        None,
        lambda: "K",
        lambda: "With --moe-placement, spare slots of a rank for copies of other ranks' experts, by default 1.",
        int,
    )
    placement_interval: int = _flag(
        10,
        lambda: "STEPS",
        lambda: "With --moe-placement, steps between two plans of copies.",
        int,
    )
    cluster: str = _flag(
        "dgx-h100",
        lambda: "NAME|FILE",
        lambda: (
            "With --moe-placement, the cluster whose costs of rows and copies a plan goes by: "
            + ", ".join(shipped_clusters())
            + ", or a YAML file."
        ),
    )

    @property
    def places(self) -> bool:
        """True if ranks host copies of other ranks' experts; ValueError for a name unknown."""
        return self.placement != NO_PLACEMENT and bool(EXPERT_PLACEMENTS.get(self.placement).name)

    @property
    def slots(self) -> int:
        """Spare slots of a rank."""
        return 1 if self.replica_slots is None else self.replica_slots

    @property
    def drops(self) -> bool:
        """True if experts take tokens as they come, by a router of ours; ValueError for a name unknown."""
        return ROUTERS.get(self.router).choices is not None

    @property
    def mixes(self) -> bool:
        """True if a token's expert shares its output with an MLP; ValueError for a name unknown."""
        return ROUTERS.get(self.router).name == DEEPSPEED_MOE

    @property
    def exchange(self) -> ExpertExchange:
        """The exchange that is asked for; ValueError for a name unknown."""
        return EXCHANGES.get(self.comm_type)

    @property
    def two_hops(self) -> bool:
        """True if tokens travel inside nodes and then between them; ValueError for a name unknown."""
        return self.exchange.name == TWO_HOP

    @property
    def exchanges(self) -> bool:
        """True if tokens do not travel as Megatron's own dispatchers send them; ValueError for a name unknown."""
        return self.exchange.name != MEGATRONS_EXCHANGE or self.pieces != 1 or self.places

    @property
    def exchange_node(self) -> int | None:
        """Ranks that an exchange takes for a node: one where it has one hop; None where it asks."""
        return self.ranks_per_node if self.two_hops else 1


@dataclass(frozen=True, kw_only=True)
class LocalSgdFlags(_Flags):
    """Flags of islands of replicas, which are Megatron's --num-distributed-optimizer-instances."""

    prefix = "local_sgd"
    title = "Local SGD (megatron-cp)"

    steps: str | None = _flag(
        None,
        lambda: "H|SCHEDULE",
        lambda: (
            "Let the instances of --num-distributed-optimizer-instances train apart, as islands that average weights "
            "and moments every H steps. STEP:H,STEP:H changes H at these steps, the first of which is 1: 1:1,1001:8."
        ),
    )
    spread: float | None = _flag(
        None,
        lambda: "SHARE",
        lambda: (
            "With --local-sgd-steps, average only where a sample of the weights is farther apart than this share of "
            "their norm, but always where weights are saved, evaluated or final; by default at each of these steps."
        ),
        float,
    )
    outer: str = _flag(
        AVERAGE,
        lambda: _one_of(*OUTERS.names),
        lambda: (
            "With --local-sgd-steps, what islands go on from: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in OUTERS)
            + "."
        ),
    )
    outer_lr: float | None = _flag(
        None,
        lambda: "RATE",
        lambda: f"Learning rate of --local-sgd-outer {_with_momentum('learning_rate')}.",
        float,
    )
    outer_momentum: float | None = _flag(
        None,
        lambda: "DECAY",
        lambda: f"Momentum of --local-sgd-outer {_with_momentum('momentum')}.",
        float,
    )

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """The named one; ValueError for a name that is unknown."""
        return OUTERS.get(self.outer)

    @property
    def learning_rate(self) -> float:
        """The outer optimizer's; its own where none is given."""
        return self.outer_lr if self.outer_lr is not None else self.outer_optimizer.learning_rate or 0.0

    @property
    def decay(self) -> float:
        """The decay of the outer optimizer's momentum; its own where none is given."""
        return self.outer_momentum if self.outer_momentum is not None else self.outer_optimizer.momentum or 0.0


READING = (
    ("save_interval", "save"),
    ("non_persistent_save_interval", "save"),
    ("save_params_interval", "save"),
    ("exit_interval", None),
    ("eval_interval", "eval_iters"),
    ("check_weight_hash_across_dp_replicas_interval", None),
)
"""Intervals of what reads the weights, each with the argument without which it is never reached."""


def reading(args: Any) -> dict[str, int]:
    """Return the arguments by which weights are read every so many steps, with the number."""
    found = {name: getattr(args, name, None) for name, needs in READING if not needs or getattr(args, needs, None)}
    return {name: every for name, every in found.items() if every}


def _with_momentum(default: str) -> str:
    return ", ".join(f"{entry.name}, by default {getattr(entry, default)}" for entry in OUTERS if entry.remembers)


@dataclass(frozen=True, kw_only=True)
class QuantisedFlags(_Flags):
    """Flags of quantised messages between replicas, with the names that DeepSpeed gives them."""

    prefix = "zero_quantized"
    title = "ZeRO++ (megatron-cp)"

    gradients: str | None = _flag(
        None,
        lambda: _one_of(*QUANTISATIONS.names),
        lambda: (
            "Reduce gradients over nodes in two hops, quantised but for those of norms, biases, embeddings, output "
            "layers, routers and experts; " + "; ".join(f"{entry.name}: {entry.what}" for entry in QUANTISATIONS) + "."
        ),
    )
    weights: bool = _flag(
        False,
        lambda: "",
        lambda: "Gather weights over nodes in two hops, in int8 but for the same; optimizers keep them in float32.",
        bool,
    )
    ranks_per_node: int | None = _flag(
        None,
        lambda: "N",
        lambda: "Ranks on a node for the two; by default as many as torchrun has started there.",
        int,
    )

    @property
    def asked(self) -> bool:
        """True if anything is quantised."""
        return self.gradients is not None or self.weights

    @property
    def of_gradients(self) -> Quantisation | None:
        """The named one; ValueError for a name that is unknown."""
        return None if self.gradients is None else QUANTISATIONS.get(self.gradients)


@dataclass(frozen=True, kw_only=True)
class StateFlags(_Flags):
    """Flags of the optimizer's state in files."""

    prefix = "optimizer_state"
    title = "ZeRO-Infinity (megatron-cp)"

    dir: str | None = _flag(
        None,
        lambda: "DIR",
        lambda: (
            "Keep Adam's moments in files in DIR, on a disk of the node, and step them by pieces with read-ahead. The "
            "files have no names and end with the run; checkpoints hold the moments as ever."
        ),
    )
    weights: bool = _flag(
        False,
        lambda: "",
        lambda: "With --optimizer-state-dir, keep the float32 weights of a bf16 or fp16 model there too.",
        bool,
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Values of Megatron's arguments for our layers and schedules, read where Megatron calls us and handed down.

    our_layers:          --spec names a layer spec of ours
    attention, tensor, experts: None where the parser was without our flags, and a config keeps what it says itself
    seq_length:          tokens of a sequence over all ranks, for which `--cp-comm-type auto` chooses
    slice_lengths:       tokens of each slice of a sequence over all ranks; empty for whole sequences
    rope_scaling_factor: of --rope-scaling-factor, which Megatron does not hand on to the model
    model:               what measured costs hold for; None where the run neither measures nor reads any
    rank:                in the whole run
    save, load:          folders of the checkpoints that are written, and that the run goes on from
    steps:               numbers of the steps to run, from the loaded checkpoint's on; None where no end is known
    read_every:          numbers of steps after each of which the weights are read: saved, evaluated, compared
    timeout_minutes:     of communication
    """

    our_layers: bool = False
    attention: AttentionFlags | None = None
    pipeline: PipelineFlags = PipelineFlags()
    tensor: TensorFlags | None = None
    experts: ExpertFlags | None = None
    local_sgd: LocalSgdFlags = LocalSgdFlags()
    quantised: QuantisedFlags = QuantisedFlags()
    optimizer_state: StateFlags = StateFlags()
    seq_length: int | None = None
    rope_scaling_factor: float | None = None
    slice_lengths: tuple[int, ...] = ()
    model: Model | None = None
    rank: int = 0
    save: str | None = None
    load: str | None = None
    steps: range | None = None
    read_every: tuple[int, ...] = ()
    timeout_minutes: int | None = None

    @classmethod
    def of(cls, args: Any) -> Self:
        """Read parsed arguments once Megatron has validated them."""
        flags = PipelineFlags.of(args)
        return cls(
            our_layers=has_our_layers(args),
            attention=AttentionFlags.of(args) if hasattr(args, "cp_kernel") else None,
            pipeline=flags,
            tensor=TensorFlags.of(args) if hasattr(args, "tp_comm_type") else None,
            experts=ExpertFlags.of(args) if hasattr(args, "moe_grouped_product") else None,
            local_sgd=LocalSgdFlags.of(args),
            quantised=QuantisedFlags.of(args),
            optimizer_state=StateFlags.of(args),
            seq_length=getattr(args, "seq_length", None),
            rope_scaling_factor=getattr(args, "rope_scaling_factor", None),
            slice_lengths=_slice_lengths(args, flags) if flags.sliced and flags.schedule else (),
            model=_model_of(args) if flags.costs or flags.profile_steps else None,
            rank=getattr(args, "rank", 0),
            save=getattr(args, "save", None),
            load=getattr(args, "load", None),
            steps=_steps_of(args),
            read_every=tuple(reading(args).values()),
            timeout_minutes=getattr(args, "distributed_timeout_minutes", None),
        )


def _steps_of(args: Any) -> range | None:
    last = getattr(args, "train_iters", None)
    return None if last is None else range(getattr(args, "iteration", 0), last)


def _slice_lengths(args: Any, flags: PipelineFlags) -> tuple[int, ...]:
    """Return the tokens of each slice, so that slices cost about the same; ValueError where one would be empty."""
    hidden, heads, cp = args.hidden_size, args.num_attention_heads, args.context_parallel_size
    dim = getattr(args, "kv_channels", None) or hidden // heads
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    matrices = 3 if getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False) else 2
    mlp = matrices * hidden * (getattr(args, "ffn_hidden_size", None) or 4 * hidden)
    parameters = 2 * hidden * dim * (heads + groups) + mlp
    split = SCHEDULES.get(flags.schedule or "").split
    spread = args.tensor_model_parallel_size if getattr(args, "sequence_parallel", False) else 1
    multiple = math.lcm(2 * cp, cp * getattr(args, "cp_stripe", 1), cp * spread)
    try:
        return _lengths(flags.slices or 1, args.seq_length, multiple, parameters, heads * dim, split)
    except ValueError as error:
        raise Refused(f"--pp-slices {flags.slices}: {error}") from None


# asked again by every hook that is called in a step
@lru_cache(32)
def _lengths(*sizes: Any) -> tuple[int, ...]:
    return tuple(model_lengths(*sizes))


def _model_of(args: Any) -> Model:
    uneven = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    return Model(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size or 1,
        expert_model_parallel_size=args.expert_model_parallel_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_experts=args.num_experts or 0,
        params_dtype=str(args.params_dtype).removeprefix("torch."),
        recompute_granularity=args.recompute_granularity or "none",
        layout=next((str(value) for value in uneven if value is not None), "even"),
    )


def settings_of_run() -> Settings:
    """Return the settings of this process's run; defaults in a program that has parsed no arguments of Megatron's.

    Megatron calls a layer spec, and most functions that we replace, without its arguments, so that they can only be
    found where it keeps them for the whole process. Two places ask here and hand the settings down: hooks.py for the
    functions of ours that it calls, and the layer specs, which also run without hooks.
    """
    args = args_of_run()
    return Settings() if args is None else Settings.of(args)


def args_of_run() -> Any:
    """Return the arguments that Megatron keeps for this process, None in a program that has parsed none."""
    # a program that never imported megatron.training has none, and importing it here would cost seconds
    if "megatron.training.global_vars" not in sys.modules:
        return None
    return sys.modules["megatron.training.global_vars"]._GLOBAL_ARGS


def values_of(argv: Sequence[str], flag: str) -> list[str] | None:
    """Return what follows the last `flag` on the command line, up to the next flag; None without the flag."""
    found: list[str] | None = None
    taking = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == flag:
            found, taking = [value] if equals else [], not equals
        elif word.startswith("--"):
            taking = False
        elif taking and found is not None:
            found.append(word)
    return found


def packs_documents(args: Any) -> bool:
    """True if a sample is a stream of documents that see only themselves."""
    by_flag = getattr(args, "dataloader_inter_document_masking", False) or getattr(args, "sft", False)
    return bool(by_flag or cuts_at_eod(args))


def plans_batches(args: Any) -> bool:
    """True if every microbatch has groups of its own."""
    return getattr(args, "cp_plan", None) is not None


def cuts_at_eod(args: Any) -> bool:
    """True if documents end at EOD tokens, which stock layers read from a mask tensor and ours from the data."""
    return bool(getattr(args, "reset_attention_mask", False)) and has_our_layers(args)


def has_our_layers(args: Any) -> bool:
    """True if the arguments name a layer spec of ours."""
    spec = getattr(args, "spec", None) or [""]
    return bool(spec[0].startswith("megatron_cp."))


def say(text: str) -> None:
    """Print our own line, once per run."""
    if config.variable("RANK", "0") == "0":
        print(f"[megatron-cp] {text}", flush=True)
