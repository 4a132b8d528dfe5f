"""Flags of context-parallel attention."""

from dataclasses import dataclass

from megatron_cp.batches import ALGORITHMS
from megatron_cp.context import BACKENDS, Backend
from megatron_cp.context import PLACEMENTS as AXES_OF_HEADS
from megatron_cp.context.checks import able, takes_document_layout
from megatron_cp.context.document_layouts import NAMES as DOCUMENT_LAYOUTS
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.layouts import STRIPED
from megatron_cp.hardware.cluster_file import shipped_clusters
from megatron_cp.kernels import AUTO, KERNELS
from megatron_cp.megatron.flags.flag import Flags, flag, one_of

HEAD_FIRST = "head-first"


def on_stripes(entry: Backend) -> bool:
    """True if this algorithm works on stripes."""
    return entry.layout == STRIPED


def takes_placement(entry: Backend) -> bool:
    """True if --cp-placement chooses the axis on which this algorithm exchanges heads."""
    return entry.capabilities.placement


@dataclass(frozen=True, kw_only=True)
class AttentionFlags(Flags):
    """Flags of context-parallel attention, beside Megatron's own --cp-comm-type, which chooses the algorithm."""

    prefix = "cp"
    title = "context-parallel attention (megatron-cp)"

    kernel: str = flag(
        AUTO,
        lambda: one_of(AUTO, *KERNELS.names),
        lambda: (
            "Attention kernel on one device; auto takes the fastest one that the machine has and says why. "
            "The algorithm between the ranks is chosen with --cp-comm-type: "
            + ", ".join("=".join([entry.name, *entry.aliases]) for entry in BACKENDS)
            + "."
        ),
    )
    placement: str = flag(
        HEAD_FIRST,
        lambda: one_of(*AXES_OF_HEADS),
        lambda: (
            f"With --cp-comm-type {able(takes_placement, str)}, which of the two "
            "--hierarchical-context-parallel-sizes exchanges heads: head-first the first (neighbouring ranks), "
            "context-first the second."
        ),
    )
    stripe: int = flag(
        1,
        lambda: "TOKENS",
        lambda: (
            f"With --cp-comm-type {able(on_stripes, str)}, tokens in a block that one rank owns; longer blocks make "
            "larger tiles and a coarser balance."
        ),
        int,
    )
    chunks: int | None = flag(
        None,
        lambda: "PIECES",
        lambda: (
            "Cut attention into so many pieces over time, with what waits in host memory (FPDT). Takes every "
            f"--cp-comm-type but {', '.join(entry.name for entry in BACKENDS if not entry.capabilities.chunks)}."
        ),
        int,
    )
    cluster: str | None = flag(
        None,
        lambda: "NAME|FILE",
        lambda: (
            "With --cp-comm-type auto, --tp-comm-type auto or --moe-comm-type tutel, the cluster that is chosen for: "
            + ", ".join(shipped_clusters())
            + ", or a YAML file; by default the one that ships for this machine's GPU."
        ),
    )
    softcap: float | None = flag(
        None,
        lambda: "SCORE",
        lambda: (
            "Cap attention scores: SCORE * tanh(score / SCORE) takes the place of each. By --cp-kernel "
            + ", ".join(entry.name for entry in KERNELS if entry.caps)
            + "."
        ),
        float,
    )
    sink: float | None = flag(
        None,
        lambda: "LOGIT",
        lambda: (
            "A fixed attention sink: one more logit in every softmax, which takes a share of the weights and has no "
            "value. A learned one of each head is --softmax-type learnable, one of 0 is --softmax-type off-by-one."
        ),
        float,
    )
    alibi: bool = flag(
        False,
        lambda: "",
        lambda: (
            "ALiBi: each score falls with the distance of its key, by a slope of the query head. For models that are "
            "trained with --position-embedding-type none."
        ),
        bool,
    )
    keep_attention: bool = flag(
        False,
        lambda: "",
        lambda: (
            "With --recompute-granularity, keep output and row statistics of attention, so that its forward and its "
            "communication are not repeated; full recomputation takes that much more memory, which estimate counts."
        ),
        bool,
    )
    loss_chunks: int | None = flag(
        None,
        lambda: "N",
        lambda: (
            "Compute output layer and loss in N chunks of a rank's tokens, one after the other, and again in the "
            "backward pass, so that the logits of one chunk alone are in memory (FPDT, ALST). "
            "--mlp-chunks-for-training does so with dense MLPs."
        ),
        int,
    )
    latent: bool = flag(
        False,
        lambda: "",
        lambda: (
            "With --multi-latent-attention, send the compressed latent of a token in place of the keys and values of "
            "all heads, and expand it on the rank that attends to it. Takes --cp-comm-type "
            f"{able(lambda entry: entry.capabilities.latent, str)}, between local linears."
        ),
        bool,
    )
    self_check: bool = flag(
        False,
        lambda: "",
        lambda: (
            "At the start, compare each attention of the model with dense attention on a small batch, forward and "
            "backward, by the kernel and on the devices of the run; end it where they differ by more than rounding."
        ),
        bool,
    )
    document_layout: str = flag(
        STREAM,
        lambda: one_of(*DOCUMENT_LAYOUTS),
        lambda: (
            "With --dataloader-inter-document-masking or --sft, the tokens of each context-parallel rank: stream as "
            "Megatron cuts them, document zigzag over each document, blocks of equal work, auto for each microbatch "
            "stream or blocks, whichever is faster by prediction. Takes --cp-comm-type "
            f"{', '.join(entry.name for entry in BACKENDS if takes_document_layout(entry))}; all-gather sends least."
        ),
    )

    plan: str | None = flag(
        None,
        lambda: one_of(*ALGORITHMS.names),
        lambda: (
            "Divide the data-parallel ranks into groups anew for every microbatch, each with a context-parallel size "
            "of its own, by the lengths of the documents: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in ALGORITHMS)
            + ". --global-batch-size counts documents. In megatron_cp.pretrain_gpt."
        ),
    )
    tokens_per_rank: int | None = flag(
        None,
        lambda: "TOKENS",
        lambda: (
            "With --cp-plan, most tokens of a rank in a microbatch, before pads; by default what memory holds by the "
            "estimate."
        ),
        int,
    )
