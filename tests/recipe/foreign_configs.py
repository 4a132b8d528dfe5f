"""Public configs and commands of other systems, as our own lists of their keys and values, each with its source."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

# what none of the configs says
RUN = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 50304 --train-iters 100 --lr 1e-4 --eval-interval 100 "
    "--eval-iters 1 --attention-dropout 0 --hidden-dropout 0"
)
GPT2 = f"{RUN} --num-layers 12 --hidden-size 768 --num-attention-heads 12"
LENGTH = "--seq-length 1024 --max-position-embeddings 1024"


class Case(NamedTuple):
    """One config, and what must come of it.

    kind:    suffix of the config's file; empty for words alone
    words:   overrides, or a command, before the flags
    flags:   given beside the config
    becomes: some of the recipe's flags, in one text
    refused: keys that are refused; approximated and unknown likewise
    """

    name: str
    kind: str
    config: dict[str, Any]
    flags: str
    becomes: str
    words: str = ""
    refused: tuple[str, ...] = ()
    approximated: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    extends: tuple[str, ...] = ()
    model: str | None = None
    cluster: str = "h100-ib"

    def write(self, folder: Path) -> list[str]:
        """Write the config's file, and return the words of `megatron-cp import`."""
        file = folder / f"config{self.kind}"
        if self.kind == ".json":
            file.write_text(json.dumps(self.config))
        elif self.kind == ".yaml":
            YAML(typ="safe").dump(self.config, file)
        elif self.kind == ".py":
            file.write_text("".join(f"{name} = {value!r}\n" for name, value in self.config.items()))
        first = [] if self.words and self.kind != ".yaml" else [str(file)]
        return [*first, *self.words.replace("CONFIG", str(file)).split(), *self.flags.split()]


def nested(text: str) -> dict[str, Any]:
    """Return sections from lines `section: key value, key value`, values read as YAML."""
    found: dict[str, Any] = {}
    load = YAML(typ="safe").load
    for line in text.strip().splitlines():
        section, _, pairs = line.strip().partition(": ")
        at = found
        for part in section.split("."):
            at = at.setdefault(part, {}) if part else at
        at |= {pair.split(" ", 1)[0]: load(pair.split(" ", 1)[1]) for pair in pairs.split("; ")}
    return found


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, **more}


FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
STAGE, NO_CLIP = "zero_optimization.stage", "gradient_clipping"

