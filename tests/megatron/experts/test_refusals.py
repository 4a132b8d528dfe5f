"""What --moe-grouped-gemm without TransformerEngine, an exchange and a router cannot do is refused in one line."""

from types import SimpleNamespace

import pytest

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.command_line import wants_layers
from megatron_cp.megatron.arguments.experts import (
    check_cluster,
    check_exchange,
    check_experts,
    check_layers,
    check_router,
    imply_dispatcher,
    imply_layers,
    imply_pieces,
)
from megatron_cp.megatron.arguments.placement import check_placement
from megatron_cp.megatron.arguments.tuning import check_degrees, check_tuning, settle_exchange

RUN = {
    "spec": ["megatron_cp.megatron.spec", "gpt_layer_spec"],
    "transformer_impl": "local",
    "num_experts": 8,
    "moe_grouped_gemm": True,
    "moe_grouped_product": "auto",
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "moe_ffn_hidden_size": 48,
    "moe_router_topk": 2,
    "tensor_model_parallel_size": 1,
    "bf16": True,
}


def check(**given):
    check_experts(SimpleNamespace(**{**RUN, **given}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"moe_grouped_product": "loop", "hidden_size": 63},
        {"moe_grouped_product": "grouped-mm"},
        {"moe_grouped_product": "megablocks", "bf16": False, "moe_ffn_hidden_size": 52},
        {"moe_grouped_product": "grouped-mm", "tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2},
        {"moe_grouped_product": "grouped-mm", "moe_ffn_hidden_size": None},
        {"moe_apply_probs_on_input": True, "moe_router_topk": 1},
        # transformer-engine's experts, Megatron's own layers and dense models are left to Megatron
        {"transformer_impl": "transformer_engine", "fp8": "hybrid"},
        {"spec": None, "fp8": "hybrid"},
        {"num_experts": None, "use_megatron_fsdp": True},
        {"moe_grouped_gemm": False, "use_megatron_fsdp": True},
    ],
)
def test_what_works_is_taken(given):
    check(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"moe_grouped_product": "grouped"}, "unknown product of experts 'grouped'; did you mean 'grouped-mm'"),
        (
            {"moe_grouped_product": "loop", "moe_grouped_gemm": False},
            "--moe-grouped-product loop is of experts that run together; add --num-experts and --moe-grouped-gemm",
        ),
        ({"moe_grouped_product": "loop", "num_experts": None}, "add --num-experts and --moe-grouped-gemm, or leave"),
        (
            {"moe_grouped_product": "loop", "transformer_impl": "transformer_engine"},
            "is of local experts, got --transformer-impl transformer_engine; pass local",
        ),
        ({"moe_grouped_product": "loop", "spec": None}, "got --spec none; pass --spec megatron_cp.megatron.spec"),
        ({"fp8": "hybrid"}, "does not do products in FP8 or FP4, .*; leave --fp8-format and --fp4-format out"),
        ({"use_te_activation_func": True}, "leave --use-te-activation-func out"),
        ({"delay_wgrad_compute": True}, "leave --delay-wgrad-compute and"),
        ({"use_megatron_fsdp": True}, "use --use-distributed-optimizer"),
        ({"use_torch_fsdp2": True}, "use --use-distributed-optimizer"),
        ({"cuda_graph_impl": "local"}, "leave --cuda-graph-impl"),
        ({"moe_mlp_glu_interleave_size": 32}, "leave --moe-mlp-glu-interleave-size out"),
        ({"offload_modules": ["moe_act"]}, "leave expert_fc1 and moe_act out of --offload-modules"),
        ({"moe_apply_probs_on_input": True}, "pass --moe-router-topk 1 or"),
        (
            {"moe_grouped_product": "grouped-mm", "hidden_size": 60},
            "needs --hidden-size to be a multiple of 8, rows of 16 bytes on each of 1 ranks, got 60; use loop",
        ),
        (
            {"moe_grouped_product": "grouped-mm", "tensor_model_parallel_size": 4},
            "needs --moe-ffn-hidden-size to be a multiple of 32, rows of 16 bytes on each of 4 ranks, got 48; use loop",
        ),
        (
            {"moe_grouped_product": "grouped-mm", "bf16": False, "moe_ffn_hidden_size": 50},
            "--moe-ffn-hidden-size to be a multiple of 4, rows of 16 bytes on each of 1 ranks, got 50; use loop",
        ),
    ],
)
def test_what_does_not_work_is_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check(**given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("words", "te", "ours"), [([], False, False), (["--moe-grouped-gemm"], False, True)])
def test_without_transformer_engine_the_flag_asks_for_our_layers(words, te, ours):
    assert wants_layers(["--num-experts", "8", *words], te) == ours
    assert not wants_layers(["--num-experts", "8", *words], te=True)


