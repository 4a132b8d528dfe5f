"""Flags of earlier Megatron releases and of other projects built on Megatron, with the flags to use here instead."""

from collections.abc import Iterable
from typing import NamedTuple

from megatron_cp.registry import suggest


class Foreign(NamedTuple):
    """Flags, without their dashes, that Megatron does not have: the project that has them, and what to do instead."""

    flags: str
    owner: str
    instead: str


ZERO_BUBBLE, MINDSPEED = "the zero-bubble fork of Megatron", "MindSpeed"
PRIMUS, PAI, SWISS_AI, EARLIER = "Primus", "Pai-Megatron-Patch", "the swiss-ai fork of Megatron", "earlier Megatron"
INFERENCE, MODELOPT = "Megatron's inference scripts", "Megatron's ModelOpt scripts"
PLUGINS = "a plugin of sbatch"
DEEPSPEED = "DeepSpeed"
OMIT, PRETRAINING = "leave it out", "leave it out: this is pretraining"

FOREIGN = (
    Foreign("enable-zero-bubble", ZERO_BUBBLE, "use --pp-schedule zb-h1, zb-h2, zb-v, or auto"),
    Foreign("enable-zb-runtime", ZERO_BUBBLE, "leave it out: --pp-schedule runs any schedule"),
    Foreign("zero-bubble-v-schedule", ZERO_BUBBLE, "use --pp-schedule zb-v"),
    Foreign("zero-bubble-v-schedule-mem-setup", ZERO_BUBBLE, "use --pp-schedule v-min, v-half or zb-v"),
    Foreign("enable-1f1b-v", ZERO_BUBBLE, "use --pp-schedule with a schedule on the V, such as zb-v"),
    Foreign(
        "zero-bubble-max-pending-backward zero-bubble-adaptive-memory-percentile",
        ZERO_BUBBLE,
        "use --pp-schedule auto with --pp-memory-limit",
    ),
    Foreign(
        "zero-bubble-pipeline-timers-start-iter zero-bubble-pipeline-timers-end-iter",
        ZERO_BUBBLE,
        "use --pp-schedule auto with --pp-profile-steps",
    ),
    Foreign(
        "enable-optimizer-post-validation enable-exactly-numeric-match pre-communication-optimization",
        ZERO_BUBBLE,
        "leave it out: the optimizer waits for the whole gradient norm",
    ),
    Foreign("allow-padding-num-layers", ZERO_BUBBLE, "use --pipeline-model-parallel-layout for uneven stages"),
    Foreign(
        "context-parallel-algo",
        MINDSPEED,
        "use --cp-comm-type: zigzag for megatron_cp_algo, ulysses for ulysses_cp_algo, usp for hybrid_cp_algo",
    ),
    Foreign(
        "ulysses-degree-in-cp",
        MINDSPEED,
        "use --cp-comm-type usp with --hierarchical-context-parallel-sizes DEGREE CP/DEGREE",
    ),
    Foreign("cp-window-size", MINDSPEED, "use --cp-comm-type double-ring with --hierarchical-context-parallel-sizes"),
    Foreign("use-cp-send-recv-overlap", MINDSPEED, "leave it out: sends overlap computation"),
    Foreign("megatron-cp-in-bnsd attention-mask-type use-fused-ring-attention-update", MINDSPEED, OMIT),
    Foreign("use-fused-rotary-pos-emb", MINDSPEED, "leave it out: --no-rope-fusion turns the fusion off"),
    Foreign("use-fused-swiglu", MINDSPEED, "leave it out: --no-bias-swiglu-fusion turns the fusion off"),
    Foreign("use-fused-rmsnorm", MINDSPEED, "use --normalization RMSNorm"),
    Foreign("schedules-method", MINDSPEED, "use --pp-schedule"),
    Foreign("swap-attention", MINDSPEED, "use --recompute-granularity, or --cp-comm-type fpdt"),
    Foreign("pp-algorithm", PRIMUS, "use --pp-schedule"),
    Foreign("patch-zero-bubble", PRIMUS, "use --pp-schedule"),
    Foreign("enable-primus-turbo use-turbo-attention use-turbo-grouped-mlp", PRIMUS, "use --cp-kernel for attention"),
    Foreign("patch-tokenizer-type", PAI, "use --tokenizer-type HuggingFaceTokenizer with --tokenizer-model"),
    Foreign("extra-vocab-size", PAI, "use --vocab-size or --make-vocab-size-divisible-by"),
    Foreign("max-padding-length", PAI, "use --seq-length"),
    Foreign("dataset", PAI, "use --data-path"),
    Foreign("train-mode", PAI, PRETRAINING),
    Foreign("environment uenv", PLUGINS, "write it under SLURM: in the recipe"),
    Foreign("deepspeed deepspeed-config deepspeed-mpi no-pipeline-parallel", DEEPSPEED, OMIT),
    Foreign(
        "zero-stage",
        DEEPSPEED,
        "use --use-distributed-optimizer for 1, --use-megatron-fsdp with --data-parallel-sharding-strategy optim_grads "
        "for 2, optim_grads_params for 3",
    ),
    Foreign("ds-sequence-parallel-size", DEEPSPEED, "use --context-parallel-size with --cp-comm-type ulysses"),
    Foreign("deepspeed-activation-checkpointing", DEEPSPEED, "use --recompute-granularity"),
    Foreign("trigger-path", SWISS_AI, "use --exit-signal-handler, and touch a file `exit` in the --save folder"),
    Foreign(
        "temperature top_k top_p return-log-probs num-tokens-to-generate top-n-logprobs prompts prompt-file "
        "output-path model-provider incoming-requests-per-sec incoming-requests-per-step inference-repeat-n "
        "termination-id prompt-file-num-truncate output-every-n-results inference-ckpt-non-strict",
        INFERENCE,
        PRETRAINING,
    ),
    Foreign("export-te-mcore-model", MODELOPT, PRETRAINING),
    Foreign("use-legacy-models", EARLIER, "leave it out: megatron-core's models are the only ones"),
    Foreign("no-async-tensor-model-parallel-allreduce", EARLIER, "leave it out: the all-reduce is a setting no more"),
    Foreign("log-batch-size-to-tensorboard log-learning-rate-to-tensorboard", EARLIER, "leave it out: always logged"),
    Foreign("enable-gpt-oss", EARLIER, "give the model's own flags, such as --softmax-type and --window-size"),
    Foreign("export-force-local-attention", EARLIER, "use --transformer-impl local"),
    Foreign("linear-attention-type", EARLIER, "use --experimental-attention-variant"),
    Foreign("fp8-hybrid", EARLIER, "use --fp8-format hybrid"),
    Foreign("fp8-e4m3", EARLIER, "use --fp8-format e4m3"),
    Foreign("layernorm-epsilon", EARLIER, "use --norm-epsilon"),
    Foreign("checkpoint-num-layers", EARLIER, "use --recompute-num-layers"),
    Foreign("distribute-checkpointed-activations", EARLIER, "use --distribute-saved-activations"),
    Foreign("no-query-key-layer-scaling", EARLIER, "leave it out: it is off unless --apply-query-key-layer-scaling"),
    Foreign("ddp-impl no-contiguous-buffers-in-local-ddp data-impl num-unique-layers", EARLIER, OMIT),
    Foreign("cpu-optimizer", EARLIER, "use --optimizer-cpu-offload"),
    Foreign("use-custom-fsdp", EARLIER, "use --use-megatron-fsdp"),
    Foreign("moe-extended-tp", EARLIER, "use --expert-tensor-parallel-size"),
    Foreign("pipeline-model-parallel-split-rank", EARLIER, "leave it out: it split encoder-decoder models"),
)
# of so many flags some are a little like any word
NEAR = 0.8
_BY_FLAG = {f"--{flag.replace('_', '-')}": entry for entry in FOREIGN for flag in entry.flags.split()}


def instead_of(flag: str, known: Iterable[str]) -> str:
    """Say in the tail of a sentence whose flag an unknown one is and what to use; otherwise suggest a known one."""
    if not flag.startswith("--"):
        return "; a flag begins with two dashes, such as --num-layers"
    entry = _BY_FLAG.get(flag.lower().replace("_", "-"))
    return f"; {flag} is a flag of {entry.owner}: {entry.instead}" if entry else suggest(flag, known, NEAR)
