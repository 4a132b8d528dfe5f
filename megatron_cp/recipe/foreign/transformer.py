"""Fields of Megatron-core's model config, which NeMo and Megatron-Bridge share, as Megatron's flags."""

from typing import Any

from megatron_cp.recipe.foreign.keys import (
    Answer,
    ForeignConfig,
    Key,
    Outcome,
    choice,
    derived,
    ignored,
    not_here,
    refused,
    same,
    switch,
    switches,
    text,
    value,
)

VALUES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels seq_length init_method_std hidden_dropout "
    "attention_dropout vocab_size make_vocab_size_divisible_by rotary_base rotary_percent mtp_num_layers "
    "mtp_loss_scaling_factor tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size hierarchical_context_parallel_sizes cp_comm_type "
    "pipeline_model_parallel_layout recompute_granularity recompute_method "
    "recompute_num_layers recompute_modules cpu_offloading_num_layers moe_router_topk moe_ffn_hidden_size "
    "moe_shared_expert_intermediate_size moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff "
    "moe_token_dispatcher_type moe_expert_capacity_factor moe_router_num_groups moe_router_group_topk "
    "moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype moe_router_bias_update_rate "
    "moe_layer_freq moe_token_drop_policy moe_flex_dispatcher_backend q_lora_rank kv_lora_rank qk_head_dim "
    "qk_pos_emb_head_dim v_head_dim window_size softmax_type cross_entropy_fusion_impl wgrad_deferral_limit "
    "tp_comm_bootstrap_backend"
)
SWITCHES = (
    "sequence_parallel fp32_residual_connection apply_residual_connection_post_layernorm add_qkv_bias qk_layernorm "
    "apply_query_key_layer_scaling attention_softmax_in_fp32 distribute_saved_activations moe_grouped_gemm "
    "moe_permute_fusion moe_router_fusion moe_router_pre_softmax moe_router_enable_expert_bias "
    "moe_shared_expert_overlap moe_pad_expert_input_to_capacity moe_enable_deepep moe_per_layer_logging "
    "multi_latent_attention calculate_per_token_loss deterministic_mode tp_comm_overlap cross_entropy_loss_fusion "
    "defer_embedding_wgrad_compute use_transformer_engine_op_fuser account_for_embedding_in_pipeline_split "
    "account_for_loss_in_pipeline_split rotary_interleaved init_model_with_meta_device "
    "overlap_moe_expert_parallel_comm delay_wgrad_compute"
)
ON_BY_DEFAULT = {
    "bias_activation_fusion": "--no-bias-gelu-fusion --no-bias-swiglu-fusion",
    "bias_dropout_fusion": "--no-bias-dropout-fusion",
    "bias_dropout_add_fusion": "--no-bias-dropout-fusion",
    "masked_softmax_fusion": "--no-masked-softmax-fusion",
    "apply_rope_fusion": "--no-rope-fusion",
    "gradient_accumulation_fusion": "--no-gradient-accumulation-fusion",
    "persist_layer_norm": "--no-persist-layer-norm",
    "perform_initialization": "--no-initialization",
    "overlap_p2p_comm": "--no-overlap-p2p-communication",
    "tp_comm_overlap_ag": "--no-tp-comm-overlap-ag",
    "tp_comm_overlap_rs": "--no-tp-comm-overlap-rs",
    "tp_comm_bulk_dgrad": "--no-tp-comm-bulk-dgrad",
    "tp_comm_bulk_wgrad": "--no-tp-comm-bulk-wgrad",
    "share_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "add_bias_linear": "--disable-bias-linear",
}
FP8_VALUES = "fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_recipe"


def groups(found: Any, _: ForeignConfig) -> Answer:
    """Return the flags of a number of groups of queries."""
    return Answer({"--group-query-attention": (), "--num-query-groups": (text(int(found)),)})


def chunks(found: Any, config: ForeignConfig) -> Answer:
    """Return the flag of a number of stages on each rank, which needs a pipeline."""
    count = int(found)
    return Answer({"--num-virtual-stages-per-pipeline-rank": (str(count),)} if count > 1 else {})


def precision(found: Any, _: ForeignConfig) -> Answer:
    """Return the flags of a precision's name, such as bf16-mixed or 16."""
    name = str(found).lower().replace("_", "-")
    if name in ("bf16", "bf16-mixed"):
        return Answer({"--bf16": ()})
    if name in ("16", "fp16", "16-mixed", "fp16-mixed"):
        return Answer({"--fp16": ()})
    if name in ("32", "fp32", "32-true"):
        return Answer({})
    if name == "bf16-with-fp8-mixed":
        return Answer({"--bf16": (), "--fp8-format": ("hybrid",)})
    if name == "bf16-with-fp8-current-scaling-mixed":
        return Answer({"--bf16": (), "--fp8-format": ("hybrid",), "--fp8-recipe": ("tensorwise",)})
    if name == "bf16-with-mxfp8-mixed":
        return Answer({"--bf16": (), "--fp8-format": ("e4m3",), "--fp8-recipe": ("mxfp8",)})
    return not_here("no such precision is known here: give --bf16, --fp16 or --fp8-format")


