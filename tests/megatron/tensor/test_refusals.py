"""What --tp-comm-type, --tp-grid, --tp-engine and --tp-gemm cannot do is refused in one line."""

from types import SimpleNamespace

import pytest

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.tensor import check_tensor, layer_of, settle_tensor, stand_in_for_overlap
from megatron_cp.megatron.machine.environment import without_one_connection
from megatron_cp.megatron.machine.facts import this_machine
from megatron_cp.megatron.process import launch
from megatron_cp.tensor import gemm

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
        {"tp_grid": ["1", "4"], "tp_engine": "panels"},
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
            "--tp-engine ring needs .* flux or 2d or 2.5d or 3d, got 1d",
        ),
        (
            {"tp_comm_type": "flux", "tp_engine": "panels"},
            "panels takes weights of a grid apart, got --tp-comm-type flux, where no .* on 4 x 1 ranks; use ring",
        ),
        ({"tp_engine": "panels", "tp_grid": ["4", "1"]}, "got --tp-comm-type 2d, where no weight .* on 4 x 1 ranks"),
        ({"tp_gemm": "streamk"}, "unknown tensor-parallel product 'streamk'; did you mean 'stream-k'"),
        ({"tp_comm_type": "1d", "tp_gemm": "stream-k"}, "--tp-gemm stream-k needs .* or 3d, got 1d; leave it out"),
        (
            {"tp_engine": "symmetric", "tp_gemm": "stream-k"},
            "symmetric has the products of torch, got --tp-gemm stream-k; use ring, or leave --tp-gemm out",
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
        ({"tp_comm_type": "3d"}, "3d needs a --tensor-model-parallel-size of 8, 27 or 64, got 4"),
        ({"seq_length": 66}, "spreads --seq-length over 4 x 1 ranks .*, got 66; use 68"),
        ({"add_bias_linear": True}, "gathers weights of an MLP, but no bias; pass --disable-bias-linear"),
        ({"tp_engine": "symmetric"}, "--tp-engine symmetric needs GPUs .*; use ring"),
        ({"tp_comm_type": "2.5d", "world_size": 4}, "takes its depth from context or data parallelism, got 1 of both"),
    ],
)
def test_what_does_not_work_is_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check(**given)
    assert "\n" not in str(refused.value)


def test_one_connection_is_refused_for_the_symmetric_engine(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ValueError, match="got CUDA_DEVICE_MAX_CONNECTIONS=1"):
        check(tp_engine="symmetric", distributed_backend="nccl")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    check(tp_engine="symmetric", distributed_backend="nccl")


@pytest.mark.parametrize(("backend", "interpret"), [("gloo", "1"), ("nccl", "0")])
def test_stream_k_needs_a_gpu_or_the_interpreter(monkeypatch, backend, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(gemm, "find_spec", lambda name: True)
    check(tp_gemm="stream-k", distributed_backend=backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"--tp-gemm stream-k needs a CUDA GPU, or .*; use torch"):
        check(tp_gemm="stream-k")
    monkeypatch.setattr(gemm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tp-gemm stream-k needs the package triton; use torch"):
        check(tp_gemm="stream-k", distributed_backend="nccl")


@pytest.mark.parametrize(("engine", "hooked"), [("symmetric", True), ("ring", False)])
def test_megatrons_demand_for_one_connection_is_lifted_for_the_symmetric_engine_alone(engine, hooked):
    words = f"--tensor-model-parallel-size 2 --tp-comm-type flux --tp-engine {engine}".split()
    assert ("connections" in launch.features(words, this_machine()).hooks) == hooked
    # Hopper passes for Blackwell, which demands nothing, and later ones stay what they are
    assert [without_one_connection(lambda found=found: found) for found in (9, 12)] == [10, 12]


SIZES = {
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "group_query_attention": True,
    "num_query_groups": 8,
    "ffn_hidden_size": 28672,
    "swiglu": True,
    "micro_batch_size": 1,
    "context_parallel_size": 1,
    "bf16": True,
}


def settled(capsys, **given):
    args = SimpleNamespace(**{**RUN, **SIZES, **given})
    settle_tensor(args, lambda: load_cluster("h100-ib"))
    return args, capsys.readouterr().out


def test_auto_names_what_it_takes_and_why(capsys):
    args, said = settled(capsys, tp_comm_type="auto", seq_length=65536)
    assert args.tp_comm_type in ("1d", "flux", "2d")
    assert said.startswith(f"[megatron-cp] --tp-comm-type {args.tp_comm_type}")
    assert "takes" in said
    assert "on h100-ib" in said
    check_tensor(args)


def test_a_grid_is_chosen_for_a_named_scheme(capsys):
    args, said = settled(capsys, tp_comm_type="2d", tp_grid=["auto"], seq_length=65536)
    assert said.startswith(f"[megatron-cp] --tp-comm-type 2d --tp-grid {' '.join(args.tp_grid)}: ")
    check_tensor(args)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tensor_model_parallel_size": 1}, "others need --tensor-model-parallel-size of at least 2"),
        ({"sequence_parallel": False}, "and --sequence-parallel"),
        ({"transformer_impl": "transformer_engine"}, "others need --transformer-impl local"),
        ({"fp8": "hybrid"}, "others do not do products in FP8"),
        ({"cp_cluster": "this-cpu"}, "has no rates of bfloat16"),
    ],
)
def test_auto_refuses_nothing(capsys, given, why):
    args, said = settled(capsys, **{"tp_comm_type": "auto", **given})
    assert args.tp_comm_type == "1d"
    assert why in said