DEEPSPEED = (
    # deepspeed.ai/tutorials/zero: 1.5 billion parameters on eight GPUs with stage 1
    Case(
        "zero-tutorial-stage1",
        ".json",
        {"zero_optimization": zero(1, reduce_bucket_size=5e8)},
        f"{RUN} --num-layers 48 --hidden-size 1600 --num-attention-heads 16 --micro-batch-size 1 {LENGTH} "
        "--global-batch-size 8 --nproc-per-node 8 --bf16",
        "--use-distributed-optimizer --ddp-bucket-size 500000000 --clip-grad 0",
        approximated=("zero_optimization.reduce_bucket_size", NO_CLIP),
    ),
    # the same page: 10 billion parameters on 32 GPUs with stage 2
    Case(
        "zero-tutorial-stage2",
        ".json",
        {
            "zero_optimization": zero(
                2,
                contiguous_gradients=True,
                overlap_comm=True,
                reduce_scatter=True,
                reduce_bucket_size=5e8,
                allgather_bucket_size=5e8,
            )
        },
        f"{RUN} --num-layers 50 --hidden-size 4096 --num-attention-heads 32 --micro-batch-size 1 {LENGTH} "
        "--global-batch-size 32 --nproc-per-node 8 --nnodes 4 --bf16 --untie-embeddings-and-output-weights",
        "--overlap-grad-reduce --clip-grad 0",
        approximated=(STAGE, NO_CLIP),
        extends=("training/zero2",),
    ),
    # the same page: ZeRO-Infinity's offloading to the host
    Case(
        "zero-tutorial-infinity",
        ".json",
        {
            "zero_optimization": zero(
                3,
                contiguous_gradients=True,
                stage3_max_live_parameters=1e9,
                stage3_max_reuse_distance=1e9,
                stage3_prefetch_bucket_size=1e7,
                stage3_param_persistence_threshold=1e5,
                reduce_bucket_size=1e7,
                sub_group_size=1e9,
                offload_optimizer={"device": "cpu"},
                offload_param={"device": "cpu"},
            )
        },
        f"{GPT2} --micro-batch-size 1 {LENGTH} --global-batch-size 8 --nproc-per-node 8 --bf16",
        "--clip-grad 0",
        refused=("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"),
        approximated=(STAGE, NO_CLIP),
        extends=("training/zero3",),
    ),
    # Megatron-DeepSpeed, examples_deepspeed/sequence_parallel: stage 3 with sequence parallelism on four ranks
    Case(
        "megatron-deepspeed-ulysses",
        ".json",
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 1,
            "zero_optimization": zero(3),
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "fp16": {**FP16, "loss_scale_window": 500, "initial_scale_power": 11},
            "wall_clock_breakdown": False,
        },
        f"{GPT2} {LENGTH}",
        "--context-parallel-size 4 --cp-comm-type ulysses --fp16 --initial-loss-scale 2048 --loss-scale-window 500 "
        "--global-batch-size 16 --micro-batch-size 1 --log-interval 1 --clip-grad 1.0",
        words="deepspeed --num_gpus 8 --num_nodes 2 pretrain_gpt.py --deepspeed --deepspeed_config CONFIG "
        "--zero-stage 3 --ds-sequence-parallel-size 4 --no-pipeline-parallel --use-flash-attn-v2",
        approximated=(STAGE,),
        extends=("training/zero3",),
    ),
    # Megatron-DeepSpeed, ds_pretrain_gpt_6.7B_fpdt_32k.sh: FPDT over four ranks, 262,144 tokens
    Case(
        "megatron-deepspeed-fpdt",
        ".json",
        {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}},
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 50304 --lr 1.2e-4 --min-lr 1e-6 --eval-interval 100 "
        "--eval-iters 10 --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 262144 "
        "--max-position-embeddings 262144 --attention-dropout 0 --hidden-dropout 0 --rotary-percent 0.25 "
        "--position-embedding-type rope --lr-decay-style cosine",
        "--context-parallel-size 4 --cp-comm-type fpdt --cp-chunks 4 --train-samples 1144409 --rotary-base 100000000 "
        "--lr-warmup-samples 11444 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        words="deepspeed --num_gpus 4 pretrain_gpt.py --deepspeed --deepspeed_config CONFIG --zero-stage 1 "
        "--ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size 65536 "
        "--ds-sequence-parallel-fpdt-offloading --ds-sequence-parallel-size 4 --train-tokens 300000000000 "
        "--lr-warmup-tokens 3000000000 --rotary-position-embeddings-theta 100000000 --checkpoint-activations "
        "--deepspeed-activation-checkpointing --checkpoint-in-cpu --no-async-tensor-model-parallel-allreduce",
        refused=("--checkpoint-in-cpu",),
        approximated=(NO_CLIP, "--train-tokens", "--lr-warmup-tokens"),
    ),
    # Megatron-DeepSpeed, pretrain_llama2_distributed.sh
    Case(
        "megatron-deepspeed-llama2",
        ".json",
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 1,
            "zero_optimization": zero(0),
            "bf16": {"enabled": True},
        },
        f"{RUN} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 24 --hidden-size 2048 "
        "--ffn-hidden-size 5504 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
        "--clip-grad 1 --position-embedding-type rope --untie-embeddings-and-output-weights --swiglu "
        "--disable-bias-linear",
        "--group-query-attention --num-query-groups 4 --normalization RMSNorm --bf16 --clip-grad 1",
        words="torchrun --nproc_per_node 8 --nnodes 1 pretrain_gpt.py --deepspeed --deepspeed_config=CONFIG "
        "--zero-stage=0 --normalization rmsnorm --num-key-value-heads 4 --no-query-key-layer-scaling --data-impl mmap",
    ),
    # Megatron-DeepSpeed, ds_pretrain_gpt_350M_MoE128.sh, with fewer experts than its GPUs hold
    Case(
        "megatron-deepspeed-experts",
        ".json",
        {
            "train_batch_size": 256,
            "train_micro_batch_size_per_gpu": 4,
            "fp16": {**FP16, "loss_scale_window": 500, "initial_scale_power": 11},
            "gradient_clipping": 1.0,
            "zero_optimization": zero(0, elastic_checkpoint=True),
            "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
        },
        f"{RUN} --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048",
        "--num-experts 128 --expert-model-parallel-size 64 --moe-aux-loss-coeff 0.01 --moe-expert-capacity-factor 1.0 "
        "--moe-layer-freq 2 --moe-router-topk 1 --moe-router-pre-softmax",
        words="deepspeed --num_gpus 8 --num_nodes 8 pretrain_gpt.py --deepspeed --deepspeed_config CONFIG "
        "--num-experts 128 --moe-expert-parallel-size 64 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 "
        "--moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --expert-interval 2 --mlp-type standard "
        "--create-moe-param-group",
        refused=("--moe-eval-capacity-factor", "--moe-min-capacity"),
        approximated=("--num-experts",),
    ),
    # DeepSpeedExamples, Megatron-LM/scripts/ds_zero-offload_10B_config.json
    Case(
        "zero-offload-10b",
        ".json",
        {
            "train_batch_size": 30,
            "gradient_accumulation_steps": 3,
            "steps_per_print": 1,
            "zero_optimization": {
                "stage": 2,
                "cpu_offload": True,
                "comm_overlap": True,
                "contiguous_gradients": True,
                "reduce_bucket_size": 50000000,
            },
            "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
            "gradient_clipping": 1.0,
            "fp16": {**FP16, "loss_scale": 4096},
            "activation_checkpointing": {
                "partition_activations": True,
                "contiguous_memory_optimization": True,
                "cpu_checkpointing": True,
            },
            "wall_clock_breakdown": False,
        },
        f"{GPT2} {LENGTH} --nproc-per-node 1".replace(" --lr 1e-4", ""),
        "--lr 0.00015 --micro-batch-size 10 --global-batch-size 30 --loss-scale 4096",
        refused=("zero_optimization.cpu_offload", "activation_checkpointing.cpu_checkpointing"),
        approximated=(STAGE,),
        unknown=("zero_optimization.comm_overlap",),
        extends=("training/zero2",),
    ),
    # DeepSpeedExamples, ds_zero_stage_2_config_curriculum_fixed_linear.json
    Case(
        "curriculum",
        ".json",
        {
            "train_batch_size": 512,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero(
                2, allgather_partitions=True, reduce_scatter=True, allgather_bucket_size=5e7, overlap_comm=True
            ),
            "optimizer": {"type": "Adam", "params": {"lr": 0.00015, "max_grad_norm": 1.0, "betas": [0.9, 0.95]}},
            "gradient_clipping": 1.0,
            "fp16": FP16,
            "zero_allow_untested_optimizer": False,
            "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen", "schedule_config": {"total_step": 8}},
        },
        f"{GPT2} {LENGTH} --nproc-per-node 8 --nnodes 16".replace(" --lr 1e-4", ""),
        "--micro-batch-size 4 --adam-beta1 0.9 --adam-beta2 0.95",
        refused=("curriculum_learning",),
        approximated=(STAGE,),
        extends=("training/zero2",),
    ),
    # DeepSpeedExamples, bing_bert/1-bit_adam/nccl
    Case(
        "one-bit-adam",
        ".json",
        {
            "train_batch_size": 4096,
            "train_micro_batch_size_per_gpu": 16,
            "steps_per_print": 100,
            "prescale_gradients": False,
            "optimizer": {
                "type": "OneBitAdam",
                "params": {
                    "lr": 4e-4,
                    "weight_decay": 0.01,
                    "bias_correction": False,
                    "freeze_step": 23000,
                    "cuda_aware": False,
                    "comm_backend_name": "nccl",
                },
            },
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
        },
        f"{GPT2} {LENGTH} --nproc-per-node 8".replace(" --lr 1e-4", ""),
        "--lr 0.0004 --weight-decay 0.01 --initial-loss-scale 65536",
        refused=(
            "optimizer.type",
            "optimizer.params.bias_correction",
            "optimizer.params.freeze_step",
            "optimizer.params.comm_backend_name",
        ),
    ),
    # DeepSpeedExamples, ds_zero_stage_infinity_config.json: everything on NVMe, one key misspelled there
    Case(
        "zero-infinity-nvme",
        ".json",
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero(
                3,
                stage3_max_live_parameters=1e9,
                stage3_param_persitance_threshold=1e5,
                overlap_comm=True,
                offload_optimizer={"device": "nvme", "nvme_path": "/nvme", "buffer_count": 4, "pin_memory": True},
                offload_param={"device": "nvme", "nvme_path": "/nvme", "max_in_cpu": 1},
            ),
            "gradient_clipping": 1.0,
            "fp16": {**FP16, "loss_scale": 1024},
            "wall_clock_breakdown": True,
            "aio": {"block_size": 1048576, "queue_depth": 16, "single_submit": False},
        },
        f"{GPT2} {LENGTH} --nproc-per-node 8",
        "--micro-batch-size 4 --global-batch-size 32 --loss-scale 1024 --timing-log-level 2",
        refused=("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"),
        approximated=(STAGE,),
        unknown=("zero_optimization.stage3_param_persitance_threshold",),
        extends=("training/zero3",),
    ),
    # Hugging Face's DeepSpeed integration, its example of stage 2 with values that the Trainer fills in
    Case(
        "transformers-auto",
        ".json",
        {
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_num_steps": 50}},
            "zero_optimization": zero(1, overlap_comm=True),
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": 2,
        },
        f"{GPT2} {LENGTH} --nproc-per-node 4 --global-batch-size 8",
        "--micro-batch-size 2 --adam-eps 1e-08 --lr-decay-style constant --lr-warmup-iters 50",
        refused=(
            "optimizer.params.lr",
            "optimizer.params.betas",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ),
        approximated=("scheduler.type",),
    ),
)


