"""NeMo's configs: the YAML files of its first version, and overrides of its second, as words `a.b=c` or in YAML."""

from collections.abc import Callable
from typing import Any

from megatron_cp.recipe.foreign.keys import (
    Answer,
    ForeignConfig,
    Key,
    Outcome,
    System,
    choice,
    derived,
    ignored,
    near,
    not_here,
    pair,
    refused,
    same,
    switch,
    switches,
    text,
    value,
    when,
)
from megatron_cp.recipe.foreign.transformer import FP8_VALUES, chunks, fields, precision

# checkpoints are made so often, or where the run is evaluated
SAVE_INTERVALS = (
    "exp_manager.checkpoint_callback_params.every_n_train_steps",
    "log.ckpt.every_n_train_steps",
    "trainer.val_check_interval",
)


def _count(flag: str) -> Callable[[Any, ForeignConfig], Answer]:
    def taken(found: Any, _: ForeignConfig) -> Answer:
        return Answer({flag: (text(int(found)),)}) if int(found) > 0 else not_here(f"no number: give {flag}")

    return taken


def _accumulate(found: Any, _: ForeignConfig) -> Answer:
    if int(found) == 1:
        return Answer({}, Outcome.IGNORED, "follows from both batch sizes")
    return not_here("follows from both batch sizes: give --global-batch-size")


def _save(found: Any, config: ForeignConfig) -> Answer:
    flags = {"--save": (str(found),), "--load": (str(found),)}
    steps = config.number(*SAVE_INTERVALS)
    if steps:
        return near({**flags, "--save-interval": (str(steps),)}, "checkpoints lie in the folder itself, all are kept")
    return near(flags, "checkpoints lie in the folder itself, all are kept: give --save-interval")


def _eval_interval(found: Any, _: ForeignConfig) -> Answer:
    if isinstance(found, float) and found <= 1:
        return not_here("a share of an epoch: give --eval-interval in steps")
    return Answer({"--eval-interval": (text(int(found)),)})


def _eval_iters(found: Any, _: ForeignConfig) -> Answer:
    if isinstance(found, float) and 0 < found <= 1:
        return not_here("a share of all batches: give --eval-iters")
    return Answer({"--eval-iters": (text(int(found)),)})


