"""Silent faults of megatron-core 0.19 are refused, and are still there: a test says when a refusal may go."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_cp.megatron.arguments.entry import NOT_OF_CONVERSATIONS, UNREAD, refuse_unread
from megatron_cp.megatron.arguments.upstream_faults import refuse_upstream_faults
from tests.megatron.pretraining import one_gather_at_a_time, pretrain_losses, tiny
from tests.ranks import RankError, run_ranks

INSTANCES = {"use_megatron_fsdp": True, "num_distributed_optimizer_instances": 2, "overlap_grad_reduce": True}
DOCUMENTS = {"dataloader_inter_document_masking": True}
FSDP2 = {"use_torch_fsdp2": True, "save_interval": 5}
PLANS = {"overlap_moe_expert_parallel_comm": True, "num_layers": 4, "moe_layer_freq": 1}
SEQUENCE = {
    "sequence_parallel": True,
    "tensor_model_parallel_size": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
UNMASKED = {"reset_attention_mask": True, "create_attention_mask_in_dataloader": False}
FSDP = (
    "--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion "
    "--data-parallel-sharding-strategy optim_grads_params --global-batch-size 8"
)
HSDP = f"{FSDP} --num-distributed-optimizer-instances 2"
OVERLAPS = "--overlap-grad-reduce --overlap-param-gather"
HFSDP = f"{HSDP} {OVERLAPS} --outer-dp-sharding-strategy optim"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"use_megatron_fsdp": True, "pipeline_model_parallel_size": 2},
            "takes the ranks of all stages .* got --pipeline",
        ),
        ({"use_megatron_fsdp": True, "pipeline_model_parallel_size": 1}, ""),
        (INSTANCES | {"overlap_grad_reduce": False}, "instances 2 reduces no gradients between the instances"),
        (INSTANCES | {"outer_dp_sharding_strategy": "optim", "clip_grad": 1.0}, "pass --clip-grad 0, or leave"),
        (FSDP2 | {"save": "runs/a"}, "--use-torch-fsdp2 loses the optimizer .* add --no-save-optim"),
        (FSDP2 | {"load": "runs/a", "no_save_optim": True}, "--use-torch-fsdp2 loses .* --no-load-optim"),
        (FSDP2 | {"save": "runs/a", "load": "runs/a", "no_save_optim": True, "no_load_optim": True}, ""),
        (FSDP2, ""),
        ({"save": "runs/a", "save_interval": None}, "--save runs/a says where .* add --save-interval"),
        ({"save": "runs/a", "save_interval": 5}, ""),
        ({"save": None, "save_interval": None}, ""),
        (DOCUMENTS | {"context_parallel_size": 2}, "with --context-parallel-size 2 gives tokens the positions"),
        (UNMASKED, "--reset-attention-mask hides nothing in stock layers without a mask tensor"),
        (UNMASKED | {"create_attention_mask_in_dataloader": True}, ""),
        (UNMASKED | {"spec": ["megatron_cp.megatron.spec", "gpt_layer_spec"]}, ""),
        (PLANS | {"moe_layer_freq": 2}, "leaves out the norm behind a last layer .* got --moe-layer-freq 2 for 4 lay"),
        (PLANS | {"moe_layer_freq": [1, 1, 1, 0]}, r"got --moe-layer-freq \[1, 1, 1, 0\] for 4 layers"),
        (PLANS | {"moe_layer_freq": [0, 1, 1, 1]}, ""),
        (PLANS | {"moe_layer_freq": 3}, ""),
        (PLANS | SEQUENCE | {"hidden_dropout": 0.1}, "drops the same .* got --hidden-dropout 0.1 and --attention-dr"),
        (PLANS | SEQUENCE | {"attention_dropout": 0.1}, "pass 0 for both, or leave one of the two flags out"),
        (PLANS | SEQUENCE, ""),
        (PLANS | SEQUENCE | {"tensor_model_parallel_size": 1, "hidden_dropout": 0.1}, ""),
        (INSTANCES | {"clip_grad": 1.0}, ""),
        (INSTANCES | {"outer_dp_sharding_strategy": "optim", "clip_grad": 0.0}, ""),
        (INSTANCES | {"num_distributed_optimizer_instances": 1, "overlap_grad_reduce": False}, ""),
        (DOCUMENTS | {"context_parallel_size": 1}, ""),
        (DOCUMENTS | {"context_parallel_size": 2, "spec": ["megatron_cp.megatron.spec", "gpt_layer_spec"]}, ""),
        ({}, ""),
    ],
)
def test_silent_faults_of_megatron_are_refused(arguments: dict[str, Any], text: str) -> None:
    args = SimpleNamespace(**arguments)
    if not text:
        refuse_upstream_faults(args, te=True)
        return
    with pytest.raises(ValueError, match=text) as refused:
        refuse_upstream_faults(args, te=True)
    assert str(refused.value).startswith("megatron-core 0.19: --")


NORMS = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]}


@pytest.mark.parametrize(
    ("arguments", "met"),
    [
        (NORMS, True),
        (NORMS | {"recompute_granularity": None, "recompute_activations": True}, True),
        (NORMS | {"recompute_modules": ["core_attn"]}, False),
        (NORMS | {"recompute_modules": None}, False),
        (NORMS | {"recompute_granularity": "full"}, False),
    ],
    ids=["selective", "activations", "other-modules", "no-modules", "full"],
)
def test_norms_are_computed_again_with_transformer_engine_alone(arguments: dict[str, Any], met: bool) -> None:
    args = SimpleNamespace(**arguments)
    refuse_upstream_faults(args, te=True)
    if not met:
        refuse_upstream_faults(args, te=False)
        return
    with pytest.raises(ValueError, match=r"layernorm of --recompute-modules .* leave layernorm out, or") as refused:
        refuse_upstream_faults(args, te=False)
    assert "\n" not in str(refused.value)


def test_a_norm_computed_again_still_asks_transformer_engine() -> None:
    import torch
    from megatron.core.tensor_parallel import CheckpointWithoutOutput, random

    if random.HAVE_TE:
        pytest.skip("transformer-engine answers")
    with pytest.raises(NameError, match="FP8GlobalStateManager"):
        random.CheckpointWithoutOutputFunction.apply(torch.sin, CheckpointWithoutOutput(), torch.ones(1))


def test_a_plan_still_leaves_out_the_final_norm_and_the_dropout_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.fine_grained_callables import build_transformer_layer_callables

    done: list[str] = []
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: done.append("the dropout of a rank"))
    layer: Any = SimpleNamespace(
        mlp=None,
        config=SimpleNamespace(moe_token_dispatcher_type="alltoall", sequence_parallel=True),
        _forward_attention=lambda **given: (given["hidden_states"], None),
        _forward_mlp=lambda hidden: hidden,
        init_backward_dw_wrapper=lambda: None,
        backward_dw_wrapper=None,
    )
    names = "attention_mask rotary_pos_emb rotary_pos_cos rotary_pos_sin packed_seq_params sequence_len_offset".split()
    decoder = SimpleNamespace(final_layernorm=lambda hidden: done.append("the norm"))
    state = SimpleNamespace(model=SimpleNamespace(decoder=decoder), **dict.fromkeys(names))
    node: Any = SimpleNamespace(is_mtp=False, is_last_layer=True, chunk_state=state)
    attention, _, mlp, *_ = build_transformer_layer_callables(layer)[0]
    assert mlp(node, attention(node, "hidden states")) == "hidden states"
    assert done == []


@pytest.mark.parametrize("name", UNREAD)
def test_the_packages_own_entry_ignores_no_kind_of_data(name: str) -> None:
    with pytest.raises(ValueError, match=f"ignores --{name.replace('_', '-')}; leave it out, or run Megatron's own"):
        refuse_unread(SimpleNamespace(**{name: True}))
    refuse_unread(SimpleNamespace(**{name: False}))


SFT = {"sft": True, "tokenizer_type": "SFTTokenizer"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        *((SFT | {name: True}, f"ignores --{name.replace('_', '-')}; leave it out") for name in NOT_OF_CONVERSATIONS),
        (SFT | {"mock_data": True}, "got --mock-data; give --data-path FILE.jsonl"),
        (SFT | {"tokenizer_type": "NullTokenizer"}, "got --tokenizer-type NullTokenizer; pass --chat-template FILE"),
        (SFT | {"chat_template": "no.jinja"}, "--chat-template no.jinja: No such file"),
        (
            SFT | {"context_parallel_size": 2},
            "in which stock layers give .* got --context-parallel-size 2; pass --spec",
        ),
    ],
)
def test_conversations_that_the_entry_cannot_pack_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as refused:
        refuse_unread(SimpleNamespace(**arguments))
    assert "\n" not in str(refused.value)
    refuse_unread(SimpleNamespace(**SFT))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--sft", "--sft trains on conversations, got --mock-data; give --data-path FILE.jsonl instead"),
        (HSDP, "reduces no gradients between the instances without --overlap-grad-reduce"),
        ("--recompute-granularity selective --recompute-modules layernorm", "layernorm of --recompute-modules asks"),
    ],
)
def test_a_run_is_refused_in_one_line(flags: str, text: str) -> None:
    with pytest.raises(RankError) as refused:
        run_ranks(1, pretrain_losses, tiny(flags))
    (line,) = {message.splitlines()[0] for message in refused.value.errors.values()}
    assert line.startswith("SystemExit: [megatron-cp] rank 0: ")
    assert text in line


def test_documents_are_still_hidden_by_a_mask_tensor_alone() -> None:
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    mask, _, positions = _get_ltor_masks_and_position_ids(torch.tensor([1, 0, 2]), 0, False, True, False, False)
    assert mask is None
    assert positions.tolist() == [0, 1, 2]


def unrefused(flags: list[str]) -> list[dict[str, Any]]:
    """Train with Megatron-FSDP, which wants CUDA_DEVICE_MAX_CONNECTIONS unset, and with the faults let through."""
    import os

    from megatron_cp.megatron.arguments import checks

    one_gather_at_a_time()
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS")
    checks.refuse_upstream_faults = lambda args, te: None
    return pretrain_losses(flags, named_weights=False)


@pytest.fixture(scope="module")
def replicas() -> list[dict[str, Any]]:
    """Plain data parallelism on four ranks."""
    return run_ranks(4, unrefused, tiny("--global-batch-size 8"))[0]


@pytest.mark.slow
def test_sharded_instances_with_overlap_are_plain_data_parallelism(replicas: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(run_ranks(4, unrefused, tiny(HSDP, OVERLAPS))[0], replicas, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [HSDP, HFSDP], ids=["no-overlap", "outer-sharding"])
def test_the_faults_are_still_there(flags: str, replicas: list[dict[str, Any]]) -> None:
    first = run_ranks(4, unrefused, tiny(flags))[0][0]
    assert first["loss"] == pytest.approx(replicas[0]["loss"], rel=2e-6)
    assert abs(first["grad_norm"] / replicas[0]["grad_norm"] - 1) > 0.2
