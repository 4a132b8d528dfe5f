"""Read a command line before Megatron parses it."""

from collections.abc import Sequence

from megatron_cp.errors import Refused
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.run import values_of
from megatron_cp.units import is_whole

SPEC = ("megatron_cp.megatron.spec", "gpt_layer_spec")
HYBRID_SPEC = ("megatron_cp.megatron.spec", "hybrid_stack_spec")
# flags that mask tokens of the data, which ranks of a context-parallel group need not hold equally many of
MASKING = ("--eod-mask-loss", "--sft", "--allow-ambiguous-pad-tokens")
PAD_ID = "--null-tokenizer-pad-id"


def check_script(argv: Sequence[str], layers: bool) -> None:
    """Refuse what a script of Megatron's and our layers understand differently, with a way out.

    layers: our attention is in the run
    Raises ValueError for `--sft` under context parallelism: scripts give ranks parts of each document, by an operation
    of transformer-engine, and our layers expect parts of the stream; and for `--reset-attention-mask`, for which
    scripts make a mask tensor; for `--cp-plan`, for which they read no documents; and for masked tokens that divide
    the loss of each rank by its own number of them.
    """
    if plan := values_of(argv, "--cp-plan"):
        raise Refused(
            f"--cp-plan {' '.join(plan)}: a script of Megatron's reads samples of one length, and a plan is made for "
            "documents; run megatron_cp.pretrain_gpt instead of the script"
        )
    size = values_of(argv, "--context-parallel-size") or ["1"]
    if layers and values_of(argv, "--reset-attention-mask") is not None:
        raise Refused(
            "--reset-attention-mask: a script of Megatron's hides earlier documents by a mask tensor, which "
            "megatron-cp's attention does not read; pass --dataloader-inter-document-masking instead, which ends "
            "documents where those of the corpus end, or run megatron_cp.pretrain_gpt instead of the script"
        )
    if layers and size != ["1"] and values_of(argv, "--sft") is not None:
        raise Refused(
            f"--sft with --context-parallel-size {' '.join(size)}: a script of Megatron's cuts each document, and "
            "megatron-cp's attention takes parts of the stream; run megatron_cp.pretrain_gpt instead of the script"
        )
    _refuse_uneven_masks(argv)


def _refuse_uneven_masks(argv: Sequence[str]) -> None:
    """Refuse what may leave ranks of a context-parallel group different numbers of tokens.

    A script's loss function is out of reach: Megatron's return the rank's own number, by which Megatron then divides.
    """
    size = values_of(argv, "--context-parallel-size")
    masks = [flag for flag in MASKING if values_of(argv, flag) is not None]
    # Megatron masks labels that are this tokenizer's pad, of which there are none where it is negative
    pad = values_of(argv, PAD_ID)
    masks += [f"{PAD_ID} {pad[0]}"] if pad and is_whole(pad[0]) else []
    if size in (None, ["1"]) or not masks or values_of(argv, "--calculate-per-token-loss") is not None:
        return
    raise Refused(
        f"{masks[0]} with --context-parallel-size {' '.join(size or ())}: a script of Megatron's divides the loss of a "
        "rank by the rank's own number of tokens, which gives other gradients than one rank; pass "
        "--calculate-per-token-loss, or run megatron_cp.pretrain_gpt instead of the script"
    )


def wants_layers(argv: Sequence[str], te: bool) -> bool:
    """True if our attention belongs in this run.

    It does when the command line names our spec, one of our flags or a --cp-comm-type, or asks for slices of sequences,
    and also where stock Megatron cannot do what was asked without transformer-engine: context or sequence parallelism,
    packed documents, norms whose weight is stored minus one, and the products of all experts at once.

    te: transformer-engine is installed where the run will be
    """
    spec = values_of(argv, "--spec")
    if spec:
        return spec[0].startswith("megatron_cp.")
    # slices attend to the keys of earlier ones
    if (values_of(argv, "--pp-slices") or ["1"]) != ["1"]:
        return True
    ours = (*AttentionFlags.names(), *TensorFlags.names(), *ExpertFlags.names(), "--cp-comm-type")
    if any(values_of(argv, flag) is not None for flag in ours):
        return True
    size = values_of(argv, "--context-parallel-size") or ["1"]
    switches = (
        *("--sequence-parallel", "--dataloader-inter-document-masking", "--sft", "--apply-layernorm-1p"),
        "--moe-grouped-gemm",
    )
    return not te and (size != ["1"] or any(values_of(argv, flag) is not None for flag in switches))