EXCHANGED = {
    **RUN,
    "moe_comm_type": "two-hop",
    "moe_token_dispatcher_type": "alltoall",
    "world_size": 16,
    "expert_model_parallel_size": 8,
}
PIECES = {"moe_comm_type": "megatron", "moe_pieces": 2}


@pytest.mark.parametrize(
    "given",
    [
        {"moe_comm_type": "megatron", "moe_token_dispatcher_type": "flex", "moe_shared_expert_overlap": True},
        {"moe_comm_type": "2dh"},
        {"moe_ranks_per_node": 1},
        {"moe_ranks_per_node": 4},
        {"moe_ranks_per_node": 16},
        {"moe_ranks_per_node": 4, "tensor_model_parallel_size": 2},
        {"moe_ranks_per_node": 2, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 4},
        {"moe_ranks_per_node": 3, "expert_model_parallel_size": 1},
        {"transformer_impl": "transformer_engine", "moe_grouped_gemm": False},
        {"moe_comm_type": "deepspeed-moe", "moe_pieces": 4},
        # nodes are of no interest
        {**PIECES, "expert_model_parallel_size": 3},
        {**PIECES, "pp_schedule": "zb-h1", "moe_expert_capacity_factor": 1.0},
        {**PIECES, "transformer_impl": "transformer_engine", "pp_schedule": "1f1b"},
    ],
)
def test_two_hops_and_pieces_that_work_are_taken(given):
    check_exchange(SimpleNamespace(**{**EXCHANGED, **given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"moe_comm_type": "two-hops"}, "unknown exchange of experts 'two-hops'; did you mean 'two-hop'"),
        (
            {"moe_comm_type": "megatron", "moe_ranks_per_node": 4},
            "--moe-ranks-per-node 4 is of an exchange between nodes; add --moe-comm-type two-hop, or leave it out",
        ),
        ({"num_experts": None}, "--moe-comm-type two-hop is of experts; add --num-experts, or leave it out"),
        ({"moe_token_dispatcher_type": "flex"}, "got --moe-token-dispatcher-type flex; pass alltoall"),
        ({"spec": None}, "got --spec none; pass --spec megatron_cp.megatron.spec gpt_layer_spec"),
        ({"moe_shared_expert_overlap": True}, "leave --moe-shared-expert-overlap out"),
        ({"overlap_moe_expert_parallel_comm": True}, "leave --overlap-moe-expert-parallel-comm and"),
        ({"cuda_graph_impl": "local"}, "leave --cuda-graph-impl"),
        ({"moe_ranks_per_node": 0}, "--moe-ranks-per-node must be at least 1, got 0; leave it out"),
        ({**PIECES, "moe_degrees": "1,2", "moe_ranks_per_node": -1}, "must be at least 1, got -1; leave it out"),
        ({**PIECES, "moe_degrees": "1,2", "moe_shared_expert_overlap": True}, "--moe-comm-type tutel does not do the"),
        ({"moe_ranks_per_node": 3}, "on each node, got 1 and 2 and 3; change --expert-model-parallel-size"),
        ({"moe_ranks_per_node": 12}, "on each node, got 4 and 8; change"),
        ({"moe_pieces": 0}, "--moe-pieces must be from 1 to 64, got 0"),
        ({"moe_comm_type": "megatron", "moe_pieces": 65}, "--moe-pieces must be from 1 to 64, got 65"),
        ({**PIECES, "num_experts": None}, "--moe-pieces 2 is of experts; add --num-experts, or leave it out"),
        ({**PIECES, "moe_ranks_per_node": 4}, "add --moe-comm-type two-hop, or leave it out"),
        ({**PIECES, "moe_shared_expert_overlap": True}, "--moe-pieces 2 does not do the overlap of shared experts"),
        ({"moe_pieces": 2, "moe_pad_expert_input_to_capacity": True}, "leave --moe-pad-expert-input-to-capacity out"),
        ({**PIECES, "fp8": "hybrid"}, "leave --fp8-format and --fp4-format out"),
        ({**PIECES, "delay_wgrad_compute": True}, "leave --delay-wgrad-compute out"),
        ({**PIECES, "transformer_impl": "transformer_engine", "pp_schedule": "zb-h1"}, "or a schedule without W"),
        ({**PIECES, "use_torch_fsdp2": True}, "use --use-distributed-optimizer"),
        ({**PIECES, "offload_modules": ["moe_act"]}, "leave expert_fc1 and moe_act out of --offload-modules"),
        ({"moe_comm_type": "lina", "hybrid_layer_pattern": "*E*E"}, "pass --moe-comm-type pipelined"),
    ],
)
def test_two_hops_and_pieces_that_do_not_work_are_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_exchange(SimpleNamespace(**{**EXCHANGED, **given}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "pieces", "given", "taken", "who"),
    [
        ("two-hop", 1, "allgather", "alltoall", "--moe-comm-type two-hop"),
        ("2dh", 2, "allgather", "alltoall", "--moe-comm-type two-hop"),
        ("megatron", 2, "allgather", "alltoall", "--moe-pieces 2"),
        ("two-hop", 1, "flex", "flex", None),
        ("megatron", 1, "allgather", "allgather", None),
    ],
)
def test_an_exchange_implies_the_alltoall_dispatcher(asked, pieces, given, taken, who, capsys):
    args = SimpleNamespace(moe_comm_type=asked, moe_pieces=pieces, moe_token_dispatcher_type=given)
    imply_dispatcher(args)
    assert args.moe_token_dispatcher_type == taken
    said = capsys.readouterr().out
    assert f"{who}: --moe-token-dispatcher-type alltoall" in said if who else not said