def colossal(mode: str, size: int, **more: Any) -> dict[str, Any]:
    return {
        "BATCH_SIZE": 4,
        "SEQ_LEN": 1024,
        "NUM_EPOCHS": 60,
        "TENSOR_PARALLEL": size,
        "optimizer": {"type": "Adam", "lr": 0.00015, "weight_decay": 1e-2},
        "fp16": {"mode": "AMP_TYPE.NAIVE"},
        "loss": {"type": "GPTLMLoss"},
        "model": {"type": "gpt2_small", "checkpoint": True},
        "parallel": {"pipeline": 1, "tensor": {"size": size, "mode": mode, **more}},
    }


GPT = RUN.replace(" --lr 1e-4", "")
COLOSSAL_AI = (
    # ColossalAI-Examples, language/gpt/gpt2_configs: one dict, four modes
    Case(
        "gpt2-1d",
        ".py",
        colossal("1d", 2),
        f"{GPT} --nproc-per-node 8",
        "--tensor-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 16 --fp16 --lr 0.00015 --clip-grad 0",
        refused=("NUM_EPOCHS",),
        approximated=("model.type", "clip_grad_norm"),
    ),
    Case(
        "gpt2-2d",
        ".py",
        colossal("2d", 4),
        f"{GPT} --nproc-per-node 8",
        "--tensor-model-parallel-size 4 --tp-comm-type 2d --num-layers 12 --hidden-size 768",
        refused=("NUM_EPOCHS",),
        approximated=("model.type", "parallel.tensor.mode", "clip_grad_norm"),
    ),
    Case(
        "gpt2-2.5d",
        ".py",
        colossal("2.5d", 8, depth=2),
        f"{GPT} --nproc-per-node 8",
        "--tensor-model-parallel-size 4 --context-parallel-size 2 --tp-comm-type 2.5d --global-batch-size 4",
        refused=("NUM_EPOCHS",),
        approximated=("model.type", "parallel.tensor.mode", "clip_grad_norm"),
    ),
    Case(
        "gpt2-3d",
        ".py",
        colossal("3d", 8),
        f"{GPT} --nproc-per-node 8 --num-attention-heads 16",
        "--tensor-model-parallel-size 8 --tp-comm-type 3d",
        refused=("NUM_EPOCHS",),
        approximated=("parallel.tensor.mode", "clip_grad_norm"),
    ),
    # ColossalAI, examples/tutorial/sequence_parallel: BERT's sizes with ring self-attention
    Case(
        "sequence",
        ".py",
        {
            "TRAIN_ITERS": 1000000,
            "DECAY_ITERS": 990000,
            "WARMUP_FRACTION": 0.01,
            "GLOBAL_BATCH_SIZE": 32,
            "EVAL_ITERS": 10,
            "EVAL_INTERVAL": 10,
            "LR": 0.0001,
            "MIN_LR": 1e-05,
            "WEIGHT_DECAY": 0.01,
            "SEQ_LENGTH": 512,
            "DEPTH": 12,
            "NUM_ATTENTION_HEADS": 12,
            "HIDDEN_SIZE": 768,
            "SEED": 1234,
            "NUM_MICRO_BATCHES": 4,
            "parallel": {"pipeline": 1, "tensor": {"size": 2, "mode": "sequence"}},
            "fp16": {"mode": "AMP_TYPE.NAIVE", "verbose": True},
            "gradient_handler": [{"type": "SequenceParallelGradientHandler"}],
        },
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 30592 --attention-dropout 0 --hidden-dropout 0 "
        "--nproc-per-node 8",
        "--context-parallel-size 2 --cp-comm-type rsa --num-layers 12 --micro-batch-size 2 --lr-decay-iters 990000",
        approximated=("clip_grad_norm",),
    ),
    # ColossalAI-Examples, gpt3_configs/gpt3_pp2p5d.py: 24 stages of 2.5d with a depth of one
    Case(
        "gpt3-pp2.5d",
        ".py",
        {
            "BATCH_SIZE": 96,
            "NUM_EPOCHS": 60,
            "SEQ_LEN": 2048,
            "NUM_MICRO_BATCHES": 48,
            "TENSOR_SHAPE": [1, 2048, 6144],
            "fp16": {"mode": "AMP_TYPE.NAIVE"},
            "parallel": {"pipeline": 24, "tensor": {"mode": "2.5d", "depth": 1, "size": 4}},
            "optimizer": {"type": "Adam", "lr": 0.00015, "weight_decay": 1e-2},
            "model": {"type": "gpt3", "checkpoint": True, "dtype": "torch.half"},
        },
        f"{GPT} --nproc-per-node 8 --nnodes 12",
        "--pipeline-model-parallel-size 24 --tensor-model-parallel-size 4 --tp-comm-type 2d --micro-batch-size 2 "
        "--num-layers 96",
        refused=("NUM_EPOCHS",),
        approximated=("model.type", "parallel.tensor.mode", "clip_grad_norm"),
    ),
    # ColossalAI-Examples, gpt2_configs/gpt2_zero3_pp1d.py: stage 3 beside a pipeline
    Case(
        "gpt2-zero3-pp1d",
        ".py",
        {
            "BATCH_SIZE": 8,
            "NUM_EPOCHS": 60,
            "SEQ_LEN": 1024,
            "NUM_MICRO_BATCHES": 4,
            "HIDDEN_SIZE": 768,
            "zero": {
                "model_config": {"tensor_placement_policy": "cpu", "shard_strategy": "Bucket"},
                "optimizer_config": {},
            },
            "optimizer": {"type": "HybridAdam", "lr": 0.00015, "weight_decay": 1e-2},
            "model": {"type": "GPT2_small_pipeline_hybrid", "checkpoint": True, "num_chunks": 1},
            "parallel": {"pipeline": 2, "tensor": {"size": 2, "mode": "1d"}},
        },
        f"{GPT} --nproc-per-node 8 --num-layers 12 --num-attention-heads 12",
        "--use-distributed-optimizer --pipeline-model-parallel-size 2 --optimizer-cpu-offload",
        refused=("NUM_EPOCHS", "model.type"),
        approximated=(
            "zero.model_config.tensor_placement_policy",
            "zero.model_config",
            "zero.optimizer_config",
            "clip_grad_norm",
        ),
    ),
)

