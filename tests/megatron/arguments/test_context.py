"""Our flags and the cross-checks that Megatron leaves out: each refusal says rule, value and way out."""

from argparse import ArgumentParser, Namespace
from typing import Any

import pytest

from megatron_cp.megatron.arguments.checks import note_on_positions
from megatron_cp.megatron.arguments.context import add_arguments, check
from megatron_cp.megatron.arguments.pipeline import check_schedule, check_table

GOOD = {
    "cp_comm_type": ["p2p"],
    "cp_kernel": "auto",
    "cp_placement": "head-first",
    "context_parallel_size": 4,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "world_size": 8,
    "num_attention_heads": 8,
    "num_layers": 3,
    "seq_length": 64,
    "hierarchical_context_parallel_sizes": None,
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "create_attention_mask_in_dataloader": False,
}


def given(**changes: Any) -> Namespace:
    return Namespace(**{**GOOD, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cp_comm_type": ["ring", "all_gather", "a2a"]},
        {"cp_comm_type": ["usp"], "hierarchical_context_parallel_sizes": [2, 2]},
        {"cp_comm_type": ["a2a+p2p"], "context_parallel_size": 1},
        {"cp_kernel": "reference"},
        {"cp_plan": "balanced", "cp_cluster": "h100-ib"},
        {"softmax_type": "learnable"},
        {"window_size": (-1, 0)},
        {"cp_sink": -1.0},
        {"cp_softcap": 30.0},
        {"cp_alibi": True},
        {"cp_latent": True, "multi_latent_attention": True},
        {"attention_dropout": 0.1, "cp_kernel": "reference"},
        {
            "cp_comm_type": ["p2p", "usp", "ring"],
            "hierarchical_context_parallel_sizes": [2, 2],
            "cp_placement": "context-first",
        },
        {"cp_comm_type": ["startrail"], "hierarchical_context_parallel_sizes": [2, 2]},
        {"cp_comm_type": ["p2p", "ring", "fpdt"], "cp_chunks": 4},
        {"cp_loss_chunks": 16, "mlp_chunks_for_training": 3},
        {"lr_warmup_iters": 10, "train_iters": 11},
        {"lr_warmup_iters": 10, "train_iters": 5, "lr_decay_iters": 20},
    ],
)
def test_what_can_be_done_passes(changes: dict[str, Any]) -> None:
    check(given(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"lr_warmup_iters": 10, "train_iters": 6},
            "less than --lr-decay-iters, by default --train-iters, got 10 and 6",
        ),
        ({"lr_warmup_samples": 8, "train_samples": 8}, "--lr-warmup-samples must be less .* got 8 and 8"),
        ({"cp_comm_type": ["nonsense"]}, "unknown context-parallel backend 'nonsense'.*known: zigzag"),
        ({"cp_comm_type": ["p2p", "ulises", "ring"]}, "did you mean 'ulysses'"),
        ({"cp_comm_type": ["p2p", "ring"]}, "one for each of the 3 layers, got 2"),
        ({"cp_kernel": "referense"}, "did you mean 'reference'"),
        ({"cp_placement": "heads"}, "unknown --cp-placement 'heads'"),
        ({"cp_placement": "context-first"}, "context-first needs --cp-comm-type usp, got p2p; leave it out"),
        ({"cp_chunks": 0}, "1 or more, got 0"),
        ({"cp_chunks": 4, "cp_comm_type": ["distflash"]}, "cannot cut --cp-comm-type distflash into pieces; leave it"),
        ({"cp_chunks": 3}, "divide the 8 tokens of each of a rank's 2 pieces, got chunks = 3; .* pad S = 64 to 72"),
        (
            {"cp_comm_type": ["startrail"], "hierarchical_context_parallel_sizes": [4, 1]},
            "divisible by the square .* got 4 and 4; possible are 1, 2, backend 'wallfacer'",
        ),
        ({"cp_cluster": "h100-ip", "cp_comm_type": ["auto"]}, "no cluster 'h100-ip'; did you mean 'h100-ib'"),
        ({"cp_cluster": "h100-ib"}, "--cp-cluster h100-ib needs --cp-plan, --cp-comm-type auto, .* got p2p"),
        ({"cp_stripe": 0, "cp_comm_type": ["striped"]}, "1 or more, got 0"),
        ({"cp_stripe": 4}, "--cp-stripe 4 needs --cp-comm-type striped, got"),
        ({"cp_stripe": 3, "cp_comm_type": ["striped"], "seq_length": 1024}, "= 12, got 1024; .* --seq-length 1032"),
        ({"cp_comm_type": ["usp"]}, "needs two --hierarchical-.* got none; add .*-sizes 2 2"),
        ({"cp_comm_type": ["usp"], "hierarchical_context_parallel_sizes": [4]}, r"needs two .* got \[4\]"),
        ({"hierarchical_context_parallel_sizes": [2, 3]}, "got 2 \\* 3 = 6 and 4"),
        ({"hierarchical_context_parallel_sizes": [-2, -2]}, "must be positive .* got -2 \\* -2 = 4 and 4"),
        ({"num_attention_heads": 7}, "got 7 and 2"),
        ({"world_size": 4}, "needs 8 processes, got 4"),
        ({"seq_length": 1004}, r"divisible by 2 \* --context-parallel-size = 8, got 1004; use 1008"),
        ({"cp_comm_type": ["a2a"], "num_attention_heads": 6}, "splits the query heads .* over 4 ranks, got 3 heads"),
        ({"softmax_type": "learnable", "cp_sink": 0.0}, "fixed sink .* leave --cp-sink or --softmax-type out"),
        ({"cp_softcap": 0.0}, "--cp-softcap is a positive finite score, got 0.0; leave it out"),
        (
            {"cp_softcap": 30.0, "cp_kernel": "torch"},
            "kernel 'torch' does not cap scores; use 'auto' or one of: flash, ",
        ),
        ({"cp_softcap": 30.0, "cp_comm_type": ["rsa"]}, "backend 'rsa' does not cap scores; use backend 'zigzag' or "),
        ({"cp_latent": True}, "without multi-latent attention, .*; leave --cp-latent out, or add --multi-latent"),
        (
            {"cp_latent": True, "cp_comm_type": ["p2p", "a2a", "ring"]},
            "'ulysses' sends keys and values, no latent; use",
        ),
        (
            {"cp_latent": True, "multi_latent_attention": True, "cp_self_check": True},
            r"with chunks .* or a self-check \(cp_self_check\); leave --cp-latent out",
        ),
        (
            {"cp_latent": True, "multi_latent_attention": True, "recompute_modules": ["mla_up_proj"]},
            "with an up-projection that is recomputed, .*; leave --cp-latent out, or --recompute-modules",
        ),
        ({"window_size": (-2, 0)}, r"--window-size: a window's limits are 0 or more, or -1 for none, got \(-2, 0\)"),
        ({"cp_softcap": 30.0, "cp_alibi": True}, "--cp-softcap does not cap; leave one of the two out"),
        ({"cp_sink": float("nan")}, "--cp-sink is a finite logit, got nan; leave it out"),
        ({"cp_document_layout": "block"}, "unknown --cp-document-layout 'block'; did you mean 'blocks'"),
        (
            {"cp_document_layout": "blocks"},
            "lays out packed documents, got none; pass --dataloader-inter-document-masking, --reset-",
        ),
        (
            {"cp_document_layout": "blocks", "dataloader_inter_document_masking": True, "cp_comm_type": ["ring"]},
            "needs an algorithm without a layout of its own, got --cp-comm-type ring; use zigzag or ",
        ),
        (
            {"cp_document_layout": "auto", "dataloader_inter_document_masking": True, "cp_chunks": 2},
            "cannot be cut into --cp-chunks; leave one of the two out",
        ),
        ({"qk_clip": True}, "--qk-clip"),
        ({"cpu_offloading_num_layers": 1}, "offload of activations .* leave --cpu-offloading-num-layers out"),
        (
            {"cp_chunks": 2, "cuda_graph_impl": "local"},
            "CUDA graphs with chunks in host memory.* leave --cuda-graph-impl .* out, or take zigzag without",
        ),
        ({"cp_comm_type": ["fpdt"], "enable_cuda_graph": True}, "CUDA graphs with chunks in host memory"),
        ({"fp8_dot_product_attention": True}, "attention in FP8 .* leave both out"),
        (
            {"attention_dropout": 0.1},
            r"--attention-dropout 0.1 \(Megatron's default\) needs a kernel that drops .* got --cp-kernel auto; pass "
            "--attention-dropout 0, or ",
        ),
        (
            {"attention_dropout": 0.1, "cp_kernel": "torch"},
            "got --cp-kernel torch; pass --attention-dropout 0, or --cp-",
        ),
        (
            {"attention_dropout": 0.1, "cp_kernel": "reference", "cp_comm_type": ["rsa"]},
            "backend 'rsa' does not drop weights; use backend 'zigzag' or ",
        ),
        (
            {
                "reset_attention_mask": True,
                "dataloader_inter_document_masking": True,
                "spec": ["megatron_cp.megatron.spec", "gpt_layer_spec"],
            },
            "--reset-attention-mask ends documents at EOD tokens .* leave one of the two out",
        ),
        (
            {"sft": True, "micro_batch_size": 2, "num_experts": 4, "moe_router_load_balancing_type": "seq_aux_loss"},
            "seq_aux_loss balances each sample, .* got --micro-batch-size 2; pass 1, or aux_loss",
        ),
        (
            {"dataloader_inter_document_masking": True, "overlap_moe_expert_parallel_comm": True},
            "--overlap-moe-expert-parallel-comm runs layers by themselves.* packed documents; leave one of the two out",
        ),
        (
            {"hybrid_context_parallel": True},
            "leave --hybrid-context-parallel out; megatron_cp.pretrain_gpt .* --cp-plan balanced "
            "--context-parallel-size 1 --calculate-per-token-loss, and --cp-tokens-per-rank",
        ),
        ({"cp_keep_attention": True}, "this run recomputes nothing; add --recompute-granularity full, or leave it out"),
        (
            {"cp_keep_attention": True, "recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
            "got --recompute-modules mlp moe, which repeat no attention; leave it out, or add core_attn",
        ),
        (
            {"cp_keep_attention": True, "recompute_granularity": "full", "fp8": "hybrid"},
            "kept attention .* in FP8 or FP4.*; leave --cp-keep-attention out, or --fp8-format and --fp4-format",
        ),
        (
            {"cp_keep_attention": True, "recompute_activations": True, "cuda_graph_impl": "local"},
            "kept attention .* under CUDA graphs.*; leave --cp-keep-attention out, or --cuda-graph-impl",
        ),
        ({"cp_loss_chunks": 0}, "--cp-loss-chunks is a number of chunks, 1 or more, got 0; leave it out"),
        ({"cp_loss_chunks": 17}, "cuts the 16 tokens of a rank; use at most 16"),
        ({"cp_loss_chunks": 9, "sequence_parallel": True}, "cuts the 8 tokens of a rank; use at most 8"),
        ({"cp_loss_chunks": 2, "enable_cuda_graph": True}, "chunks of MLP or loss .* in CUDA graphs.*; leave the"),
        ({"mlp_chunks_for_training": 2, "cuda_graph_impl": "local"}, "chunks of MLP or loss .* in CUDA graphs"),
        *(
            ({"cp_loss_chunks": 2, name: True}, f"logits in chunks .*; leave --cp-loss-chunks out, or .*{name[:3]}")
            for name in ("use_megatron_fsdp", "defer_embedding_wgrad_compute", "logits_save_dir")
        ),
        ({"create_attention_mask_in_dataloader": True}, "--no-create-attention-mask-in-dataloader"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check(given(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({"reset_position_ids": True, "position_embedding_type": "rope"}, True),
        ({"reset_position_ids": True, "position_embedding_type": "learned_absolute"}, False),
        ({"reset_position_ids": False, "position_embedding_type": "rope"}, False),
    ],
)
def test_positions_that_restart_without_effect_are_noted_and_never_refused(
    changes: dict[str, Any], noted: bool
) -> None:
    check(given(**changes))
    assert ("--reset-position-ids has no effect on rotary positions" in note_on_positions(given(**changes))) == noted


def test_flags_have_defaults_and_help() -> None:
    parser = add_arguments(ArgumentParser())
    assert {name: value for name, value in vars(parser.parse_args([])).items() if name.startswith("cp_")} == {
        "cp_kernel": "auto",
        "cp_placement": "head-first",
        "cp_stripe": 1,
        "cp_chunks": None,
        "cp_cluster": None,
        "cp_plan": None,
        "cp_tokens_per_rank": None,
        "cp_sink": None,
        "cp_softcap": None,
        "cp_alibi": False,
        "cp_latent": False,
        "cp_self_check": False,
        "cp_keep_attention": False,
        "cp_loss_chunks": None,
        "cp_document_layout": "stream",
    }
    assert "zigzag=p2p" in parser.format_help()


@pytest.mark.filterwarnings("ignore:.type. is deprecated as of Python 3.12:DeprecationWarning")
def test_flags_stand_in_megatrons_own_parser_without_a_clash() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_arguments(add_megatron_arguments(ArgumentParser()))
    assert parser.parse_args(["--cp-kernel", "reference"]).cp_kernel == "reference"


def scheduled(name: str, **changes: Any) -> Namespace:
    sizes = {"global_batch_size": 8, "micro_batch_size": 1, "data_parallel_size": 1, "pipeline_model_parallel_size": 2}
    return given(pp_schedule=name, **{**sizes, **changes})


@pytest.mark.parametrize("what", ["tp_comm_overlap", "use_transformer_engine_op_fuser"])
def test_split_schedules_refuse_what_transformer_engine_cannot_delay(what: str) -> None:
    te = {"transformer_impl": "transformer_engine", "cuda_graph_impl": "none"}
    check_schedule(scheduled("zb-h1", **te))
    with pytest.raises(ValueError, match=f"leave --{what.replace('_', '-')} out, or take a schedule without W"):
        check_schedule(scheduled("zb-h1", **te, **{what: True}))
    check_schedule(scheduled("zb-h1", transformer_impl="local", **{what: True}))
    check_schedule(scheduled("1f1b", **te, **{what: True}))


def test_schedules_refuse_offloading_in_megatrons_own_order() -> None:
    with pytest.raises(ValueError, match="own order; leave --fine-grained-activation-offloading out"):
        check_schedule(scheduled("1f1b", fine_grained_activation_offloading=True))


def test_slices_refuse_buffers_of_whole_sequences() -> None:
    check_schedule(scheduled("1f1b", pp_slices=4, tensor_model_parallel_size=2))
    with pytest.raises(ValueError, match=r"--pp-slices 4 .*leave --tp-comm-overlap out, or --pp-slices"):
        check_schedule(scheduled("1f1b", pp_slices=4, tensor_model_parallel_size=2, tp_comm_overlap=True))


# Megatron's size for such a run is one microbatch per rank, which none of its steps has
GROWING = {"global_batch_size": 1, "seq_length": 64, "virtual_pipeline_model_parallel_size": 2}


def test_the_sizes_of_all_steps_of_a_growing_batch_are_checked() -> None:
    check_table(scheduled("dualpipe-v", **GROWING, step_batch_size_schedule="0:4 1K:8"))
    with pytest.raises(ValueError, match="m = 2, v = 2; the nearest m that works is 3"):
        check_table(scheduled("dualpipe-v", **GROWING, step_batch_size_schedule="0:4", gtp_weight_remat_size=2))
    with pytest.raises(ValueError, match="m = 2, v = 2; the nearest m that works is 3"):
        check_table(scheduled("dualpipe-v", **GROWING, step_batch_size_schedule="0:4 1K:2"))
    with pytest.raises(ValueError, match="a cap of 2 M_B is below the minimum 4 M_B of breadth-first"):
        check_table(scheduled("breadth-first", **GROWING, step_batch_size_schedule="0:2,1K:4", pp_memory_limit=2))