PLACED = {**RUN, "moe_placement": "lina", "moe_token_dispatcher_type": "alltoall", "tensor_model_parallel_size": 1}


def check_copies(args):
    check_cluster(args)
    check_exchange(args)
    check_placement(args)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"moe_placement": "none", "transformer_impl": "transformer_engine"},
        {"moe_replica_slots": 3, "moe_pieces": 2, "pp_schedule": "zb-h1", "moe_expert_capacity_factor": 1.0},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "moe_cluster": "a100-ib"},
    ],
)
def test_copies_of_experts_that_work_are_taken(given):
    check_copies(SimpleNamespace(**{**PLACED, **given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"moe_placement": "linna"}, "unknown placement of experts 'linna'; did you mean 'lina'"),
        ({"num_experts": None}, "--moe-placement lina is of experts; add --num-experts, or leave it out"),
        ({"moe_token_dispatcher_type": "flex"}, "--moe-placement lina is of the dispatcher alltoall, got"),
        ({"moe_shared_expert_overlap": True}, "--moe-placement lina does not do the overlap of shared experts"),
        ({"moe_placement": "none", "moe_replica_slots": 2}, "add --moe-placement fastermoe or flexmoe or lina, or"),
        ({"moe_replica_slots": 0}, "--moe-replica-slots must be at least 1, got 0; leave --moe-placement out"),
        ({"moe_placement": "none", "moe_copies_ahead": 0}, "--moe-copies-ahead 0 is of copies of experts; add"),
        ({"moe_copies_ahead": 2}, "--moe-copies-ahead must be 0 or 1 layers, got 2; leave it out for 1"),
        ({"moe_placement_interval": 0}, "--moe-placement-interval must be at least 1 step, got 0"),
        ({"moe_cluster": "dgx-h10"}, "no cluster 'dgx-h10'; did you mean 'dgx-h100'"),
        (
            {"moe_placement": "none", "moe_cluster": "dgx-h100"},
            "add --moe-placement, --moe-comm-type tutel or --moe-gather auto, or",
        ),
        ({"transformer_impl": "transformer_engine"}, "pass --transformer-impl local"),
        ({"gradient_accumulation_fusion": True}, "pass --no-gradient-accumulation-fusion"),
        ({"moe_pad_expert_input_to_capacity": True}, "leave --moe-pad-expert-input-to-capacity out"),
        ({"fp8": "hybrid"}, "leave --fp8-format, --fp4-format and --moe-router-padding-for-quantization out"),
        ({"delay_wgrad_compute": True}, "leave --delay-wgrad-compute out"),
        ({"use_megatron_fsdp": True}, "use --use-distributed-optimizer"),
        ({"offload_modules": ["moe_act"]}, "leave expert_fc1 and moe_act out of --offload-modules"),
        ({"tensor_model_parallel_size": 2}, "pass --expert-tensor-parallel-size 1"),
    ],
)
def test_copies_of_experts_that_do_not_work_are_refused_with_a_way_out(given, message):
    args = SimpleNamespace(**{**PLACED, **given})
    with pytest.raises(ValueError, match=message) as refused:
        check_copies(args)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "given", "taken"), [("fastermoe", 1, 1), ("lina", 1, 2), ("fastermoe", 3, 3), ("two-hop", 1, 1)]
)
def test_an_exchange_in_pieces_has_its_number_unless_another_is_asked_for(asked, given, taken, capsys):
    args = SimpleNamespace(moe_comm_type=asked, moe_pieces=given, moe_token_dispatcher_type="allgather")
    imply_pieces(args)
    imply_dispatcher(args)
    assert (args.moe_pieces, args.moe_token_dispatcher_type) == (taken, "alltoall")
    assert (f"--moe-comm-type {asked}: --moe-pieces {taken}" in capsys.readouterr().out) == (taken != given)