NEMO_LLAMA3_70B = """
trainer: num_nodes 128; devices 8; accelerator gpu; precision bf16; logger false; enable_checkpointing false; max_epochs null; max_steps 300000; max_time "05:23:30:00"; log_every_n_steps 10; val_check_interval 2000; limit_val_batches 32; accumulate_grad_batches 1; gradient_clip_val 1.0
exp_manager: explicit_log_dir /results; exp_dir null; name megatron_llama; create_wandb_logger false; resume_if_exists false; log_step_timing true
model: mcore_gpt true; micro_batch_size 1; global_batch_size 2048; rampup_batch_size null; tensor_model_parallel_size 4; pipeline_model_parallel_size 4; virtual_pipeline_model_parallel_size 5; context_parallel_size 2; encoder_seq_length 8192; max_position_embeddings 8192; num_layers 80; hidden_size 8192; ffn_hidden_size 28672; num_attention_heads 64; num_query_groups 8; init_method_std 0.008944; use_scaled_init_method true; hidden_dropout 0.0; attention_dropout 0.0; ffn_dropout 0.0; kv_channels null; normalization rmsnorm; layernorm_epsilon 1.0e-05; do_layer_norm_weight_decay false; make_vocab_size_divisible_by 128; bias false; activation fast-swiglu; headscale false; transformer_block_type pre_ln; normalize_attention_scores true; position_embedding_type rope; rotary_percentage 1.0; apply_rope_fusion true; attention_type multihead; share_embeddings_and_output_weights false; native_amp_init_scale 4294967296; hysteresis 2; fp16_lm_cross_entropy false; megatron_amp_O2 true; gradient_accumulation_fusion true; cross_entropy_loss_fusion true; seed 1234; activations_checkpoint_granularity null; sequence_parallel true; defer_embedding_wgrad_compute true; wgrad_deferral_limit 22; transformer_engine true; fp8 false; fp8_amax_history_len 1024; ub_tp_comm_overlap true; use_flash_attention true; overlap_p2p_comm true; batch_p2p_comm false; gc_interval 100
model.tokenizer: library huggingface; type meta-llama/Meta-Llama-3-70B; use_fast true
model.nsys_profile: enabled false; start_step 10
model.optim: name mcore_distributed_optim; lr 0.00015; weight_decay 0.1; betas [0.9, 0.95]; bucket_cap_mb 125; overlap_grad_sync true; overlap_param_sync true
model.optim.sched: name CosineAnnealing; warmup_steps 2000; constant_steps 11873; min_lr 1.0e-05
model.data: data_impl mmap; splits_string "99990,8,2"; seq_length 8192; num_workers 2; dataloader_type single; reset_position_ids true; eod_mask_loss false; index_mapping_dir null
"""  # noqa: E501

