"""TransformerEngine's layers with our attention train as the local ones do, through the real `pretrain()`."""

from functools import cache

import pytest
import torch
from megatron.core.utils import is_te_min_version

from tests.te.training import LOCAL, TE, TE_LINEARS, Ran, grad_norms, losses, run, trained_hybrid

# the stand-in computes what torch does, in sums of another order
LOSS, GRAD_NORM = 1e-6, 1e-5

MODEL = "--num-layers 4 --global-batch-size 8 --train-iters 3"
CP = "--context-parallel-size 2"
PP = f"{MODEL} --pipeline-model-parallel-size 2"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"

CASES = {
    "context parallel": CP,
    "tensor and sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "split schedule": f"{PP} --pp-schedule zb-h1",
    "distributed optimizer": f"{CP} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "full recompute": f"{CP} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "layer norm, biases": f"{CP} --normalization LayerNorm --add-qkv-bias --qk-layernorm",
}


@cache
def once(implementation: str, flags: str, fused: bool = False) -> list[Ran]:
    return run(2, implementation, flags, fused=fused)


def assert_te_ran(ranks: list[Ran]) -> None:
    for ran in ranks:
        assert ran.forwards["TECoreAttention"] > 0
        assert all(ran.forwards[name] > 0 for name in TE_LINEARS)
        assert not any("DotProductAttention" in name for name in ran.forwards)
        assert ran.calls["generic_gemm"] > 0


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_local_layers(case: str) -> None:
    ours, local = (once(implementation, CASES[case]) for implementation in (TE, LOCAL))
    assert_te_ran(ours)
    assert not any(name.startswith("TE") for ran in local for name in ran.forwards)
    assert losses(ours) == pytest.approx(losses(local), rel=LOSS)
    assert grad_norms(ours) == pytest.approx(grad_norms(local), rel=GRAD_NORM)


def test_grouped_experts_train_as_local_ones_do() -> None:
    ours, local = once(TE, f"{CP} {EXPERTS} --moe-grouped-gemm"), once(LOCAL, f"{CP} {EXPERTS}")
    at_once = once(LOCAL, f"{CP} {EXPERTS} --moe-grouped-gemm")
    assert all(ran.forwards["TEGroupedMLP"] > 0 and ran.calls["te_general_grouped_gemm"] > 0 for ran in ours)
    assert all(ran.forwards["GroupedMLP"] > 0 and not local[0].forwards["GroupedMLP"] for ran in at_once)
    assert losses(ours) == pytest.approx(losses(local), rel=LOSS)
    assert losses(at_once) == pytest.approx(losses(local), rel=LOSS)


def test_a_hybrid_model_trains_as_with_local_layers() -> None:
    flags = f"{CP} --hybrid-layer-pattern *-*- --num-layers 4"
    (ours, counts), (local, _) = (trained_hybrid(flags, implementation) for implementation in (TE, LOCAL))
    assert len(ours) == 4
    assert ours == pytest.approx(local, rel=LOSS)
    assert all(counts[name] > 0 for name in ("ContextParallelHybridStack", "TECoreAttention", *TE_LINEARS))


def assert_bit_equal(found: list[Ran], expected: list[Ran]) -> None:
    assert losses(found) == losses(expected)
    assert grad_norms(found) == grad_norms(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours.parameters) == list(theirs.parameters)
        assert [
            name for name, value in ours.parameters.items() if not torch.equal(value, theirs.parameters[name])
        ] == []


def test_full_recompute_changes_no_bit() -> None:
    assert_bit_equal(once(TE, CASES["full recompute"]), once(TE, CP))


@pytest.mark.parametrize("fused", [False, True])
def test_delayed_weight_gradients_are_those_of_a_whole_backward(fused: bool) -> None:
    split, whole = once(TE, CASES["split schedule"], fused), once(TE, PP, fused)
    assert_bit_equal(split, whole)
    # two linears of attention and two of the MLP in each of a rank's two layers, 4 microbatches in each of 3 steps;
    # older linears do not say whether they delay, and compute weight gradients in the backward
    delayed = 4 * 2 * 4 * 3 if is_te_min_version("2.10.0") else 0
    assert [ran.calls["backward_dw"] for ran in split] == [delayed] * 2
    assert [ran.calls["backward_dw"] for ran in whole] == [0, 0]
