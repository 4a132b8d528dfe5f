"""Megatron-Bridge's overrides: sections of its ConfigContainer, as words `a.b=c` or in YAML."""

from typing import Any

from megatron_cp.recipe.foreign.keys import (
    Answer,
    ForeignConfig,
    Outcome,
    System,
    choice,
    derived,
    ignored,
    is_true,
    near,
    refused,
    same,
    switch,
    switches,
    text,
    value,
)
from megatron_cp.recipe.foreign.transformer import FP8_VALUES, fields, precision


def _fsdp(found: Any, config: ForeignConfig) -> Answer:
    if not is_true(found):
        return Answer({})
    strategy = config.values.get("ddp.data_parallel_sharding_strategy", "optim_grads_params")
    level = "training/zero2" if strategy == "optim_grads" else "training/zero3"
    return near({}, "with the settings of our preset, whose checkpoints are fsdp_dtensor", level)


def _strategy(found: Any, config: ForeignConfig) -> Answer:
    flag = "--data-parallel-sharding-strategy"
    return Answer({flag: (str(found),)})


def _length(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--seq-length": (text(int(found)),)})


def _blend(found: Any, _: ForeignConfig) -> Answer:
    paths, weights = found if isinstance(found, list) and found and isinstance(found[0], list) else (found, None)
    several = paths if isinstance(paths, list) else [paths]
    if weights is None:
        return Answer({"--data-path": tuple(map(str, several))})
    pairs = zip(weights, several, strict=True)
    return Answer({"--data-path": tuple(str(word) for pair in pairs for word in pair)})


def _tokenizer_model(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--tokenizer-model": (str(found),)})


KEYS = (
    *fields("model"),
    *same("train", "train_iters train_samples micro_batch_size global_batch_size eval_iters eval_interval"),
    *same(
        "train", "exit_interval exit_duration_in_mins manual_gc_interval empty_unused_memory_level rampup_batch_size"
    ),
    *same("validation", "eval_iters eval_interval"),
    *switches("train", "manual_gc exit_signal_handler"),
    *same("optimizer", "optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad decoupled_lr"),
    *same("optimizer", "decoupled_min_lr sgd_momentum optimizer_offload_fraction loss_scale initial_loss_scale"),
    *same("optimizer", "min_loss_scale loss_scale_window hysteresis main_grads_dtype exp_avg_dtype exp_avg_sq_dtype"),
    *switches("optimizer", "use_distributed_optimizer use_precision_aware_optimizer optimizer_cpu_offload"),
    switch("optimizer.bf16", "--bf16"),
    switch("optimizer.fp16", "--fp16"),
    ignored("optimizer.params_dtype", "follows from other flags"),
    *same("scheduler", "lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples"),
    *same("scheduler", "lr_warmup_fraction lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters"),
    *same("scheduler", "start_weight_decay end_weight_decay weight_decay_incr_style"),
    switch("scheduler.override_opt_param_scheduler", "--override-opt-param-scheduler"),
    switch("scheduler.use_checkpoint_opt_param_scheduler", "--use-checkpoint-opt-param-scheduler"),
    derived("dataset.sequence_length dataset.seq_length", "--seq-length VALUE", _length, how=Outcome.MAPPED),
    *same("dataset", "num_workers split data_path dataloader_type"),
    *switches("dataset", "reset_position_ids reset_attention_mask eod_mask_loss"),
    derived("dataset.blend dataset.train_data_path", "--data-path VALUES", _blend, how=Outcome.MAPPED),
    value("dataset.path_to_cache", "--data-cache-path"),
    value("dataset.random_seed rng.seed", "--seed"),
    ignored(
        "dataset.persistent_workers dataset.pin_memory dataset.data_sharding dataset.skip_getting_attention_mask_from"
        "_dataset",
        "how batches are loaded",
    ),
    *switches("ddp", "use_distributed_optimizer overlap_grad_reduce overlap_param_gather use_megatron_fsdp"),
    *same("ddp", "num_distributed_optimizer_instances outer_dp_sharding_strategy"),
    derived(
        "ddp.data_parallel_sharding_strategy", "--data-parallel-sharding-strategy VALUE", _strategy, how=Outcome.MAPPED
    ),
    value("ddp.bucket_size", "--ddp-bucket-size"),
    switch("ddp.average_in_collective", "--ddp-average-in-collective"),
    switch("ddp.align_param_gather", "", "--no-align-param-gather"),
    switch("ddp.gradient_reduce_div_fusion", "", "--no-gradient-reduce-div-fusion"),
    switch(
        "ddp.check_for_nan_in_grad rerun_state_machine.check_for_nan_in_loss", "", "--no-check-for-nan-in-loss-and-grad"
    ),
    switch("ddp.check_for_large_grads", "--check-for-large-grads"),
    switch(
        "ddp.grad_reduce_in_fp32 mixed_precision.grad_reduce_in_fp32",
        "--accumulate-allreduce-grads-in-fp32",
        "--grad-reduce-in-bf16",
    ),
    switch("ddp.nccl_ub", "--use-nccl-ub"),
    switch("ddp.fsdp_double_buffer", "--fsdp-double-buffer"),
    switch(
        "ddp.keep_fp8_transpose_cache ddp.keep_fp8_transpose_cache_when_using_custom_fsdp", "--keep-fp8-transpose-cache"
    ),
    derived("dist.use_megatron_fsdp", "true: extends training/zero2 or training/zero3", _fsdp, "approximated"),
    switch("dist.use_torch_fsdp2", "--use-torch-fsdp2"),
    switch("dist.use_tp_pp_dp_mapping", "--use-tp-pp-dp-mapping"),
    switch("dist.use_gloo_process_groups", "", "--disable-gloo-process-groups"),
    switch("dist.enable_megatron_core_experimental", "--enable-experimental"),
    value("dist.distributed_timeout_minutes", "--distributed-timeout-minutes"),
    value("dist.distributed_backend", "--distributed-backend"),
    ignored("dist.use_decentralized_pg dist.lazy_init dist.align_grad_reduce dist.local_rank", "how groups are made"),
    *same("checkpoint", "save load save_interval ckpt_format ckpt_step non_persistent_save_interval"),
    *same("checkpoint", "non_persistent_ckpt_type dist_ckpt_strictness pretrained_checkpoint"),
    *switches("checkpoint", "async_save finetune ckpt_assume_constant_structure exit_on_missing_checkpoint"),
    switch("checkpoint.save_optim", "", "--no-save-optim"),
    switch("checkpoint.save_rng", "", "--no-save-rng"),
    switch("checkpoint.load_optim", "", "--no-load-optim"),
    switch("checkpoint.load_rng", "", "--no-load-rng"),
    switch("checkpoint.fully_parallel_save", "", "--no-ckpt-fully-parallel-save"),
    switch("checkpoint.fully_parallel_load", "--ckpt-fully-parallel-load"),
    ignored("checkpoint.most_recent_k", "all checkpoints are kept"),
    *same("logger", "log_interval tensorboard_dir tensorboard_log_interval timing_log_level timing_log_option"),
    *same("logger", "wandb_project wandb_exp_name wandb_entity wandb_save_dir logging_level"),
    *switches("logger", "log_throughput log_progress log_timers_to_tensorboard log_memory_to_tensorboard"),
    *switches("logger", "log_validation_ppl_to_tensorboard log_params_norm log_num_zeros_in_grad log_energy"),
    ignored("logger.filter_warnings logger.modules_to_filter logger.set_level_for_all_loggers", "what is printed"),
    choice(
        "tokenizer.tokenizer_type",
        {
            "nulltokenizer": "--tokenizer-type NullTokenizer",
            "huggingfacetokenizer": "--tokenizer-type HuggingFaceTokenizer",
            "sentencepiecetokenizer": "--tokenizer-type SentencePieceTokenizer",
            "gpt2bpetokenizer": "--tokenizer-type GPT2BPETokenizer",
            "tiktokentokenizer": "--tokenizer-type TikTokenizer",
        },
        other="give --tokenizer-type",
    ),
    derived("tokenizer.tokenizer_model", "--tokenizer-model VALUE", _tokenizer_model, how=Outcome.MAPPED),
    value("tokenizer.vocab_size", "--vocab-size"),
    value("tokenizer.vocab_file", "--vocab-file"),
    value("tokenizer.merge_file", "--merge-file"),
    switch("rng.te_rng_tracker", "--te-rng-tracker"),
    switch("rng.data_parallel_random_init", "--data-parallel-random-init"),
    derived(
        "mixed_precision mixed_precision.name",
        "--bf16, --fp16, --fp8-format, --fp8-recipe",
        precision,
        "by name",
        Outcome.MAPPED,
    ),
    *same(
        "mixed_precision",
        f"{FP8_VALUES} num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
    ),
    switch("mixed_precision.first_last_layers_bf16", "--first-last-layers-bf16"),
    ignored(
        "mixed_precision.params_dtype mixed_precision.pipeline_dtype mixed_precision.autocast_dtype "
        "mixed_precision.autocast_enabled mixed_precision._target_",
        "follows from other flags",
    ),
    switch("mixed_precision.bf16", "--bf16"),
    switch("mixed_precision.fp16", "--fp16"),
    value("mixed_precision.fp8", "--fp8-format"),
    switch("mixed_precision.fp8_param_gather mixed_precision.fp8_param", "--fp8-param-gather"),
    switch("comm_overlap.tp_comm_overlap", "--tp-comm-overlap"),
    switch("comm_overlap.overlap_grad_reduce", "--overlap-grad-reduce"),
    switch("comm_overlap.overlap_param_gather", "--overlap-param-gather"),
    switch("comm_overlap.overlap_param_gather_with_optimizer_step", "--overlap-param-gather-with-optimizer-step"),
    switch("comm_overlap.defer_embedding_wgrad_compute", "--defer-embedding-wgrad-compute"),
    value("comm_overlap.wgrad_deferral_limit", "--wgrad-deferral-limit"),
    switch("comm_overlap.align_param_gather", "", "--no-align-param-gather"),
    refused("comm_overlap.tp_comm_overlap_cfg", "names of settings inside Bridge: give --tp-comm-overlap-cfg FILE"),
    ignored("comm_overlap", "Megatron's own settings of its overlaps", section=True),
    switch("profiling.use_nsys_profiler", "--profile"),
    switch("profiling.use_pytorch_profiler", "--profile --use-pytorch-profiler"),
    *same("profiling", "profile_step_start profile_step_end profile_ranks"),
    switch("profiling.record_shapes", "--pytorch-profiler-collect-shapes"),
    switch("profiling.record_memory_history", "--record-memory-history"),
    ignored("profiling", "of profilers", section=True),
    refused("peft", "all weights are trained", section=True),
    refused("perf_matrix", "several runs in one file: give the sizes of one as model.… and train.…", section=True),
    ignored(
        "rerun_state_machine straggler nvrx_straggler ft inprocess_restart tensor_inspect",
        "watches runs of Bridge's own launcher",
        section=True,
    ),
)

# before its first release sections had longer names
RENAMED = {
    f"{name}_config": name
    for name in (
        "model train optimizer scheduler dataset ddp checkpoint logger tokenizer rng dist profiling peft".split()
    )
}

SYSTEM = System(name="bridge", title="Megatron-Bridge", files="words a.b=c, or a YAML file of overrides", keys=KEYS)
