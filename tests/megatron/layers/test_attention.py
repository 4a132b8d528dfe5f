"""Our module in Megatron's core-attention slot: equal to dense attention, and honest about what it cannot do."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cp.context.layouts import layout
from megatron_cp.megatron.layers import attention as attention_layer
from megatron_cp.megatron.layers.attention import CoreAttention
from megatron_cp.megatron.machine.cpu import cpu_runtime
from tests.ranks import run_ranks

# Megatron's own config warns of its own default
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

S, B, H, G, D = 48, 2, 4, 2, 8


def config(**changes: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": H * D, "num_attention_heads": H, "num_query_groups": G}
    return TransformerConfig(**{**sizes, "attention_dropout": 0.0, "use_cpu_initialization": True, **changes})


def alone() -> ProcessGroupCollection:
    return ProcessGroupCollection()


def attention(
    settings: TransformerConfig, groups: ProcessGroupCollection | None = None, **changes: Any
) -> CoreAttention:
    contract = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return CoreAttention(settings, **{**contract, "pg_collection": groups or alone(), **changes})


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(S, B, H, D), (S, B, G, D), (S, B, G, D), (S, B, H * D)]
    q, k, v, dout = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float = D**-0.5) -> Tensor:
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(group, dim=2)) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v.repeat_interleave(group, dim=2)).flatten(2)


def results(module: Any, seed: int = 0, **call: Any) -> list[Tensor]:
    q, k, v, dout = inputs(seed)
    out = module(q, k, v, None, **call)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.shape == yours.shape
        assert (mine - yours).abs().max() <= tolerance * yours.abs().max()


def dense_module(causal: bool) -> Any:
    return lambda q, k, v, mask: dense(q, k, v, causal)


@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_one_rank_equals_dense(mask: AttnMaskType) -> None:
    ours = results(attention(config(), attn_mask_type=mask))
    assert_equal(ours, results(dense_module(mask is AttnMaskType.causal)))


@pytest.mark.parametrize("mask", [AttnMaskType.no_mask, AttnMaskType.no_mask.value, torch.tensor([3])])
def test_mask_type_of_the_call_wins_and_may_be_a_number(mask: Any) -> None:
    assert_equal(results(attention(config()), attn_mask_type=mask), results(dense_module(False)))


def test_copied_config_with_more_groups_is_fine() -> None:
    copied = copy.deepcopy(config())
    copied.num_query_groups = 4
    assert_equal(results(attention(copied)), results(dense_module(True)))


@pytest.mark.parametrize("scale", [0.25, 0.0])
def test_softmax_scale_is_taken(scale: float) -> None:
    ours = results(attention(config(), softmax_scale=scale))
    assert_equal(ours, results(lambda q, k, v, mask: dense(q, k, v, True, scale=scale)))


def test_kernel_of_the_config_is_used() -> None:
    settings = config()
    settings.cp_kernel = "reference"
    assert "kernel reference ('reference' was asked for by name), CP=1" in attention(settings).describe("cpu")


def test_recomputation_gives_the_same_gradients() -> None:
    module = attention(config())

    def recomputed(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        return torch.utils.checkpoint.checkpoint(module, q, k, v, mask, AttnMaskType.causal, use_reentrant=False)

    assert_equal(results(recomputed), results(module), tolerance=0.0)


def test_shapes_are_compared_in_the_first_call_and_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attend(q: Tensor, *others: Any, agreed: bool, **more: Any) -> Tensor:
        calls.append(agreed)
        return q

    monkeypatch.setattr(attention_layer, "attend", attend)
    module = attention(config())
    q, k, v, _ = inputs()
    for tokens in (S, S, S // 2, S // 2, S):
        module(q[:tokens], k[:tokens], v[:tokens], None)
    assert calls == [False, True, False, True, False]


def _one_rank_grows() -> list[str]:
    """The texts of a layer's calls, in the third and fifth of which rank 1 holds twice the tokens."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    module = attention(
        config(context_parallel_size=2, cp_comm_type="ring"),
        ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "hcp"]),
    )
    texts = []
    for call in range(6):
        longer = call in (2, 4) and torch.distributed.get_rank() == 1
        q, k, v, _ = inputs()
        q, k, v = (x if longer else x[: S // 2] for x in (q, k, v))
        try:
            module(q, k, v, None)
            texts.append("")
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_a_length_that_changes_on_one_rank_is_found_by_all() -> None:
    text = "all ranks must hold equally many tokens, got rank 0: 24, rank 1: 48; pad the sequence to a common length"
    assert run_ranks(2, _one_rank_grows) == [["", "", text, "", text, ""]] * 2


def _against_stock() -> bool:
    """Compare with the stock module on the same inputs, layer 2 of a model without and with query-key layer scaling."""
    torch.distributed.init_process_group("gloo")
    with cpu_runtime():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        groups, mask = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"]), torch.ones(S, S).triu(1).bool()
        for layer_scaling in (False, True):
            settings = config(apply_query_key_layer_scaling=layer_scaling, masked_softmax_fusion=False)
            stock = DotProductAttention(settings, 2, AttnMaskType.causal, "self", pg_collection=groups)
            theirs = results(
                lambda q, k, v, _, stock=stock: stock(q.float(), k.float(), v.float(), mask[None, None]).double()
            )
            assert_equal(results(attention(settings, groups, layer_number=2)), theirs, tolerance=1e-6)
    return True


def test_equals_stock_attention() -> None:
    assert run_ranks(1, _against_stock) == [True]


def _sinks_of_stock(softmax_type: str) -> list[Any]:
    """Checkpoint entries of the stock module and of ours under tensor parallelism, after a comparison of results."""
    torch.distributed.init_process_group("gloo")
    with cpu_runtime():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        model_parallel_cuda_manual_seed(1)
        settings = config(softmax_type=softmax_type, masked_softmax_fusion=False, tensor_model_parallel_size=2)
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "dp_cp"])
        stock = DotProductAttention(settings, 1, AttnMaskType.causal, "self", pg_collection=groups)
        ours = attention(settings, groups)
        # from stock to ours and back
        ours.load_state_dict(stock.state_dict())
        stock.load_state_dict(ours.state_dict())
        mask, half = torch.ones(S, S).triu(1).bool()[None, None], slice(0, H // 2)
        q, k, v, dout = inputs()
        dout = dout.unflatten(2, (H, D))[:, :, half].flatten(2)
        found = []
        for module, how in ((stock, mask), (ours, None)):
            leaves = [x.detach()[:, :, :n].float().requires_grad_() for x, n in ((q, H // 2), (k, 1), (v, 1))]
            out = module(*leaves, how)
            found.append([out.detach(), *torch.autograd.grad(out, [*leaves, *module.parameters()], dout.float())])
        assert_equal(*found, tolerance=2e-6)
        assert len(found[0]) == 4 + (softmax_type == "learnable")
        metadata = {"dp_cp_group": groups.dp_cp}
        return [
            {
                key: (part.key, part.global_shape, part.global_offset, part.dtype, part.replica_id)
                for key, part in module.sharded_state_dict("layer.", ((0, 3, 4),), metadata).items()
            }
            for module in (stock, ours)
        ]


@pytest.mark.parametrize("softmax_type", ["learnable", "off-by-one"])
def test_sinks_and_their_checkpoints_are_those_of_stock_attention(softmax_type: str) -> None:
    for stock, ours in run_ranks(2, _sinks_of_stock, softmax_type):
        assert ours == stock
        assert list(ours) == (["layer.softmax_offset"] if softmax_type == "learnable" else [])


def test_a_fixed_sink_of_zero_is_off_by_one() -> None:
    settings = config()
    settings.cp_sink = 0.0
    fixed, plain = results(attention(settings)), results(attention(config()))
    assert_equal(fixed, results(attention(config(softmax_type="off-by-one"))), tolerance=0.0)
    assert not torch.equal(fixed[0], plain[0])


def _sharded(sizes: list[int] | None, cases: list[tuple[str | None, AttnMaskType]]) -> list[str]:
    """How the modules of these comm types and masks describe themselves, after a comparison with dense attention."""
    torch.distributed.init_process_group("gloo")
    world = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=world, hierarchical_context_parallel_sizes=sizes)
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "hcp"])
    return [_equal_to_dense(groups, comm_type, mask) for comm_type, mask in cases]


def _equal_to_dense(groups: ProcessGroupCollection, comm_type: str | None, mask: AttnMaskType) -> str:
    world = torch.distributed.get_world_size()
    module = attention(config(context_parallel_size=world), groups, cp_comm_type=comm_type, attn_mask_type=mask)
    mine = torch.tensor([token for run in layout("zigzag", S, world)[torch.distributed.get_rank()] for token in run])
    whole = inputs()
    q, k, v, dout = (tensor.detach()[mine] for tensor in whole)
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    out = module(q, k, v, None)
    out.backward(dout)
    dense_out = dense(*whole[:3], mask is AttnMaskType.causal)
    dense_out.backward(whole[3])
    assert_equal(
        [out.detach(), q.grad, k.grad, v.grad],
        [dense_out.detach()[mine], *(tensor.grad[mine] for tensor in whole[:3])],
    )
    return module.describe("cpu")


def test_two_ranks_equal_dense() -> None:
    cases = [(comm_type, AttnMaskType.causal) for comm_type in (None, "p2p", "ring", "all_gather", "a2a")]
    described = run_ranks(2, _sharded, None, cases)
    assert described[0] == described[1]
    assert all(text.endswith("CP=2") for text in described[0])


def test_usp_takes_megatrons_hierarchical_groups() -> None:
    cases = [("usp", mask) for mask in (AttnMaskType.causal, AttnMaskType.no_mask)]
    assert all("CP=4 = 2 inner * 2 outer" in text for text in run_ranks(4, _sharded, [2, 2], cases)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_clip": True}, "qk_clip"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit"),
    ],
)
def test_constructor_refuses_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^layer 1: megatron-cp's attention does not do .*{words}.*; leave"):
        attention(config(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_mask_type": AttnMaskType.padding}, "mask type 'padding'"),
        ({"attn_mask_type": AttnMaskType.arbitrary}, "mask type 'arbitrary'"),
        ({"num_splits": 2}, "num_splits 2"),
        ({"cp_comm_type": "zigzak"}, "did you mean 'zigzag'"),
        ({"cp_comm_type": "usp"}, "hierarchical"),
    ],
)
def test_constructor_arguments_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention(config(), **changes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"attention_mask": torch.zeros(1, 1, S, S)}, "mask tensor"),
        ({"attention_bias": torch.zeros(1, H, S, S)}, "attention_bias"),
        (
            {"packed_seq_params": SimpleNamespace(qkv_format="thd")},
            "packed sequences of format thd outside of a",
        ),
        ({"attn_mask_type": AttnMaskType.padding_causal}, "padding_causal"),
    ],
)
def test_call_refuses_by_name(call: dict[str, Any], words: str) -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=words):
        attention(config())(q, k, v, **{"attention_mask": None, **call})


def test_dropout_by_another_kernel_is_refused_in_training_only() -> None:
    module = attention(config(attention_dropout=0.1))
    q, k, v, _ = inputs()
    module.eval()(q, k, v, None)
    with pytest.raises(
        ValueError, match=r"dropout \(attention_dropout 0.1\) by cp_kernel 'auto'; .* --cp-kernel triton or reference"
    ):
        module.train()(q, k, v, None)


def test_dropout_draws_a_seed_for_each_call_in_training() -> None:
    made = config(attention_dropout=0.5)
    made.cp_kernel = "reference"
    module = attention(made)
    q, k, v, _ = inputs()
    assert torch.equal(module.eval()(q, k, v, None), module(q, k, v, None))
    torch.manual_seed(3)
    first, second = module.train()(q, k, v, None), module(q, k, v, None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(module(q, k, v, None), first)


def test_cross_attention_needs_equal_lengths() -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=f"{S} queries over {S - 2} keys"):
        attention(config(), attn_mask_type=AttnMaskType.no_mask)(q, k[:-2], v[:-2], None)
