"""What --tp-comm-type, --tp-grid and --tp-engine cannot do is refused in one line before anything is built."""

from types import SimpleNamespace

import pytest

from megatron_cp.megatron.arguments.tensor import check_tensor

RUN = {
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "spec": ["megatron_cp.megatron.spec", "gpt_layer_spec"],
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "add_bias_linear": False,
    "seq_length": 64,
    "world_size": 8,
    "tp_comm_type": "2d",
}


def check(**given):
    check_tensor(SimpleNamespace(**{**RUN, **given}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tp_grid": ["1", "4"]},
        {"tp_comm_type": "flux", "tp_engine": "collective"},
        {"tp_comm_type": "2.5d"},
        {"tp_comm_type": "2.5d", "context_parallel_size": 2},
        {"tp_comm_type": "flux", "add_bias_linear": True},
        {"tp_comm_type": "1d", "sequence_parallel": False, "spec": None, "transformer_impl": "transformer_engine"},
        {"tp_comm_type": "1d", "tensor_model_parallel_size": 1},
    ],
)
def test_what_works_is_taken(given):
    check(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp_comm_type": "2e"}, "unknown tensor-parallel scheme '2e'; did you mean '2d'"),
        ({"tp_engine": "rings"}, "unknown tensor-parallel engine 'rings'; did you mean 'ring'"),
        ({"tensor_model_parallel_size": 1}, "2d needs --tensor-model-parallel-size of at least 2, got 1; leave it out"),
        ({"tensor_model_parallel_size": 3}, "2d has no grid with two axes .* 3; pass --tp-grid 1 3"),
        ({"tp_grid": ["2", "4"]}, "product is --tensor-model-parallel-size 4, got 2 4; possible are 4 1, 2 2, 1 4"),
        ({"tp_grid": ["2"]}, "--tp-grid takes TOKENS WEIGHTS .* got 2; possible"),
        ({"tp_grid": ["2", "two"]}, "--tp-grid takes TOKENS WEIGHTS .* got 2 two; possible"),
        ({"tp_comm_type": "flux", "tp_grid": ["4", "1"]}, "--tp-grid 4 1 needs --tp-comm-type 2d or 2.5d, got flux"),
        (
            {"tp_comm_type": "1d", "tp_engine": "ring"},
            "--tp-engine ring needs .* flux or 2d or 2.5d, got 1d",
        ),
        ({"sequence_parallel": False}, "add --sequence-parallel"),
        ({"spec": None}, "needs a layer spec of megatron-cp, got --spec none; pass --spec megatron_cp.megatron.spec"),
        ({"transformer_impl": "transformer_engine"}, "got --transformer-impl transformer_engine; pass local"),
        ({"tp_comm_overlap": True}, "leave --tp-comm-overlap out, or use --tp-comm-type 1d"),
        ({"fp8": "hybrid"}, "leave --fp8-format and --fp4-format out"),
        ({"moe_shared_expert_overlap": True}, "leave --moe-shared-expert-overlap out"),
        ({"delay_wgrad_compute": True}, "leave --delay-wgrad-compute out"),
        ({"use_megatron_fsdp": True}, "use --use-distributed-optimizer"),
        ({"cuda_graph_impl": "local"}, "leave --cuda-graph-impl"),
        ({"seq_length": 66}, "spreads --seq-length over 4 x 1 ranks .*, got 66; use 68"),
        ({"add_bias_linear": True}, "gathers weights over 2 ranks, but no bias of an MLP; pass --disable-bias-linear"),
        ({"tp_engine": "symmetric"}, "--tp-engine symmetric needs GPUs .*; use ring"),
        ({"tp_comm_type": "2.5d", "world_size": 4}, "takes its depth from context or data parallelism, got 1 of both"),
    ],
)
def test_what_does_not_work_is_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check(**given)
    assert "\n" not in str(refused.value)