def settled(capsys, **given):
    args = SimpleNamespace(**{**EXCHANGED, "moe_comm_type": "tutel", "moe_pieces": 1, "seq_length": 8192, "bf16": True})
    for name, value in {"hidden_size": 4096, "moe_ffn_hidden_size": 14336, "swiglu": True, **given}.items():
        setattr(args, name, value)
    settle_exchange(args, lambda: load_cluster("dgx-h100-ib"))
    return args.moe_comm_type, args.moe_pieces, capsys.readouterr().out


def test_tutel_takes_the_fastest_of_its_degrees_and_hops(capsys):
    *taken, said = settled(capsys)
    ways = said.partition(": ")[2].removesuffix(" ms\n").split(" ms, ")
    assert said.startswith(f"[megatron-cp] --moe-comm-type {taken[0]} --moe-pieces {taken[1]}: ")
    # four degrees of one exchange and of two hops, fastest first
    times = [float(each.split()[-1]) for each in ways]
    assert (len(times), times) == (8, sorted(times))
    assert taken[1] > 1


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        ({"moe_pieces": 4}, 4),
        # a latency is more than all of the work
        ({"hidden_size": 64, "moe_ffn_hidden_size": 64, "seq_length": 16}, 1),
        ({"moe_pad_expert_input_to_capacity": True}, 1),
        # no rates of the dtype
        ({"bf16": False, "fp16": True}, 1),
        # nothing is beside anything on a CPU
        ({"moe_cluster": "this-cpu", "bf16": False}, 1),
    ],
)
def test_tutel_keeps_what_is_asked_for_and_leaves_whole_what_cannot_be_cut(capsys, given, pieces):
    assert settled(capsys, **given)[1] == pieces


def test_tutel_leaves_the_choice_of_a_step_to_its_layers(capsys):
    args = SimpleNamespace(**{**EXCHANGED, "moe_comm_type": "tutel", "moe_pieces": 1, "seq_length": 8192})
    args.hidden_size, args.moe_ffn_hidden_size, args.expert_tensor_parallel_size = 4096, 14336, 2
    settle_exchange(args, lambda: load_cluster("dgx-h100-ib"))
    assert (args.moe_degrees, args.moe_gather) == ("1,2,4,8", "auto")
    assert "with weights gathered" in capsys.readouterr().out
    check_tuning(args)
    args = SimpleNamespace(**{**vars(args), "moe_comm_type": "tutel", "moe_gather": None, "moe_degrees": "1,2"})
    args.moe_pieces, args.transformer_impl = 1, "transformer_engine"
    check_degrees(args)
    settle_exchange(args, lambda: load_cluster("dgx-h100-ib"))
    # its experts keep weights of their own
    assert (args.moe_degrees, args.moe_gather) == ("1,2", "tokens")


@pytest.mark.parametrize(
    "given",
    [{"expert_model_parallel_size": 1}, {"moe_pieces": 2}, {"moe_placement": "lina"}],
    ids=["one rank", "pieces", "copies"],
)
def test_one_choice_is_not_measured(given, capsys):
    args = SimpleNamespace(**{**EXCHANGED, "moe_comm_type": "tutel", "moe_pieces": 1, "seq_length": 8192, **given})
    args.moe_tuning = "steps"
    settle_exchange(args, lambda: load_cluster("dgx-h100-ib"))
    assert args.moe_tuning == "costs"
    assert "--moe-tuning steps: there is one choice, and nothing to measure" in capsys.readouterr().out
    check_tuning(args)