def fp8(found: Any, _: ForeignConfig) -> Answer:
    """Return the flag of an fp8 format; false and null are none."""
    name = str(found).lower()
    if name in ("false", "none"):
        return Answer({})
    return Answer({"--fp8-format": (name,)}) if name in ("hybrid", "e4m3") else not_here("the formats are hybrid, e4m3")


def _activation(found: Any, config: ForeignConfig) -> Answer:
    name = str(found).rpartition(".")[2].lower()
    if name in ("silu", "swish") or "swiglu" in name:
        return Answer({"--swiglu": ()})
    if name == "gelu":
        return Answer({})
    return (
        Answer({"--squared-relu": ()})
        if "squared" in name
        else not_here("the activations are gelu, swiglu, squared-relu")
    )


def _experts(found: Any, _: ForeignConfig) -> Answer:
    return Answer({"--num-experts": (text(int(found)),)} if int(found) > 1 else {})


def fields(section: str) -> list[Key]:
    """Return a row for each field of a model config that stands under `section`."""

    def at(names: str) -> str:
        return " ".join(f"{section}.{name}" for name in names.split())

    return [
        *same(section, f"{VALUES} {FP8_VALUES}"),
        *switches(section, SWITCHES),
        *(switch(at(name), "", off) for name, off in ON_BY_DEFAULT.items()),
        value(at("layernorm_epsilon"), "--norm-epsilon"),
        value(at("max_position_embeddings"), "--max-position-embeddings"),
        value(at("microbatch_group_size_per_vp_stage"), "--microbatch-group-size-per-virtual-pipeline-stage"),
        value(at("scale_factor rope_scaling_factor"), "--rope-scaling-factor"),
        value(at("moe_input_jitter_eps"), "--moe-input-jitter-eps"),
        switch(at("rope_scaling"), "--use-rope-scaling"),
        derived(at("num_query_groups"), "--group-query-attention --num-query-groups VALUE", groups, how=Outcome.MAPPED),
        derived(at("num_moe_experts"), "--num-experts VALUE", _experts, how=Outcome.MAPPED),
        derived(
            at("virtual_pipeline_model_parallel_size"),
            "--num-virtual-stages-per-pipeline-rank VALUE",
            chunks,
            how=Outcome.MAPPED,
        ),
        derived(at("activation_func"), "silu: --swiglu; gelu: nothing", _activation, how=Outcome.MAPPED),
        switch(at("gated_linear_unit"), "--swiglu"),
        choice(
            at("normalization"),
            {
                "rmsnorm": "--normalization RMSNorm",
                "layernorm": "--normalization LayerNorm",
                "layernorm1p": "--normalization LayerNorm --apply-layernorm-1p",
            },
            other="the norms are LayerNorm and RMSNorm",
        ),
        choice(
            at("position_embedding_type"),
            {
                "rope": "--position-embedding-type rope",
                "yarn": "--position-embedding-type yarn",
                "learned_absolute": "--position-embedding-type learned_absolute",
                "none": "--position-embedding-type none",
            },
            other="positions are rope, yarn, learned_absolute or none",
        ),
        choice(
            at("transformer_impl"),
            {"transformer_engine": "--transformer-impl transformer_engine", "local": "--transformer-impl local"},
        ),
        choice(
            at("attention_backend"),
            {
                "auto": "",
                "attnbackend.auto": "",
                **{name: f"--attention-backend {name}" for name in ("flash", "fused", "unfused", "local")},
                **{
                    f"attnbackend.{name}": f"--attention-backend {name}"
                    for name in ("flash", "fused", "unfused", "local")
                },
            },
        ),
        derived(at("fp8"), "--fp8-format VALUE", fp8, how=Outcome.MAPPED),
        switch(at("bf16"), "--bf16"),
        switch(at("fp16"), "--fp16"),
        ignored(
            at(
                "params_dtype pipeline_dtype autocast_dtype batch_p2p_comm should_pad_vocab parallel_output "
                "pre_process post_process"
            ),
            "follows from other flags",
        ),
        refused(
            at("cuda_graph_impl cuda_graph_scope enable_cuda_graph external_cuda_graph"),
            "graphs of whole steps are not taken with our layers: give --cuda-graph-impl with Megatron's own",
            neutral=("none",),
        ),
        refused(at("cpu_offloading"), "give --pp-offload or --cp-chunks, or --cpu-offloading-num-layers"),
    ]