def test_auto_takes_panels_for_gathered_weights_alone(capsys):
    args, said = settled(capsys, tp_comm_type="auto", tp_engine="panels", seq_length=65536)
    assert (args.tp_engine == "panels") == (args.tp_comm_type == "2d")
    assert len(said.splitlines()) == 1
    check_tensor(args)


def test_an_unknown_engine_is_refused_whatever_is_chosen(capsys):
    with pytest.raises(ValueError, match="unknown tensor-parallel engine 'rings'; did you mean 'ring'"):
        settled(capsys, tp_comm_type="auto", tp_engine="rings", tensor_model_parallel_size=1)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, "flux"),
        ({"tp_comm_type": "2d"}, "2d"),
        ({"sequence_parallel": False}, "1d"),
        ({"transformer_impl": "transformer_engine"}, "1d"),
        ({"moe_shared_expert_overlap": True}, "1d"),
    ],
)
def test_flux_stands_in_for_the_overlap_of_transformer_engine(capsys, given, taken):
    args = SimpleNamespace(**{**RUN, **SIZES, "tp_comm_type": "1d", "tp_comm_overlap": True, **given})
    stand_in_for_overlap(args)
    assert args.tp_comm_type == taken
    stands_in = (
        f"[megatron-cp] --tp-comm-type {taken} stands in for --tp-comm-overlap, which belongs to transformer-engine's "
        f"linears\n"
    )
    assert args.tp_comm_overlap == (taken == "1d")
    assert capsys.readouterr().out == (stands_in if taken != "1d" else "")
    if taken != "1d":
        check_tensor(args)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "stream-k needs a CUDA GPU"),
        ({"tp_comm_type": "1d"}, "the linears of --tp-comm-type 1d are Megatron's own"),
        ({"tp_engine": "symmetric"}, "the products of --tp-engine symmetric are torch's own"),
        ({"tp_comm_type": "auto", "tp_engine": "ring", "sequence_parallel": False}, ""),
    ],
)
def test_products_are_torchs_where_stream_k_cannot_run(capsys, monkeypatch, given, why):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gemm, "find_spec", lambda name: True)
    args, said = settled(capsys, tp_gemm="auto", **given)
    assert args.tp_gemm == "torch"
    assert f"[megatron-cp] --tp-gemm torch: {why}" in said or not why
    assert len(said.splitlines()) == 1
    if "tp_engine" not in given or not why:
        check_tensor(args)


def test_what_is_settled_stays(capsys):
    args, said = settled(capsys, tp_comm_type="flux")
    assert (args.tp_comm_type, said) == ("flux", "")


def test_the_linears_of_a_layer_are_read_from_the_arguments():
    args = SimpleNamespace(**{**RUN, **SIZES, "context_parallel_size": 2})
    assert layer_of(args) == (32, 8192, 10240, 8192, 57344, 28672)
    args.num_experts, args.moe_shared_expert_intermediate_size = 8, 1024
    assert layer_of(args)[4:] == (2048, 1024)
    args.num_experts, args.swiglu, args.ffn_hidden_size = None, False, None
    assert layer_of(args)[4:] == (32768, 32768)
