"""What --cp-plan cannot do is refused in one line with a way out, before the model is built."""

from argparse import Namespace
from typing import Any

import pytest

from megatron_cp.batches import ALGORITHMS
from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.batches import check_plan, imply_loader
from megatron_cp.megatron.arguments.command_line import SPEC
from megatron_cp.pipeline import SCHEDULES

GOOD = {
    "cp_plan": "balanced",
    "calculate_per_token_loss": True,
    "spec": list(SPEC),
    "data_path": ["corpus"],
    "position_embedding_type": "rope",
    "cp_comm_type": ["p2p"],
    "micro_batch_size": 1,
    "context_parallel_size": 1,
}


def given(**changes: Any) -> Namespace:
    return Namespace(**{**GOOD, **changes})


@pytest.mark.parametrize("plan", ALGORITHMS.names)
@pytest.mark.parametrize("backend", ["p2p", "all_gather", "a2a", "striped"])
def test_every_plan_passes(plan: str, backend: str) -> None:
    check_plan(given(cp_plan=plan, cp_comm_type=[backend], cp_tokens_per_rank=64))


@pytest.mark.parametrize("schedule", [rule.name for rule in SCHEDULES])
def test_schedules_pass_or_are_refused(schedule: str) -> None:
    args = given(pipeline_model_parallel_size=2, pp_schedule=schedule)
    if schedule in ("auto", "dualpipe-v", "bpipe") or SCHEDULES.get(schedule).delay:
        with pytest.raises(Refused, match="--pp-schedule"):
            check_plan(args)
    else:
        check_plan(args)


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"cp_plan": "balancd"}, "balanced"),
        ({"cp_plan": None, "cp_tokens_per_rank": 64}, "--cp-tokens-per-rank 64 needs --cp-plan"),
        ({"context_parallel_size": 2}, "pass --context-parallel-size 1"),
        ({"attention_dropout": 0.1}, "pass --attention-dropout 0"),
        ({"micro_batch_size": 2}, "pass --micro-batch-size 1"),
        ({"calculate_per_token_loss": False}, "pass --calculate-per-token-loss"),
        ({"spec": ["other", "spec"]}, "leave --spec out"),
        ({"mock_data": True}, "pass --data-path PREFIX"),
        ({"sft": True}, "leave --sft out"),
        ({"data_path": ["0.5", "one", "0.5", "two"]}, "one corpus"),
        ({"data_path": None, "train_data_path": ["one"]}, "one corpus"),
        ({"dataloader_inter_document_masking": True}, "leave --dataloader-inter-document-masking"),
        ({"eod_mask_loss": True}, "leave --eod-mask-loss out"),
        ({"dataloader_type": "cyclic"}, "leave --dataloader-type out"),
        ({"rampup_batch_size": [4, 4, 100]}, "leave --rampup-batch-size"),
        ({"iterations_to_skip": [3]}, "leave --iterations-to-skip"),
        ({"full_validation": True}, "leave --full-validation"),
        ({"mtp_num_layers": 1}, "leave --mtp-num-layers out"),
        ({"num_experts": 4, "moe_aux_loss_coeff": 0.01}, "pass --moe-router-load-balancing-type none"),
        (
            {"num_experts": 4, "moe_router_load_balancing_type": "sinkhorn"},
            "pass --moe-router-load-balancing-type none",
        ),
        ({"num_experts": 4, "moe_z_loss_coeff": 0.001}, "without --moe-z-loss-coeff"),
        ({"num_experts": 4, "moe_router_enable_expert_bias": True}, "--moe-router-enable-expert-bias"),
        ({"num_experts": 4, "moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor"),
        ({"num_experts": 4, "expert_model_parallel_size": 2}, "pass --moe-token-dispatcher-type alltoall"),
        ({"overlap_moe_expert_parallel_comm": True}, "leave --overlap-moe-expert-parallel-comm out"),
        ({"position_embedding_type": "yarn"}, "pass --position-embedding-type rope"),
        ({"multi_latent_attention": True, "cp_latent": True}, "without --multi-latent-attention and --cp-latent"),
        ({"hybrid_layer_pattern": "M*"}, "attention layers alone"),
        ({"cuda_graph_impl": "local"}, "leave --cuda-graph-impl out"),
        ({"use_megatron_fsdp": True}, "use --use-distributed-optimizer"),
        ({"pp_slices": 2}, "leave --pp-slices out"),
        ({"cp_chunks": 2}, "leave --cp-chunks out"),
        ({"cp_comm_type": ["usp"]}, "take zigzag or all-gather"),
        ({"cp_comm_type": ["auto"]}, "take zigzag or all-gather"),
        ({"cp_comm_type": ["fpdt"]}, "take zigzag or all-gather"),
        ({"cp_comm_type": ["p2p", "all_gather"]}, "pass one"),
        ({"cp_document_layout": "auto"}, "take stream or blocks"),
        ({"pipeline_model_parallel_size": 2}, "add --pp-schedule 1f1b"),
        ({"pipeline_model_parallel_size": 2, "pp_schedule": "1f1b", "pp_offload": "2"}, "leave --pp-offload out"),
    ],
)
def test_what_a_plan_cannot_do_is_refused_with_a_way_out(changes: dict[str, Any], way_out: str) -> None:
    with pytest.raises(Refused) as caught:
        check_plan(given(**changes))
    assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.01},
        {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.0]},
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
    ],
)
def test_experts_that_see_one_token_at_a_time_pass(changes: dict[str, Any]) -> None:
    check_plan(given(num_experts=4, **changes))


def test_steps_come_as_an_iterator_with_a_plan_alone() -> None:
    planned, plain = given(dataloader_type=None), given(dataloader_type=None, cp_plan=None)
    imply_loader(planned)
    imply_loader(plain)
    assert (planned.dataloader_type, plain.dataloader_type) == ("external", None)