def _minutes(found: Any, _: ForeignConfig) -> Answer:
    days, hours, minutes, seconds = map(int, str(found).split(":"))
    return Answer({"--exit-duration-in-mins": (str((days * 24 + hours) * 60 + minutes + seconds // 60),)})


def _seq(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--seq-length": (text(int(found)),)})


def _sentences(found: Any, _: ForeignConfig) -> Answer:
    several = found if isinstance(found, list | tuple) else [found]
    return Answer({"--data-path": tuple(map(str, several))})


def _library(found: Any, config: ForeignConfig) -> Answer:
    kind = str(found).lower()
    model = config.values.get("model.tokenizer.type", config.values.get("model.tokenizer.model"))
    if kind == "huggingface":
        return Answer({"--tokenizer-type": ("HuggingFaceTokenizer",), "--tokenizer-model": (str(model),)})
    if kind == "sentencepiece":
        return Answer({"--tokenizer-type": ("SentencePieceTokenizer",)})
    if kind == "megatron":
        return Answer({"--tokenizer-type": ("GPT2BPETokenizer",)})
    return not_here("give --tokenizer-type and --tokenizer-model")


def _name(found: Any, config: ForeignConfig) -> Answer:
    if str(found).startswith("huggingface") or "library" in str(found):
        return not_here("give --tokenizer-type and --tokenizer-model")
    return Answer({}, Outcome.IGNORED, "model.tokenizer.library counts")


def _optimizer(found: Any, _: ForeignConfig) -> Answer:
    name = str(found).lower()
    if name in ("mcore_distributed_optim", "distributed_fused_adam"):
        return Answer({"--optimizer": ("adam",), "--use-distributed-optimizer": ()})
    if name in ("fused_adam", "adam", "adamw", "megatron_fused_adam"):
        return Answer({"--optimizer": ("adam",)})
    return not_here("Megatron has no such optimizer, and trains with Adam unless --optimizer says otherwise")


def _constant(found: Any, config: ForeignConfig) -> Answer:
    steps = config.number("trainer.max_steps", "--train-iters")
    if int(found) == 0:
        return Answer({})
    if not steps:
        return not_here("needs trainer.max_steps: give --lr-decay-iters")
    return near({"--lr-decay-iters": (str(steps - int(found)),)}, "the rate stays at its minimum for the last steps")


def _layers_of_recompute(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--recompute-num-layers": (text(int(found)),)})


def _fp8(found: Any, config: ForeignConfig) -> Answer:
    if str(found).lower() != "true":
        return Answer({})
    e4m3 = str(config.values.get("model.fp8_e4m3")).lower() == "true"
    return Answer({"--fp8-format": ("e4m3" if e4m3 else "hybrid",)})


def _scale(found: Any, config: ForeignConfig) -> Answer:
    if str(config.values.get("trainer.precision")).lower().startswith(("16", "fp16")):
        return Answer({"--initial-loss-scale": (text(found),)})
    return Answer({}, Outcome.IGNORED, "of fp16")


def _window(found: Any, config: ForeignConfig) -> Answer:
    if str(config.values.get("trainer.precision")).lower().startswith(("16", "fp16")):
        return Answer({"--loss-scale-window": (text(found),)})
    return Answer({}, Outcome.IGNORED, "of fp16")


FIRST = (
    derived("trainer.num_nodes", "--nnodes VALUE", _count("--nnodes"), how=Outcome.MAPPED),
    derived("trainer.devices", "--nproc-per-node VALUE", _count("--nproc-per-node"), how=Outcome.MAPPED),
    derived("trainer.precision trainer.plugins.precision", "--bf16 or --fp16", precision, how=Outcome.MAPPED),
    derived("trainer.max_steps", "--train-iters VALUE", _count("--train-iters"), how=Outcome.MAPPED),
    value("trainer.log_every_n_steps", "--log-interval"),
    derived("trainer.val_check_interval", "--eval-interval VALUE", _eval_interval, "a share of an epoch is refused"),
    derived("trainer.limit_val_batches", "--eval-iters VALUE", _eval_iters, "a share of all batches is refused"),
    derived("trainer.max_time", "--exit-duration-in-mins", _minutes, how=Outcome.MAPPED),
    value("trainer.gradient_clip_val", "--clip-grad"),
    derived("trainer.accumulate_grad_batches", "", _accumulate, "1 is without effect, others refused"),
    refused("trainer.max_epochs", "runs are counted in steps: trainer.max_steps", neutral=(1, -1)),
    ignored(
        "trainer.logger trainer.enable_checkpointing trainer.use_distributed_sampler trainer.replace_sampler_ddp "
        "trainer.accelerator trainer.benchmark trainer.enable_model_summary trainer.limit_test_batches "
        "trainer.num_sanity_val_steps trainer.callbacks trainer.strategy trainer.enable_progress_bar name",
        "of Lightning's trainer",
    ),
    ignored("run cluster hydra defaults training stages base_results_dir data_dir", "of NeMo's launcher", section=True),
    derived(
        "exp_manager.explicit_log_dir exp_manager.exp_dir",
        "--save VALUE --load VALUE --save-interval",
        _save,
        Outcome.APPROXIMATED,
    ),
    value("exp_manager.wandb_logger_kwargs.project", "--wandb-project"),
    value("exp_manager.wandb_logger_kwargs.name exp_manager.name", "--wandb-exp-name"),
    value("exp_manager.checkpoint_callback_params.every_n_train_steps", "--save-interval"),
    switch("exp_manager.log_step_timing", "--log-throughput", near="a line for each log interval"),
    refused("exp_manager.ema", "no moving average of weights", section=True),
    refused("exp_manager.create_early_stopping_callback", "a run ends at --train-iters"),
    ignored("exp_manager", "Megatron resumes from --load, and keeps all checkpoints", section=True),
    *same("model", "micro_batch_size global_batch_size rampup_batch_size seed"),
    value("model.gc_interval", "--manual-gc-interval", near="with --manual-gc"),
    derived("model.encoder_seq_length model.data.seq_length", "--seq-length VALUE", _seq, how=Outcome.MAPPED),
    value("model.rotary_percentage", "--rotary-percent"),
    value("model.seq_len_interpolation_factor", "--rotary-seq-len-interpolation-factor"),
    choice("model.bias", {"true": "", "false": "--disable-bias-linear"}),
    choice(
        "model.activation",
        {
            "gelu": "",
            "swiglu": "--swiglu",
            "fast-swiglu": "--swiglu",
            "squared-relu": "--squared-relu",
        },
        other="the activations are gelu, swiglu and squared-relu",
    ),
    ignored("model.megatron_amp_O2", "gradients and optimizer are in float32 beside half precision"),
    choice("model.use_scaled_init_method", {"true": ""}, other="output layers always start smaller"),
    choice(
        "model.transformer_engine",
        {"true": "--transformer-impl transformer_engine", "false": "--transformer-impl local"},
    ),
    derived("model.fp8", "true: --fp8-format hybrid, or e4m3 with fp8_e4m3", _fp8, how=Outcome.MAPPED),
    ignored("model.fp8_e4m3 model.fp8_hybrid", "model.fp8 counts"),
    *(when("model.fp8", row) for row in same("model", FP8_VALUES)),
    switch("model.ub_tp_comm_overlap", "--tp-comm-overlap"),
    refused("model.ub_tp_comm_overlap_cfg", "give --tp-comm-overlap-cfg FILE", section=True),
    derived("model.native_amp_init_scale", "--initial-loss-scale VALUE", _scale, "with fp16 only"),
    derived("model.native_amp_growth_interval", "--loss-scale-window VALUE", _window, "with fp16 only"),
    value("model.hysteresis", "--hysteresis"),
    switch("model.fp16_lm_cross_entropy", "--fp16-lm-cross-entropy"),
    switch("model.openai_gelu", "--openai-gelu"),
    switch("model.use_cpu_initialization", "--use-cpu-initialization"),
    value("model.activations_checkpoint_granularity", "--recompute-granularity"),
    value("model.activations_checkpoint_method", "--recompute-method"),
    derived("model.activations_checkpoint_num_layers", "--recompute-num-layers VALUE", _layers_of_recompute),
    refused(
        "model.num_micro_batches_with_partial_activation_checkpoints model.activations_checkpoint_layers_per_pipeline",
        "recomputation is the same for all microbatches and stages",
    ),
    refused("model.headscale model.ffn_dropout model.use_emha", "Megatron has no such layer", neutral=(0.0,)),
    choice("model.transformer_block_type", {"pre_ln": ""}, other="norms stand before each block"),
    choice("model.attention_type", {"multihead": ""}, other="give the flags of the attention"),
    choice("model.normalize_attention_scores", {"true": ""}, other="scores are always scaled"),
    switch("model.do_layer_norm_weight_decay", "--apply-wd-to-qk-layernorm", near="for the norms of queries and keys"),
    ignored(
        "model.mcore_gpt model.grad_allreduce_chunk_size_mb model.grad_div_ar_fusion model.onnx_safe "
        "model.apex_transformer_log_level model.gradient_as_bucket_view model.sync_batch_comm "
        "model.use_flash_attention "
        "model.get_attention_mask_from_fusion model.reduce_amax model.precision model.target model.nemo_version",
        "how NeMo computes",
    ),
    value("model.resume_from_checkpoint model.restore_from_path", "--load", near="of Megatron's own checkpoints"),
    derived("model.tokenizer.library", "--tokenizer-type and --tokenizer-model", _library, "others are refused"),
    ignored(
        "model.tokenizer.type model.tokenizer.use_fast model.tokenizer.delimiter", "model.tokenizer.library counts"
    ),
    value("model.tokenizer.model", "--tokenizer-model"),
    value("model.tokenizer.vocab_file", "--vocab-file"),
    value("model.tokenizer.merge_file", "--merge-file"),
    switch("model.tokenizer.sentencepiece_legacy", "--tokenizer-sentencepiece-legacy"),
    switch("model.nsys_profile.enabled", "--profile"),
    ignored("model.nsys_profile", "of the profiler", section=True),
    derived("model.optim.name optim.config.optimizer", "--optimizer adam --use-distributed-optimizer", _optimizer),
    value("model.optim.lr", "--lr"),
    value("model.optim.weight_decay", "--weight-decay"),
    pair("model.optim.betas", ("--adam-beta1", "--adam-beta2")),
    value("model.optim.eps", "--adam-eps"),
    switch("model.optim.overlap_grad_sync", "--overlap-grad-reduce"),
    switch("model.optim.overlap_param_sync", "--overlap-param-gather"),
    choice(
        "model.optim.grad_sync_dtype", {"fp32": "--accumulate-allreduce-grads-in-fp32", "bf16": "--grad-reduce-in-bf16"}
    ),
    ignored(
        "model.optim.bucket_cap_mb model.optim.contiguous_grad_buffer model.optim.contiguous_param_buffer "
        "model.optim.dtype model.optim.capturable model.optim.ub_tp_comm_overlap",
        "buffers of NeMo's own",
    ),
    choice(
        "model.optim.sched.name",
        {
            "cosineannealing": "--lr-decay-style cosine",
            "warmupannealing": "--lr-decay-style linear",
            "warmuppolicy": "--lr-decay-style constant",
        },
        other="choose one with --lr-decay-style",
    ),
    value("model.optim.sched.warmup_steps", "--lr-warmup-iters"),
    derived("model.optim.sched.constant_steps", "--lr-decay-iters max_steps - VALUE", _constant, "approximated"),
    value("model.optim.sched.min_lr", "--min-lr"),
    derived("model.data.data_prefix", "--data-path VALUES", _sentences, how=Outcome.MAPPED),
    value("model.data.splits_string", "--split"),
    value("model.data.num_workers", "--num-workers"),
    value("model.data.dataloader_type", "--dataloader-type"),
    value("model.data.index_mapping_dir", "--data-cache-path"),
    *switches("model.data", "reset_position_ids reset_attention_mask eod_mask_loss"),
    switch("model.data.mock_dataset", "--mock-data"),
    ignored(
        "model.data.data_impl model.data.skip_warmup model.data.validation_drop_last model.data.shuffle_documents "
        "model.data.no_seqlen_plus_one_input_tokens model.data.pad_samples_to_global_batch_size "
        "model.data.exchange_indices_distributed model.data.data_cache_generation_only",
        "how NeMo builds its corpus",
    ),
)


def _second() -> list[Key]:
    strategy = "trainer.strategy"
    return [
        *same(
            strategy,
            "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
            "expert_tensor_parallel_size",
        ),
        switch(f"{strategy}.sequence_parallel", "--sequence-parallel"),
        derived(
            f"{strategy}.virtual_pipeline_model_parallel_size",
            "--num-virtual-stages-per-pipeline-rank VALUE",
            chunks,
            how=Outcome.MAPPED,
        ),
        *switches(f"{strategy}.ddp", "use_distributed_optimizer overlap_grad_reduce overlap_param_gather"),
        switch(f"{strategy}.ddp.grad_reduce_in_fp32", "--accumulate-allreduce-grads-in-fp32", "--grad-reduce-in-bf16"),
        switch(f"{strategy}.ddp.average_in_collective", "--ddp-average-in-collective"),
        ignored(f"{strategy}.ddp.check_for_nan_in_grad", "gradients are checked"),
        *fields("model.config"),
        *same("data", "micro_batch_size global_batch_size seq_length num_workers split"),
        value("data.paths", "--data-path"),
        *same("optim.config", "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad"),
        switch("optim.config.use_distributed_optimizer", "--use-distributed-optimizer"),
        switch("optim.config.bf16", "--bf16"),
        switch("optim.config.fp16", "--fp16"),
        value("optim.lr_scheduler.warmup_steps", "--lr-warmup-iters"),
        value("optim.lr_scheduler.min_lr", "--min-lr"),
        derived("optim.lr_scheduler.constant_steps", "--lr-decay-iters", _constant, "max_steps - VALUE, approximated"),
        derived(
            "log.log_dir log.explicit_log_dir log.dir",
            "--save VALUE --load VALUE --save-interval",
            _save,
            "approximated",
        ),
        value("log.ckpt.every_n_train_steps", "--save-interval"),
        refused("resume.restore_config resume.resume_from_path", "checkpoints of NeMo are not read", section=True),
        ignored("log resume", "Megatron resumes from --load, and keeps all checkpoints", section=True),
        refused("peft", "all weights are trained", section=True),
    ]


def _rest() -> list[Key]:
    """Return the fields of the model that have no row of their own above."""
    above = {name for row in FIRST for name in row.names}
    return [row for row in fields("model") if not set(row.names) & above]


SYSTEM = System(
    name="nemo",
    title="NeMo",
    files="a YAML config, or words a.b=c",
    keys=(*FIRST, *_second(), *_rest()),
)
