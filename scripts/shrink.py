"""Shrink a recipe's flags to a model of two or four small layers, which trains on a CPU in seconds.

What a client asked for stays: kinds of layers, attention, routing, recomputation, precision, optimizer and their
switches. Sizes become small, data becomes mock data, and what only a cluster has is left out: paths, logging, counts of
samples, and the sizes of a parallelism that needs more than four ranks.
"""

from collections.abc import Container, Mapping

from megatron_cp.recipe.recipe import Recipe

type Flags = dict[str, tuple[str, ...]]

# the largest value of each size, where the recipe gives the flag
SIZES = {
    "--hidden-size": 64,
    "--ffn-hidden-size": 128,
    "--num-attention-heads": 4,
    "--num-query-groups": 2,
    "--kv-channels": 16,
    "--seq-length": 32,
    "--max-position-embeddings": 32,
    "--moe-ffn-hidden-size": 32,
    "--moe-shared-expert-intermediate-size": 32,
    "--moe-latent-size": 32,
    "--num-experts": 4,
    "--moe-router-topk": 2,
    "--moe-router-num-groups": 2,
    "--moe-router-group-topk": 1,
    "--q-lora-rank": 32,
    "--kv-lora-rank": 32,
    "--qk-head-dim": 16,
    "--qk-pos-emb-head-dim": 8,
    "--v-head-dim": 16,
    "--micro-batch-size": 1,
    "--recompute-num-layers": 1,
    "--mup-base-hidden-size": 32,
}
# what counts layers, sequences or steps that no longer exist, and what only reports
LEFT_OUT_PREFIXES = (
    *("--tensorboard-", "--wandb-", "--log-", "--inference-", "--profile", "--exit-", "--eval-"),
    *("--dist-ckpt-", "--use-checkpoint-", "--lr-decay-", "--lr-warmup-", "--train-", "--save", "--load", "--error-"),
    *("--rerun-", "--decoder-", "--pipeline-model-parallel-", "--num-virtual-", "--num-layers-", "--timing-"),
    *("--microbatch-group-", "--tp-comm-overlap", "--account-for-", "--use-persistent-ckpt", "--async-", "--tiktoken-"),
    *("--context-parallel-", "--hierarchical-context-", "--cp-", "--pp-"),
)
LEFT_OUT = (
    "--data-path --data-cache-path --split --vocab-file --merge-file --tokenizer-type --tokenizer-model "
    "--vocab-size --padded-vocab-size --make-vocab-size-divisible-by --no-mmap-bin-files "
    "--no-use-tokenizer-model-from-checkpoint-args --tensor-model-parallel-size --sequence-parallel "
    "--expert-model-parallel-size --expert-tensor-parallel-size --global-batch-size --rampup-batch-size "
    "--distributed-backend --distributed-timeout-minutes --finetune --auto-detect-ckpt-format --no-load-optim "
    "--no-load-rng --no-save-optim --verify-integrity --mock-data --num-workers --num-dataset-builder-threads "
    "--deterministic-mode --use-tp-pp-dp-mapping --num-layers --num-distributed-optimizer-instances "
    "--moe-enable-deepep --ckpt-fully-parallel-load --ckpt-fully-parallel-save --ckpt-assume-constant-structure "
    "--no-ckpt-fully-parallel-save --moe-layer-freq --pretrained-checkpoint --overlap-p2p-communication-warmup-flush"
).split()
TRAINING: Flags = {
    flag: tuple(values.split())
    for flag, values in {
        "--mock-data": "",
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": "127",
        "--make-vocab-size-divisible-by": "16",
        "--global-batch-size": "4",
        "--train-iters": "3",
        "--lr": "1e-3",
        "--min-lr": "1e-4",
        "--eval-interval": "1000",
        "--eval-iters": "0",
        "--log-interval": "1",
    }.items()
}


def shrunk(recipe: Recipe, layers: int, parallelism: Mapping[str, str], known: Container[str]) -> list[str]:
    """Return the words of a small run with the recipe's switches and another parallelism.

    known:       Megatron's flags; no other flag is left out, so that the run refuses it
    layers:      of the whole model; the first is dense where the recipe has dense layers before those with experts
    parallelism: flags and their values, such as --context-parallel-size 2
    """
    given: Flags = {flag: setting.values for flag, setting in recipe.model_args.items()}
    kept = {flag: values for flag, values in given.items() if flag not in known or not _left_out(flag)}
    sizes: Flags = {flag: (_smaller(value, given[flag]),) for flag, value in SIZES.items() if flag in given}
    flags = {**kept, **sizes, **TRAINING, "--num-layers": (str(layers),)}
    if "--moe-layer-freq" in given:
        flags["--moe-layer-freq"] = (f"([0]*1+[1]*{layers - 1})",)
    if given.get("--moe-token-dispatcher-type") == ("flex",):  # needs expert or tensor parallelism, and GPUs
        flags["--moe-token-dispatcher-type"] = ("alltoall",)
    flags |= {flag: tuple(value.split()) for flag, value in parallelism.items()}
    return [word for flag, values in flags.items() for word in _words(flag, values)]


def _left_out(flag: str) -> bool:
    return flag in LEFT_OUT or flag.startswith(LEFT_OUT_PREFIXES)


def _smaller(size: int, given: tuple[str, ...]) -> str:
    text = " ".join(given)
    return text if text.isdecimal() and int(text) < size else str(size)


def _words(flag: str, values: tuple[str, ...]) -> tuple[str, ...]:
    return (f"{flag}={values[0]}",) if len(values) == 1 and values[0].startswith("-") else (flag, *values)