@pytest.mark.parametrize("missing", ["hidden_size", "seq_length"])
def test_a_size_that_is_missing_is_left_to_megatron(missing):
    args = SimpleNamespace(**{**EXCHANGED, "moe_comm_type": "tutel", "seq_length": 8192, missing: None})
    settle_exchange(args, lambda: load_cluster("dgx-h100-ib"))
    assert args.moe_comm_type == "tutel"


GATHERED = {**EXCHANGED, "moe_comm_type": "megatron", "moe_gather": "weights", "expert_tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (check_tuning, {"moe_gather": "rows"}, "must be tokens, weights or auto, got rows"),
        (check_tuning, {"moe_tuning": "days"}, "must be costs or steps, got days"),
        (check_tuning, {"moe_tuning": "steps"}, "add --moe-comm-type tutel or --moe-gather auto"),
        (check_tuning, {"expert_tensor_parallel_size": 1}, "add --expert-tensor-parallel-size, or leave it out"),
        (check_tuning, {"transformer_impl": "transformer_engine"}, "pass --transformer-impl local"),
        (check_tuning, {"gradient_accumulation_fusion": True}, "pass --no-gradient-accumulation-fusion"),
        (check_tuning, {"moe_placement": "lina"}, "leave --moe-placement out, or pass --moe-gather tokens"),
        (check_tuning, {"pp_schedule": "2bw"}, "pass --moe-gather tokens, or a --pp-schedule that flushes"),
        (check_exchange, {"moe_token_dispatcher_type": "flex"}, "pass alltoall"),
        (check_degrees, {"moe_degrees": "1,2"}, "pass --moe-comm-type tutel without --moe-pieces"),
        (check_degrees, {"moe_degrees": "1,99999999", "moe_comm_type": "tutel"}, "--moe-degrees must be from 1 to 64"),
        (check_degrees, {"moe_degrees": "1,x", "moe_comm_type": "tutel"}, "numbers of pieces such as 1,2,4, got 1,x"),
        (
            check_degrees,
            {"moe_degrees": "2", "moe_comm_type": "tutel", "moe_pad_expert_input_to_capacity": True},
            "leave --moe-pad-expert-input-to-capacity out",
        ),
    ],
)
def test_choices_of_a_step_that_nobody_has_are_refused_with_a_way_out(check, given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check(SimpleNamespace(**{**GATHERED, **given}))
    assert "\n" not in str(refused.value)
    check_tuning(SimpleNamespace(**GATHERED))


ROUTED = {
    **RUN,
    "moe_router": "gshard",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_expert_capacity_factor": 1.0,
    "seq_length": 256,
}
SWITCH = {"moe_router": "switch", "moe_router_topk": 1, "moe_router_pre_softmax": True}
BESIDE = {
    **SWITCH,
    "moe_router": "deepspeed-moe",
    "moe_shared_expert_intermediate_size": 48,
    "moe_shared_expert_gate": True,
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"moe_group_tokens": 64, "context_parallel_size": 2},
        {
            "moe_group_tokens": 32,
            "context_parallel_size": 2,
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
        },
        {"moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"]},
        SWITCH,
        BESIDE,
        {**BESIDE, "moe_pieces": 2, "recompute_modules": ["moe"]},
        {"moe_router": "megatron", "moe_router_score_function": "sigmoid", "moe_router_num_groups": 2},
    ],
)
def test_routers_that_work_are_taken(given):
    check_router(SimpleNamespace(**{**ROUTED, **given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"moe_router": "swich"}, "unknown router of experts 'swich'; did you mean 'switch'"),
        ({"moe_group_tokens": 0}, "at least 1 token and a --moe-router that drops tokens, got 0 and gshard; change"),
        ({"moe_router": "megatron", "moe_group_tokens": 64}, "that drops tokens, got 64 and megatron; change them"),
        ({"num_experts": None}, "--moe-router gshard is of experts; add --num-experts, or leave it out"),
        ({"spec": None}, "got --spec none; pass --spec megatron_cp.megatron.spec gpt_layer_spec"),
        ({"moe_router_score_function": "sigmoid"}, "pass --moe-router-score-function softmax"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "pass --moe-router-load-balancing-type aux_loss"),
        ({"moe_router_num_groups": 2}, "leave --moe-router-num-groups and --moe-router-group-topk out"),
        ({"moe_router_topk_scaling_factor": 2.5}, "leave --moe-router-topk-scaling-factor out"),
        ({"moe_pad_expert_input_to_capacity": True}, "leave --moe-pad-expert-input-to-capacity out"),
        ({"cuda_graph_impl": "local"}, "leave --cuda-graph-impl"),
        ({"moe_router_topk": 8}, "takes --moe-router-topk 2, got 8; pass 2, or extend training/gshard"),
        ({**SWITCH, "moe_router_topk": 2}, "takes --moe-router-topk 1, got 2; pass 1, or extend training/switch"),
        ({**BESIDE, "moe_router_topk": 2}, "takes --moe-router-topk 1, got 2; pass 1, or extend training/deep"),
        ({**BESIDE, "moe_shared_expert_intermediate_size": None}, "the width of its MLP, .* got None and a gate; pass"),
        ({**BESIDE, "moe_shared_expert_gate": False}, "--moe-shared-expert-gate, got 48 and no gate; pass both"),
        ({**BESIDE, "moe_shared_expert_overlap": True}, "leave --moe-shared-expert-overlap out"),
        ({**BESIDE, "moe_apply_probs_on_input": True}, "leave --moe-apply-probs-on-input out"),
        ({**BESIDE, "recompute_modules": ["shared_experts"]}, "leave shared_experts out of --recompute-modules, or"),
        ({**BESIDE, "use_megatron_fsdp": True}, "use --use-distributed-optimizer"),
        ({"moe_router_pre_softmax": True}, "has gates with a sum of 1, got --moe-router-pre-softmax; leave it out"),
        (
            {"moe_expert_capacity_factor": None},
            "a --moe-expert-capacity-factor above 0, got None; pass 1.25, or extend",
        ),
        (
            {"moe_group_tokens": 64, "context_parallel_size": 4},
            "must divide the 32 consecutive tokens that a rank has at least, got 64; change it, --seq-length or",
        ),
    ],
)
def test_routers_that_do_not_work_are_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_router(SimpleNamespace(**{**ROUTED, **given}))
    assert "\n" not in str(refused.value)


