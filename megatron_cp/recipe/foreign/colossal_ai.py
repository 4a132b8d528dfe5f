"""Colossal-AI's config files (arXiv:2110.14883): one `parallel` dict, `zero`, `fp16`, and sizes in capitals."""

from typing import Any

from megatron_cp.recipe.foreign.deepspeed import (
    CP,
    NO_HOST,
    NO_WEIGHTS_ON_HOST,
    OFFLOAD,
    PP,
    TP,
    batch_sizes,
    sharded,
    stage,
)
from megatron_cp.recipe.foreign.keys import (
    Absent,
    Answer,
    Flags,
    ForeignConfig,
    Outcome,
    System,
    derived,
    ignored,
    is_true,
    near,
    not_here,
    pair,
    refused,
    text,
    value,
    words,
)

RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# what these linears stand on: tokens spread over the ranks between them, Megatron's own layers, no biases
SPREAD: Flags = {"--sequence-parallel": (), "--transformer-impl": ("local",), "--disable-bias-linear": ()}
NO_BIASES = "linears have no biases"
IMAGES = "images are not trained here"
EPOCHS = "runs are counted in steps: give --train-iters"
# Titans' models by their names: layers, width, heads
MODELS = {
    "gpt2_small": (12, 768, 12),
    "gpt2_medium": (24, 1024, 8),
    "gpt2_large": (36, 1536, 12),
    "gpt2_xl": (48, 1600, 16),
    "gpt2_8b": (72, 3072, 24),
    "gpt3": (96, 12288, 96),
}


def _mode(config: ForeignConfig) -> str:
    return str(config.values.get("parallel.tensor.mode", config.values.get("tensor.mode", "1d"))).lower()


def _pipeline(config: ForeignConfig) -> int:
    return config.number(PP, "parallel.pipeline", "parallel.pipeline.size") or 1


def _replicas(config: ForeignConfig) -> int | None:
    ranks = config.number("parallel.tensor.size", "parallel.tensor") or 1
    return config.processes // (ranks * _pipeline(config)) if config.processes else None


def _size(found: Any, config: ForeignConfig) -> Answer:
    flag = CP if _mode(config) == "sequence" else TP
    return Answer({flag: (text(int(found)),)})