OVERRIDES = (
    # NeMo-Framework-Launcher, conf/training/llama/llama3_70b.yaml
    Case(
        "nemo-llama3-70b",
        ".yaml",
        nested(NEMO_LLAMA3_70B),
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 128256",
        "--tensor-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 5 --seq-length 8192 --bf16 --swiglu "
        "--exit-duration-in-mins 8610 --lr-decay-iters 288127 --use-distributed-optimizer --train-iters 300000 "
        "--num-query-groups 8 --untie-embeddings-and-output-weights --split 99990,8,2 --tp-comm-overlap",
        refused=(),
        approximated=(
            "exp_manager.explicit_log_dir",
            "exp_manager.log_step_timing",
            "model.gc_interval",
            "model.optim.sched.constant_steps",
        ),
    ),
    # NeMo 2, its page on tensor parallelism and the recipe's own command: nemo llm pretrain --factory llama3_8b
    Case(
        "nemo2-llama3-8b",
        "",
        {},
        "",
        "--tensor-model-parallel-size 2 --context-parallel-size 1 --train-iters 100 --seq-length 4096 "
        "--save-interval 50 --global-batch-size 32 --nproc-per-node 8",
        words="python run.py --factory llama3_8b -y trainer.strategy.tensor_model_parallel_size=2 trainer.devices=8 "
        "trainer.strategy.context_parallel_size=1 trainer.strategy.sequence_parallel=True trainer.max_steps=100 "
        "trainer.val_check_interval=1000 data.global_batch_size=32 data.micro_batch_size=1 data.seq_length=4096 "
        "log.ckpt.save_last=False log.ckpt.every_n_train_steps=50 optim.config.lr=3e-4 trainer.limit_val_batches=4",
        approximated=("--factory",),
        extends=("models/llama3-8b",),
    ),
    # Megatron-Bridge, llama3_8b_pretrain_override_example.yaml of its first releases
    Case(
        "bridge-llama3-8b",
        ".yaml",
        nested(
            """
            model_config: tensor_model_parallel_size 2; pipeline_model_parallel_size 2; context_parallel_size 1
            train_config: train_iters 500000; global_batch_size 256; micro_batch_size 4; eval_interval 1000
            optimizer_config: lr 0.00025; min_lr 0.000025
            scheduler_config: lr_warmup_iters 1000
            checkpoint_config: save_interval 1000
            logger_config: log_interval 5
            dataset_config: num_workers 4
            rng_config: seed 42
            ddp_config: grad_reduce_in_fp32 true
            profiling_config: use_nsys_profiler false; profile_step_start 1000; profile_step_end 10000
            """
        ),
        "--mock-data --nproc-per-node 8 --eval-iters 1",
        "--tensor-model-parallel-size 2 --global-batch-size 256 --lr 0.00025 --accumulate-allreduce-grads-in-fp32",
        extends=("models/llama3-8b",),
        model="llama3-8b",
    ),
    # Megatron-Bridge, the same with Megatron-FSDP, and an override on the command line
    Case(
        "bridge-llama3-8b-fsdp",
        ".yaml",
        nested(
            """
            model: seq_length 4096; init_model_with_meta_device true
            train: train_iters 20; global_batch_size 8; micro_batch_size 1; eval_iters 0
            optimizer: lr 0.00025; min_lr 0.000025
            scheduler: lr_warmup_iters 10
            checkpoint: save null
            dist: use_megatron_fsdp true; use_torch_fsdp2 false
            logger: log_interval 1
            dataset: sequence_length 4096
            rng: seed 42
            ddp: grad_reduce_in_fp32 true; data_parallel_sharding_strategy optim_grads_params
            """
        ),
        "--mock-data --nproc-per-node 8 --eval-interval 100",
        "--seq-length 4096 --context-parallel-size 2 --data-parallel-sharding-strategy optim_grads_params",
        words="model.context_parallel_size=2",
        approximated=("dist.use_megatron_fsdp",),
        extends=("models/llama3-8b", "training/zero3"),
        model="llama3-8b",
    ),
    # Megatron-Bridge, scripts/performance, llama31_405b_llm_pretrain.yaml and its row for 1,024 H100
    Case(
        "bridge-llama3.1-405b",
        ".yaml",
        {
            "ConfigContainer": nested(
                """
                model: cross_entropy_fusion_impl te; use_transformer_engine_op_fuser false; seq_length 8192
                train: train_iters 50; eval_iters 0
                scheduler: lr_warmup_iters 10
                rerun_state_machine: check_for_nan_in_loss false
                checkpoint: save null
                logger: log_interval 1
                ddp: check_for_nan_in_grad false; check_for_large_grads false
                mixed_precision: grad_reduce_in_fp32 false
                """
            ),
            "perf_matrix": {"h100": {"num_gpus_1024": {"common": {"tp": 8, "pp": 8}}}},
        },
        "--mock-data --nproc-per-node 8 --nnodes 128 --eval-interval 100 --lr 1e-4",
        "--pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 4 --grad-reduce-in-bf16 "
        "--no-check-for-nan-in-loss-and-grad --bf16",
        words="model.tensor_model_parallel_size=8 model.pipeline_model_parallel_size=8 model.context_parallel_size=2 "
        "model.virtual_pipeline_model_parallel_size=4 train.micro_batch_size=1 train.global_batch_size=512 "
        "model.sequence_parallel=true mixed_precision=bf16_mixed model.num_layers=128 model.foo=1",
        refused=("perf_matrix",),
        unknown=("model.foo",),
        extends=("models/llama3.1-405b",),
        model="llama3.1-405b",
    ),
)

CASES = (*DEEPSPEED, *COLOSSAL_AI, *OVERRIDES)