PYRAMID = {**RUN, "moe_layer_experts": "3:16", "num_layers": 4, "moe_router_load_balancing_type": ["aux_loss"]}


@pytest.mark.parametrize("given", [{}, {"moe_layer_experts": "2:16,4:8"}, {"moe_layer_experts": None, "spec": None}])
def test_layers_with_different_numbers_of_experts_are_taken(given):
    check_layers(SimpleNamespace(**{**PYRAMID, **given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_experts": None}, "--moe-layer-experts 3:16 is of layers of experts; add --num-experts and --num-layers"),
        ({"spec": None}, "got --spec none; pass --spec megatron_cp.megatron.spec gpt_layer_spec"),
        ({"transformer_impl": "transformer_engine"}, "pass --transformer-impl local"),
        ({"hybrid_layer_pattern": "*E*E"}, "leave --hybrid-layer-pattern out"),
        ({"moe_router_enable_expert_bias": True}, "leave --moe-router-enable-expert-bias out, and pass"),
        ({"moe_router_load_balancing_type": ["quantile_balancing"]}, "pass --moe-router-load-balancing-type aux_loss"),
        ({"use_torch_fsdp2": True}, "use --use-distributed-optimizer"),
        ({"moe_layer_experts": "5:16"}, "needs layers in rising order, from 2 to 4, got 5:16; change them"),
    ],
)
def test_layers_that_cannot_differ_are_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_layers(SimpleNamespace(**{**PYRAMID, **given}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "frequency", "taken"), [("3:16", 1, [1, 1, 1, 1]), ("3:16", 2, [1, 0, 1, 0]), (None, 2, 2)]
)
def test_layers_with_different_numbers_of_experts_are_named_one_by_one(asked, frequency, taken, capsys):
    args = SimpleNamespace(moe_layer_experts=asked, moe_layer_freq=frequency, num_layers=4)
    imply_layers(args)
    assert args.moe_layer_freq == taken
    assert ("--moe-layer-freq names each of 4 layers" in capsys.readouterr().out) == (asked is not None)