def _schemes(found: Any, config: ForeignConfig) -> Answer:
    mode = str(found).lower()
    if mode in ("1d", "none"):
        return Answer({})
    if mode == "sequence":
        return Answer({"--cp-comm-type": ("rsa",)})
    if mode == "2d" or (mode == "2.5d" and config.number("parallel.tensor.depth") in (None, 1)):
        return near({"--tp-comm-type": ("2d",), **SPREAD}, f"{NO_BIASES}; embedding and output layer as in 1d")
    if mode == "3d":
        return near(
            {"--tp-comm-type": ("3d",), **SPREAD}, f"{NO_BIASES}; attention, embedding and output layer as in 1d"
        )
    if mode != "2.5d":
        return not_here("the modes are 1d, 2d, 2.5d, 3d and sequence")
    size, depth = config.number("parallel.tensor.size"), config.number("parallel.tensor.depth") or 1
    if not size or size % depth:
        return not_here("its depth does not divide its size: give --tensor-model-parallel-size and --tp-comm-type 2.5d")
    return near(
        {TP: (str(size // depth),), CP: (str(depth),), "--tp-comm-type": ("2.5d",), **SPREAD},
        f"{NO_BIASES}; the depth is context parallelism, over which tokens are split and weights repeated",
    )


def _depth(found: Any, config: ForeignConfig) -> Answer:
    if _mode(config) == "2.5d":
        return Answer({}, note="")
    return Answer({}, Outcome.IGNORED, "of mode 2.5d")


def _tensor_size(found: Any, config: ForeignConfig) -> Answer:
    deep = _mode(config) == "2.5d" and config.number("parallel.tensor.depth") not in (None, 1)
    return Answer({}) if deep else _size(found, config)


def _level(found: Any, config: ForeignConfig) -> Answer:
    return stage(found, _pipeline(config))


def _chunks(found: Any, config: ForeignConfig) -> Answer:
    if "zero.level" in config.values:
        return Answer({}, Outcome.IGNORED, "zero.level counts")
    return stage(3, _pipeline(config))


def _device(found: Any, config: ForeignConfig) -> Answer:
    level = config.number("zero.level") or (3 if any(key.startswith("zero.") for key in config.values) else 1)
    if str(found) == "cpu" and sharded(level, _pipeline(config)):
        return not_here(NO_HOST)
    if str(found) == "cpu":
        return near(words(OFFLOAD), "Adam's states and steps on the host, weights and gradients stay on the GPU")
    if str(found) in ("cuda", "none"):
        return Answer({})
    return not_here("memory is placed before the run: give --optimizer-cpu-offload and --optimizer-offload-fraction")


def _amp(found: Any, _: ForeignConfig) -> Answer:
    mode = str(found).rpartition(".")[2].lower()
    if mode == "none":
        return Answer({})
    if mode == "naive":
        return Answer({"--fp16": ()})
    if mode in ("torch", "apex"):
        return near(
            {"--fp16": ()}, "the whole model in half precision, where autocast keeps some operations in float32"
        )
    return not_here("the modes are NAIVE, TORCH and APEX")


def _batch(found: Any, config: ForeignConfig) -> Answer:
    micros = config.number("NUM_MICRO_BATCHES") or 1
    if int(found) % micros:
        return not_here(f"{found} sequences do not divide by {micros} microbatches: give --micro-batch-size")
    whole = config.number("--global-batch-size", "GLOBAL_BATCH_SIZE")
    steps = config.number("gradient_accumulation") or 1
    return batch_sizes(int(found) // micros, int(found) * steps, _replicas(config), whole)


def _micros(found: Any, config: ForeignConfig) -> Answer:
    if "BATCH_SIZE" in config.values:
        return Answer({}, Outcome.IGNORED, "follows from both batch sizes")
    ranks, batch = _replicas(config), config.number("GLOBAL_BATCH_SIZE", "--global-batch-size")
    if not ranks or not batch or batch % (int(found) * ranks):
        return not_here("needs the processes, and a global batch that divides: give --micro-batch-size")
    return Answer({"--micro-batch-size": (str(batch // (int(found) * ranks)),)})


def _length(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--seq-length": (text(int(found)),), "--max-position-embeddings": (text(int(found)),)})


def _layers(found: Any, config: ForeignConfig) -> Answer:
    if found == config.values.get("parallel.tensor.depth"):
        return Answer({}, Outcome.IGNORED, "taken as parallel.tensor.depth, which has the same value")
    return Answer({"--num-layers": (text(int(found)),)})


def _ffn(found: Any, config: ForeignConfig) -> Answer:
    width = config.number("HIDDEN_SIZE", "--hidden-size")
    if not width:
        return not_here("needs the width: give --ffn-hidden-size")
    return Answer({"--ffn-hidden-size": (text(int(float(found) * width)),)})


def _model(found: Any, _: ForeignConfig) -> Answer:
    name = str(found).rpartition(".")[2].lower()
    if name not in MODELS:
        return not_here("a model of the user's: give its sizes, such as --num-layers, or --model NAME")
    sizes = zip(("--num-layers", "--hidden-size", "--num-attention-heads"), MODELS[name], strict=True)
    return near({flag: (str(size),) for flag, size in sizes}, "sizes of Titans' model of this name")


def _optimizer(found: Any, _: ForeignConfig) -> Answer:
    name = str(found).rpartition(".")[2].lower()
    if name in ("adam", "adamw", "fusedadam", "hybridadam", "cpuadam"):
        return Answer({"--optimizer": ("adam",)})
    return not_here("Megatron has no such optimizer, and trains with Adam unless --optimizer says otherwise")


def _recompute(found: Any, _: ForeignConfig) -> Answer:
    return Answer(words(RECOMPUTE) if is_true(found) else {})


SYSTEM = System(
    name="colossal-ai",
    title="Colossal-AI",
    files="a Python file of dicts",
    keys=(
        derived(
            "parallel.pipeline parallel.pipeline.size",
            f"{PP} VALUE",
            lambda found, _: Answer({PP: (text(int(found)),)}),
            how=Outcome.MAPPED,
        ),
        derived("parallel.tensor.size", f"{TP} VALUE", _tensor_size, f"{CP} for mode sequence", Outcome.MAPPED),
        derived(
            "parallel.tensor", f"{TP} VALUE", lambda found, _: Answer({TP: (text(int(found)),)}), how=Outcome.MAPPED
        ),
        derived(
            "parallel.tensor.mode",
            f"1d: nothing; 2d, 3d: --tp-comm-type MODE; 2.5d: {TP} SIZE/DEPTH {CP} DEPTH --tp-comm-type 2.5d; "
            "these three with --sequence-parallel --transformer-impl local --disable-bias-linear; sequence: "
            "--cp-comm-type rsa",
            _schemes,
            "2d, 2.5d and 3d are approximated: no biases, embedding and output layer as in 1d",
        ),
        derived("parallel.tensor.depth", "with mode 2.5d", _depth, how=Outcome.MAPPED),
        ignored("parallel.data", "data-parallel ranks are those that are left"),
        derived("fp16.mode", "NAIVE, TORCH, APEX: --fp16", _amp, "TORCH and APEX are approximated"),
        value("fp16.initial_scale", "--initial-loss-scale"),
        value("fp16.growth_interval", "--loss-scale-window"),
        value("fp16.hysteresis", "--hysteresis"),
        value("fp16.min_scale", "--min-loss-scale"),
        refused("fp16.growth_factor fp16.backoff_factor fp16.max_scale", "Megatron doubles and halves the scale"),
        ignored("fp16.verbose fp16.log_num_zeros_in_grad zero.verbose", "logs only"),
        derived(
            "zero.level",
            "1: --use-distributed-optimizer; 2, 3: extends training/zero2, training/zero3",
            _level,
            "2 and 3 are approximated as those of DeepSpeed",
        ),
        derived(
            "zero.model_config.tensor_placement_policy zero.tensor_placement_policy gemini.placement_policy",
            f"cpu: {OFFLOAD}",
            _device,
            "cpu is approximated beside a pipeline, refused beside Megatron-FSDP; auto is refused",
        ),
        derived(
            "zero.model_config zero.optimizer_config",
            "extends training/zero3",
            _chunks,
            "approximated; ignored beside zero.level",
        )._replace(section=True),
        derived(
            "zero.offload_optimizer_config.device zero.cpu_offload",
            f"cpu: {OFFLOAD}",
            lambda found, config: _device(found if isinstance(found, str) else "cpu" if found else "none", config),
            "approximated",
        ),
        refused(
            "zero.offload_param_config.device",
            NO_WEIGHTS_ON_HOST,
            neutral=("cuda", "none"),
        ),
        ignored(
            "zero.offload_optimizer_config zero.offload_param_config",
            "buffers of Colossal-AI's own",
            section=True,
        ),
        value("clip_grad_norm gradient_clipping", "--clip-grad"),
        ignored("gradient_accumulation", "follows from both batch sizes"),
        ignored("gradient_handler", "Megatron adds the gradients of all its ranks itself", section=True),
        # sizes in capitals
        derived(
            "BATCH_SIZE",
            "--micro-batch-size VALUE/NUM_MICRO_BATCHES --global-batch-size VALUE times data-parallel ranks",
            _batch,
            "the second only where the processes are known",
        ),
        value("GLOBAL_BATCH_SIZE", "--global-batch-size"),
        derived("NUM_MICRO_BATCHES", "--micro-batch-size", _micros, "where BATCH_SIZE is not there"),
        derived(
            "SEQ_LEN SEQ_LENGTH", "--seq-length VALUE --max-position-embeddings VALUE", _length, how=Outcome.MAPPED
        ),
        value("HIDDEN_SIZE", "--hidden-size"),
        value("NUM_LAYERS", "--num-layers"),
        derived("DEPTH", "--num-layers VALUE", _layers, "unless it is the depth of mode 2.5d"),
        value("NUM_HEADS NUM_ATTENTION_HEADS", "--num-attention-heads"),
        derived("MLP_RATIO", "--ffn-hidden-size VALUE times HIDDEN_SIZE", _ffn, how=Outcome.MAPPED),
        value("VOCAB_SIZE", "--vocab-size"),
        value("LR LEARNING_RATE optimizer.lr", "--lr"),
        value("MIN_LR", "--min-lr"),
        value("WEIGHT_DECAY optimizer.weight_decay", "--weight-decay"),
        pair("optimizer.betas", ("--adam-beta1", "--adam-beta2")),
        value("optimizer.eps", "--adam-eps"),
        derived(
            "optimizer.type", "Adam, HybridAdam, CPUAdam, FusedAdam: --optimizer adam", _optimizer, "others are refused"
        ),
        value("TRAIN_ITERS", "--train-iters"),
        value("DECAY_ITERS", "--lr-decay-iters"),
        value("WARMUP_FRACTION", "--lr-warmup-fraction"),
        value("WARMUP_STEPS", "--lr-warmup-iters"),
        value("EVAL_ITERS", "--eval-iters"),
        value("EVAL_INTERVAL", "--eval-interval"),
        value("SEED seed", "--seed"),
        refused("NUM_EPOCHS WARMUP_EPOCHS", EPOCHS),
        derived("model.type", "Titans' gpt2_small to gpt3: --num-layers --hidden-size --num-attention-heads", _model),
        derived("CHECKPOINT model.checkpoint", f"true: {RECOMPUTE}", _recompute, how=Outcome.MAPPED),
        derived(
            "model.num_chunks",
            "--num-virtual-stages-per-pipeline-rank VALUE",
            lambda found, _: Answer(
                {"--num-virtual-stages-per-pipeline-rank": (text(int(found)),)} if int(found) > 1 else {}
            ),
            how=Outcome.MAPPED,
        ),
        refused("IMG_SIZE PATCH_SIZE NUM_CLASSES DATASET_PATH", IMAGES),
        refused("ADD_BINARY_HEAD", "BERT's heads are not trained here"),
        refused("DATA_PATH VOCAB_FILE_PATH", "corpora differ: give --data-path, made by megatron-cp data build"),
        ignored(
            "TENSOR_SHAPE TENSOR_PARALLEL TENSOR_PARALLEL_SIZE TENSOR_PARALLEL_MODE loss model.dtype LOG_PATH "
            "cudnn_benchmark logging",
            "read where it is used",
            section=True,
        ),
    ),
    absent=(
        Absent(
            ("clip_grad_norm", "gradient_clipping"),
            "--clip-grad 0",
            "Colossal-AI clips nothing by default, Megatron at 1: --clip-grad 0",
        ),
    ),
)
