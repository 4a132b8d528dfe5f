"""DeepSpeed's JSON config (Rasley et al., KDD 2020), and the flags of Megatron-DeepSpeed."""

from collections.abc import Callable
from typing import Any

from megatron_cp.recipe.foreign.keys import (
    Absent,
    Answer,
    Flags,
    ForeignConfig,
    Outcome,
    System,
    choice,
    derived,
    ignored,
    is_true,
    near,
    not_here,
    pair,
    refused,
    switch,
    text,
    value,
    when,
    words,
)

TP, PP, CP = (f"--{kind}-parallel-size" for kind in ("tensor-model", "pipeline-model", "context"))
OFFLOAD = "--optimizer-cpu-offload --use-precision-aware-optimizer"
SHARDED = "gradients are added in float32, and by Megatron-FSDP"
NO_PIPELINE = (
    "Megatron-FSDP takes no pipeline, whose stages already share weights and gradients: optimizer states alone"
)
OTHER_RANKS = "shards of other groups: extend training/hsdp, whose groups shard everything inside them"
NO_WEIGHTS_ON_HOST = "weights stay on the GPU: take more ranks; --cp-chunks and --pp-offload move activations"
NO_HOST = "not proved beside Megatron-FSDP: with stage 1 optimizer states may be on the host"


def replicas(config: ForeignConfig) -> int | None:
    """Return the number of data-parallel ranks; None where the number of processes is not known."""
    tensor = config.number(TP, "tensor_parallel.autotp_size") or 1
    context = config.number(CP, "--ds-sequence-parallel-size", "sequence_parallel_size") or 1
    return config.processes // (pipeline_of(config) * tensor * context) if config.processes else None


def stage(found: Any, pipeline: int) -> Answer:
    """Return what a stage of ZeRO becomes beside a pipeline of this size."""
    level = int(found)
    if level == 0:
        return Answer({})
    if level == 1:
        return Answer({"--use-distributed-optimizer": ()})
    if level not in (2, 3):
        return not_here("ZeRO has the stages 0 to 3")
    if pipeline > 1:
        return near({"--use-distributed-optimizer": ()}, NO_PIPELINE)
    return near({}, SHARDED, f"training/zero{level}")


def sharded(level: int | None, pipeline: int) -> bool:
    """True if a stage of ZeRO becomes Megatron-FSDP."""
    return (level or 0) > 1 and pipeline == 1


def pipeline_of(config: ForeignConfig) -> int:
    """Return the number of stages of the pipeline."""
    return config.number(PP, "pipeline.stages") or 1


def _stage(found: Any, config: ForeignConfig) -> Answer:
    return stage(found, pipeline_of(config))


def _global_batch(found: Any, config: ForeignConfig) -> Answer:
    return Answer({"--global-batch-size": (text(int(found)),)})


def _micro_batch(found: Any, config: ForeignConfig) -> Answer:
    whole = config.number("train_batch_size", "--global-batch-size")
    steps = config.number("gradient_accumulation_steps") or 1
    return batch_sizes(int(found), int(found) * steps, replicas(config), whole)


def batch_sizes(micro: int, of_rank: int, ranks: int | None, whole: int | None) -> Answer:
    """Return flags of a micro batch, and of the global batch where no key gives it.

    of_rank: sequences of one data-parallel rank in a step
    ranks:   that are data-parallel; None where the number of processes is not known
    whole:   the global batch that another key gives
    """
    flags: Flags = {"--micro-batch-size": (str(micro),)}
    if whole:
        return Answer(flags)
    if ranks is None:
        return near(flags, "no global batch size without the number of processes: give --global-batch-size")
    return Answer({**flags, "--global-batch-size": (str(of_rank * ranks),)})


def _accumulation(found: Any, config: ForeignConfig) -> Answer:
    if config.number("train_micro_batch_size_per_gpu", "--micro-batch-size"):
        return Answer({}, Outcome.IGNORED, "follows from both batch sizes")
    ranks, batch = replicas(config), config.number("train_batch_size", "--global-batch-size")
    if ranks is None or batch is None:
        return not_here("needs the number of processes and the batch: give --micro-batch-size")
    if batch % (int(found) * ranks):
        return not_here(f"{batch} sequences do not divide by {found} steps of {ranks} ranks: give --micro-batch-size")
    return Answer({"--micro-batch-size": (str(batch // (int(found) * ranks)),)})


def _loss_scale(found: Any, _: ForeignConfig) -> Answer:
    return Answer({} if float(found) == 0 else {"--loss-scale": (text(found),)})


def _initial_scale(found: Any, _: ForeignConfig) -> Answer:
    power = int(found)
    if not 0 <= power <= 64:
        raise ValueError(power)
    return Answer({"--initial-loss-scale": (str(2**power),)})


def _warmup(found: Any, _: ForeignConfig) -> Answer:
    if str(found) == "linear":
        return Answer({})
    return near({}, "the learning rate grows linearly here")


def _schedule(found: Any, config: ForeignConfig) -> Answer:
    styles = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if found not in styles:
        return not_here("no such schedule here: choose one with --lr-decay-style")
    flags = {"--lr-decay-style": (styles[found],)}
    if config.values.get("scheduler.params.warmup_type", "log") == "linear":
        return Answer(flags)
    return near(flags, "warms up linearly, there by the logarithm unless warmup_type is linear")


def _min_ratio(found: Any, config: ForeignConfig) -> Answer:
    rate = config.beside.get("--lr", (config.values.get("optimizer.params.lr"),))[0]
    if rate in (None, "auto"):
        return not_here("needs the learning rate: give --min-lr")
    return Answer({"--min-lr": (text(float(found) * float(rate)),)})


def _bucket(found: Any, config: ForeignConfig) -> Answer:
    if (config.number("zero_optimization.stage") or 0) > 1:
        return Answer({}, Outcome.IGNORED, "Megatron-FSDP sends gradients layer by layer")
    return near(
        {"--ddp-bucket-size": (text(int(found)),)}, "a bucket holds whole parameters, at least so many elements"
    )


def _quantised(taken: Answer) -> Callable[[Any, ForeignConfig], Answer]:
    def read(found: Any, config: ForeignConfig) -> Answer:
        if not is_true(found):
            return Answer({})
        level = config.number("zero_optimization.stage")
        if not level or sharded(level, pipeline_of(config)):
            return not_here("Megatron-FSDP has collectives of its own: take stage 1")
        if is_true(config.values.get("fp16.enabled", False)):
            return not_here("take bf16 in the place of fp16")
        return taken

    return read


def _offload(found: Any, config: ForeignConfig) -> Answer:
    device = found if isinstance(found, str) else "cpu" if is_true(found) else "none"
    if device == "none":
        return Answer({})
    if device == "cpu" and sharded(config.number("zero_optimization.stage"), pipeline_of(config)):
        return not_here(NO_HOST)
    if device == "cpu":
        return near(words(OFFLOAD), "Adam's states and steps on the host, weights and gradients stay on the GPU")
    if device == "nvme" and not sharded(config.number("zero_optimization.stage"), pipeline_of(config)):
        return _on_disk(config)
    return not_here("no optimizer states on disk beside Megatron-FSDP: take stage 1, or more ranks")


def _on_disk(config: ForeignConfig) -> Answer:
    path = config.values.get("zero_optimization.offload_optimizer.nvme_path")
    if path is None:
        return not_here("needs the directory: give --optimizer-state-dir")
    flags = {"--optimizer-state-dir": (text(path),)}
    half = any(is_true(config.values.get(f"{name}.enabled", False)) for name in ("bf16", "fp16"))
    return near(
        {**flags, **({"--optimizer-state-weights": ()} if half else {})}, "Adam steps on the GPU, there on the host"
    )


def _partitioned(found: Any, config: ForeignConfig) -> Answer:
    if not is_true(found):
        return Answer({})
    if (config.number(TP, "tensor_parallel.autotp_size") or 1) == 1:
        return Answer({}, Outcome.IGNORED, "shares kept activations over tensor-parallel ranks, of which there is one")
    return not_here("give --sequence-parallel, whose ranks keep their own tokens' activations")


def _sequence_parallel(found: Any, config: ForeignConfig) -> Answer:
    if int(found) == 1:
        return Answer({})
    backend = "fpdt" if "--ds-sequence-parallel-fpdt" in config.values else "ulysses"
    return Answer({CP: (text(int(found)),), "--cp-comm-type": (backend,)})


def _wandb(found: Any, config: ForeignConfig) -> Answer:
    name = config.values.get("wandb.group") or found
    return Answer({"--wandb-project": (str(found),), "--wandb-exp-name": (str(name),)})


_FP16 = "fp16.enabled"
_OF_ZERO = "zero_optimization."
KEYS = (
    derived("train_batch_size", "--global-batch-size VALUE", _global_batch, how=Outcome.MAPPED),
    derived(
        "train_micro_batch_size_per_gpu",
        "--micro-batch-size VALUE, and --global-batch-size where it is not there",
        _micro_batch,
        "the second as VALUE times steps times data-parallel ranks",
    ),
    derived(
        "gradient_accumulation_steps",
        "--micro-batch-size where it is not there",
        _accumulation,
        "the global batch over steps and data-parallel ranks",
    ),
    value("steps_per_print", "--log-interval"),
    value("gradient_clipping", "--clip-grad"),
    switch("wall_clock_breakdown", "--timing-log-level 2"),
    # precision
    switch("fp16.enabled", "--fp16"),
    when(_FP16, derived("fp16.loss_scale", "0: nothing; else --loss-scale VALUE", _loss_scale, how=Outcome.MAPPED)),
    when(
        _FP16,
        derived("fp16.initial_scale_power", "--initial-loss-scale 2^VALUE", _initial_scale, how=Outcome.MAPPED),
    ),
    when(_FP16, value("fp16.loss_scale_window", "--loss-scale-window")),
    when(_FP16, value("fp16.hysteresis", "--hysteresis")),
    when(_FP16, value("fp16.min_loss_scale", "--min-loss-scale")),
    refused("fp16.auto_cast", "Megatron keeps the whole model in half precision"),
    refused("fp16.fp16_master_weights_and_grads bf16.bf16_master_weights_and_grads", "master weights are float32"),
    ignored("fp16.consecutive_hysteresis", "Megatron counts overflows in its own way"),
    switch("bf16.enabled bfloat16.enabled", "--bf16"),
    ignored("bf16.immediate_grad_update bf16.check_grad_overflow", "checks and memory only"),
    refused("amp", "apex's amp: choose fp16 or bf16", section=True),
    choice(
        "data_types.grad_accum_dtype communication_data_type",
        {"fp32": "--accumulate-allreduce-grads-in-fp32", "bf16": "--grad-reduce-in-bf16"},
        other="gradients are float32 or bf16",
    ),
    switch("fp32_allreduce", "--accumulate-allreduce-grads-in-fp32"),
    # optimizer
    choice(
        "optimizer.type",
        {
            "adam": "--optimizer adam",
            "adamw": "--optimizer adam",
            "fusedadam": "--optimizer adam",
            "sgd": "--optimizer sgd",
            "lion": "--optimizer lion",
            "muon": "--optimizer muon",
        },
        other="Megatron has no such optimizer, and trains with Adam unless --optimizer says otherwise",
    ),
    value("optimizer.params.lr", "--lr"),
    value("optimizer.params.weight_decay", "--weight-decay"),
    pair("optimizer.params.betas", ("--adam-beta1", "--adam-beta2")),
    value("optimizer.params.eps", "--adam-eps"),
    value("optimizer.params.momentum", "--sgd-momentum"),
    refused("optimizer.params.amsgrad optimizer.legacy_fusion", "no such Adam in Megatron"),
    choice("optimizer.params.adam_w_mode", {"true": ""}, other="weight decay is decoupled, as in AdamW"),
    ignored("optimizer.params.torch_adam", "the kernel of Adam only"),
    ignored("optimizer.params.max_grad_norm", "gradient_clipping counts"),
    choice("optimizer.params.bias_correction", {"true": "", "1": ""}, other="Megatron's Adam always corrects its bias"),
    refused(
        "optimizer.params.freeze_step optimizer.params.comm_backend_name optimizer.params.cuda_aware "
        "optimizer.params.var_freeze_step optimizer.params.var_update_scaler optimizer.params.local_step_scaler "
        "optimizer.params.local_step_clipper optimizer.params.max_coeff optimizer.params.min_coeff",
        "of 1-bit or 0/1 Adam or LAMB, which are not here; --local-sgd-steps sends less between islands",
    ),
    # learning rate
    derived(
        "scheduler.type",
        "--lr-decay-style constant (WarmupLR), linear (WarmupDecayLR), cosine (WarmupCosineLR)",
        _schedule,
        "others are refused; a warm-up is linear here",
    ),
    value("scheduler.params.warmup_min_lr", "--lr-warmup-init"),
    value("scheduler.params.warmup_max_lr", "--lr"),
    value("scheduler.params.warmup_num_steps", "--lr-warmup-iters"),
    value("scheduler.params.total_num_steps", "--lr-decay-iters"),
    derived("scheduler.params.warmup_type", "", _warmup, "linear is mapped, log approximated by linear"),
    derived("scheduler.params.cos_min_ratio", "--min-lr VALUE times lr", _min_ratio, how=Outcome.MAPPED),
    refused("scheduler.params.warmup_min_ratio", "give --lr-warmup-init"),
    ignored("scheduler.params.last_batch_iteration", "a checkpoint knows its step"),
    # ZeRO
    derived(
        f"{_OF_ZERO}stage",
        "0: nothing; 1: --use-distributed-optimizer; 2: extends training/zero2; 3: extends training/zero3",
        _stage,
        f"1 is mapped; 2 and 3 are approximated: {SHARDED}; beside a pipeline they become 1",
    ),
    switch(f"{_OF_ZERO}overlap_comm", "--overlap-grad-reduce"),
    derived(
        f"{_OF_ZERO}reduce_bucket_size",
        "--ddp-bucket-size VALUE",
        _bucket,
        "approximated for stages 0 and 1: a bucket holds whole parameters; without effect for 2 and 3",
    ),
    ignored(
        " ".join(
            f"{_OF_ZERO}{name}"
            for name in (
                "contiguous_gradients reduce_scatter allgather_partitions allgather_bucket_size sub_group_size "
                "round_robin_gradients ignore_unused_parameters legacy_stage1 use_multi_rank_bucket_allreduce "
                "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
                "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_use_all_reduce_for_fetch_"
                "params stage3_module_granularity_threshold prefetch_bucket_size param_persistence_threshold "
                "max_live_parameters max_reuse_distance memory_efficient_linear log_trace_cache_warnings"
            ).split()
        ),
        "buffers of DeepSpeed's own",
    ),
    ignored(
        " ".join(
            f"{_OF_ZERO}{name}"
            for name in (
                "stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save "
                "stage3_gather_fp16_weights_on_model_save elastic_checkpoint load_from_fp32_weights"
            ).split()
        ),
        "checkpoints are sharded, and any number of ranks loads them",
    ),
    derived(
        f"{_OF_ZERO}offload_optimizer.device {_OF_ZERO}cpu_offload",
        f"cpu: {OFFLOAD}; nvme: --optimizer-state-dir NVME_PATH --optimizer-state-weights",
        _offload,
        "approximated with stage 1: gradients stay on the GPU; refused with 2 and 3",
    ),
    ignored(f"{_OF_ZERO}offload_optimizer.nvme_path", "read with offload_optimizer.device nvme"),
    value(f"{_OF_ZERO}offload_optimizer.ratio", "--optimizer-offload-fraction"),
    switch(f"{_OF_ZERO}offload_optimizer.pin_memory", "", "--no-pin-cpu-grads --no-pin-cpu-params"),
    ignored(
        " ".join(
            f"{_OF_ZERO}{name}"
            for name in (
                "offload_optimizer.buffer_count offload_optimizer.fast_init offload_optimizer.pipeline "
                "offload_optimizer.pipeline_read offload_optimizer.pipeline_write offload_optimizer.max_in_cpu "
                "cpu_offload_use_pin_memory offload_param.pin_memory offload_param.buffer_count "
                "offload_param.buffer_size offload_param.max_in_cpu offload_param.nvme_path"
            ).split()
        ),
        "buffers of DeepSpeed's offloading",
    ),
    refused(
        f"{_OF_ZERO}offload_param.device {_OF_ZERO}cpu_offload_params",
        NO_WEIGHTS_ON_HOST,
        neutral=("none",),
    ),
    refused(f"{_OF_ZERO}zero_hpz_partition_size", OTHER_RANKS, neutral=(1,)),
    refused(f"{_OF_ZERO}mics_shard_size", OTHER_RANKS, neutral=(-1,)),
    refused(f"{_OF_ZERO}mics_hierarchical_params_gather", OTHER_RANKS),
    derived(
        f"{_OF_ZERO}zero_quantized_gradients",
        "--zero-quantized-gradients int8",
        _quantised(near({"--zero-quantized-gradients": ("int8",)}, "8 bits a number, there 4")),
        "approximated with stage 1, and beside a pipeline: 8 bits a number, there 4; refused with 2 and 3, and fp16",
    ),
    derived(
        f"{_OF_ZERO}zero_quantized_weights",
        "--zero-quantized-weights",
        _quantised(Answer({"--zero-quantized-weights": ()})),
        "mapped with stage 1, and beside a pipeline; refused with 2 and 3, and fp16",
    ),
    refused(f"{_OF_ZERO}zero_quantized_nontrainable_weights", "frozen weights travel in the model's dtype"),
    refused(f"{_OF_ZERO}zenflow", "no such optimizer steps here", section=True),
    ignored("zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", "a check of DeepSpeed's own"),
    ignored("aio", "the system reads and writes files of states", section=True),
    # parallel sizes
    derived("sequence_parallel_size", f"{CP} VALUE --cp-comm-type ulysses", _sequence_parallel, how=Outcome.MAPPED),
    value("tensor_parallel.autotp_size", TP),
    value("pipeline.stages", PP),
    ignored("pipeline.partition pipeline.seed_layers pipeline.activation_checkpoint_interval", "of pipeline modules"),
    # activations
    derived(
        "activation_checkpointing.partition_activations",
        "",
        _partitioned,
        "without effect on one tensor-parallel rank, else refused: give --sequence-parallel",
    ),
    refused(
        "activation_checkpointing.cpu_checkpointing",
        "give --pp-offload with a schedule, or --cp-chunks, which keep activations on the host",
    ),
    ignored(
        "activation_checkpointing.number_checkpoints activation_checkpointing.contiguous_memory_optimization "
        "activation_checkpointing.synchronize_checkpoint_boundary activation_checkpointing.profile "
        "activation_checkpointing.use_reentrant",
        "--recompute-granularity and kin choose what is recomputed",
    ),
    # what changes what is trained
    refused(
        "curriculum_learning data_efficiency",
        "sequences have one length for the whole run, and all tokens of all layers are trained",
        section=True,
    ),
    refused(
        "progressive_layer_drop eigenvalue quantize_training compression_training sparse_attention",
        "Megatron has no such training",
        section=True,
    ),
    refused("sparse_gradients", "gradients of embeddings are dense"),
    refused("seq_parallel_communication_data_type", "messages are in the model's dtype", neutral=("bf16",)),
    refused("hybrid_engine", "generation is not part of training here", section=True),
    refused("autotuning", "use `megatron-cp plan`", section=True),
    refused("elasticity", "a run has one size; its checkpoints load on others", section=True),
    # what is watched and saved
    switch("flops_profiler.enabled", "--log-throughput", near="the whole step's rate, not that of each module"),
    ignored("flops_profiler", "one rate for the whole step", section=True),
    value("tensorboard.output_path", "--tensorboard-dir"),
    ignored("tensorboard.enabled tensorboard.job_name", "--tensorboard-dir turns it on"),
    derived("wandb.project", "--wandb-project VALUE --wandb-exp-name GROUP", _wandb, how=Outcome.MAPPED),
    ignored("wandb.group", "the run's name, beside wandb.project"),
    value("wandb.team", "--wandb-entity"),
    ignored("wandb.enabled", "--wandb-project turns it on"),
    ignored("csv_monitor comms_logger comet dump_state memory_breakdown", "logs of DeepSpeed's own", section=True),
    refused("checkpoint.load_universal", "checkpoints of DeepSpeed are not read"),
    ignored("checkpoint nebula datastates_ckpt", "Megatron's checkpoints have flags of their own", section=True),
    ignored(
        "prescale_gradients gradient_predivide_factor disable_allgather dataloader_drop_last compile graph_harvesting "
        "use_data_before_expert_parallelism timers",
        "the order in which DeepSpeed computes or sends",
        section=True,
    ),
)

SYSTEM = System(
    name="deepspeed",
    title="DeepSpeed",
    files="a JSON config",
    keys=KEYS,
    absent=(
        Absent(
            ("gradient_clipping",), "--clip-grad 0", "DeepSpeed clips nothing by default, Megatron at 1: --clip-grad 0"
        ),
    ),
)


NO_DROPPING = "--disable-moe-token-dropping"
# flags of Megatron-DeepSpeed whose defaults are not Megatron's: the flag here and that default
_EXPERTS = {
    "--topk": ("--moe-router-topk", "1"),
    "--moe-loss-coeff": ("--moe-aux-loss-coeff", "0.1"),
    "--moe-train-capacity-factor": ("--moe-expert-capacity-factor", "1.0"),
    "--expert-interval": ("--moe-layer-freq", "2"),
}


def _tokens(flag: str) -> Any:
    def taken(found: Any, config: ForeignConfig) -> Answer:
        length = config.number("--seq-length")
        if not length:
            return not_here(f"needs --seq-length: give {flag}")
        return near({flag: (str(max(1, int(found) // length)),)}, "counted in whole sequences")

    return taken


def _fpdt_chunk(found: Any, config: ForeignConfig) -> Answer:
    length = config.number("--seq-length")
    if not length or length % int(found):
        return not_here("needs a --seq-length that it divides: give --cp-chunks")
    return Answer({"--cp-chunks": (str(length // int(found)),)})


def _experts(found: Any, config: ForeignConfig) -> Answer:
    several = found if isinstance(found, list | tuple) else [found]
    if len(set(map(str, several))) > 1:
        return not_here("all layers have the same number of experts: give --num-experts")
    if int(several[0]) == 1:
        return Answer({})
    flags: Flags = {"--num-experts": (text(int(several[0])),), "--moe-router-pre-softmax": ()}
    flags |= {flag: (default,) for name, (flag, default) in _EXPERTS.items() if name not in config.values}
    if NO_DROPPING in config.values:
        flags.pop("--moe-expert-capacity-factor", None)
    return near(flags, "Megatron's router with the defaults of DeepSpeed's gate")


def _capacity(found: Any, config: ForeignConfig) -> Answer:
    if NO_DROPPING in config.values:
        return Answer({}, Outcome.IGNORED, "no tokens are dropped")
    return Answer({"--moe-expert-capacity-factor": (text(found),)})


def _groups(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--group-query-attention": (), "--num-query-groups": (text(int(found)),)})


FLAGS = (
    ignored(
        "--deepspeed --deepspeed_mpi --deepspeed-mpi --no-pipeline-parallel --local_rank", "Megatron runs by itself"
    ),
    ignored("--deepspeed_config --deepspeed-config", "its keys are above"),
    ignored("zero_optimization.stage", "read above"),
    derived(
        "--zero-stage",
        "as zero_optimization.stage",
        lambda found, config: (
            Answer({}, Outcome.IGNORED, "the config's zero_optimization.stage counts")
            if "zero_optimization.stage" in config.values
            else stage(found, config.number(PP) or 1)
        ),
    ),
    derived(
        "--ds-sequence-parallel-size", f"{CP} VALUE --cp-comm-type ulysses", _sequence_parallel, how=Outcome.MAPPED
    ),
    switch("--ds-sequence-parallel-fpdt", "--cp-comm-type fpdt"),
    derived(
        "--ds-sequence-parallel-fpdt-chunk-size",
        "--cp-chunks of the sequence over VALUE",
        _fpdt_chunk,
        how=Outcome.MAPPED,
    ),
    ignored("--ds-sequence-parallel-fpdt-offloading", "fpdt keeps chunks on the host"),
    ignored(
        "--deepspeed-activation-checkpointing --contigious-checkpointing --synchronize-each-layer --profile-backward",
        "--checkpoint-activations or --recompute-granularity choose what is recomputed",
    ),
    switch(
        "--checkpoint-activations",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    refused("--checkpoint-in-cpu --split-transformers", "give --pp-offload with a schedule, or --cp-chunks"),
    refused("--partition-activations", "give --sequence-parallel"),
    switch("--cpu-optimizer", OFFLOAD, near="Adam's states and steps on the host"),
    ignored("--cpu_torch_adam --cpu-torch-adam", "the kernel of Adam only"),
    derived("--train-tokens", "--train-samples", _tokens("--train-samples"), "VALUE over --seq-length"),
    derived("--lr-decay-tokens", "--lr-decay-samples", _tokens("--lr-decay-samples"), "VALUE over --seq-length"),
    derived("--lr-warmup-tokens", "--lr-warmup-samples", _tokens("--lr-warmup-samples"), "VALUE over --seq-length"),
    derived("--num-key-value-heads", "--group-query-attention --num-query-groups VALUE", _groups, how=Outcome.MAPPED),
    choice("--normalization", {"rmsnorm": "--normalization RMSNorm", "layernorm": "--normalization LayerNorm"}),
    value("--rotary-position-embeddings-theta --rope-theta", "--rotary-base"),
    ignored(
        "--use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder",
        "--cp-kernel auto takes the fastest kernel",
    ),
    ignored("--data-impl --no-query-key-layer-scaling --no-async-tensor-model-parallel-allreduce", "settings no more"),
    ignored("--log-batch-size-to-tensorboard --log-learning-rate-to-tensorboard", "always logged"),
    ignored("--log-optimizer-states-to-tensorboard", "not logged here"),
    # experts
    derived(
        "--num-experts",
        "1: nothing; else --num-experts VALUE --moe-router-pre-softmax, and the four below with DeepSpeed's defaults",
        _experts,
        "approximated: Megatron's router",
    ),
    value("--moe-expert-parallel-size", "--expert-model-parallel-size"),
    value("--topk", "--moe-router-topk"),
    value("--moe-loss-coeff", "--moe-aux-loss-coeff"),
    derived("--moe-train-capacity-factor", "--moe-expert-capacity-factor VALUE", _capacity, how=Outcome.MAPPED),
    value("--expert-interval", "--moe-layer-freq"),
    ignored(NO_DROPPING, "no capacity, and no tokens are dropped"),
    refused("--moe-eval-capacity-factor --moe-min-capacity", "one capacity for training and evaluation"),
    ignored("--create-moe-param-group --enable-expert-tensor-parallelism --use-tutel", "how DeepSpeed computes"),
    choice(
        "--mlp-type", {"standard": ""}, other="no residual experts: --moe-shared-expert-intermediate-size is nearest"
    ),
    # what changes what is trained
    refused(
        "--curriculum-learning --curriculum-learning-legacy --data-efficiency-curriculum-learning --random-ltd "
        "--bert-random-ltd --kd --mos --compression-training",
        "Megatron has no such training",
    ),
    refused("--universal-checkpoint --load-universal", "checkpoints of DeepSpeed are not read"),
)

COMMAND = System(
    name="megatron-deepspeed",
    title="Megatron-DeepSpeed",
    files="a command line with --deepspeed",
    keys=FLAGS,
)
_OWN = frozenset(name for row in FLAGS for name in row.names)


def flags_of_command(given: Flags) -> tuple[Flags, Flags]:
    """Return the flags that only Megatron-DeepSpeed has, and the others."""
    own = {flag: found for flag, found in given.items() if flag in _OWN}
    return own, {flag: found for flag, found in given.items() if flag not in own}


def as_values(given: Flags) -> dict[str, Any]:
    """Return flags as a config: bare ones are true, several values a list."""
    return {flag: True if not found else found[0] if len(found) == 1 else list(found) for flag, found in given.items()}
