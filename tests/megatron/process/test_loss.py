"""Masked tokens under context parallelism: our entry's gradients are those of one rank; the launcher names the flag."""

from typing import Any

import pytest
import torch

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.command_line import check_script
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

CP = "--context-parallel-size 2 --cp-comm-type zigzag"
CP4 = "--context-parallel-size 4 --cp-comm-type zigzag"


def masked_losses(flags: list[str]) -> list[dict[str, Any]]:
    """Train with the third of the labels masked that begins the sequence, so that ranks of a group differ."""
    from megatron.core.datasets.gpt_dataset import MockGPTDataset

    get = MockGPTDataset.__getitem__

    def masked(self: Any, index: int | None) -> dict[str, torch.Tensor]:
        sample = get(self, index)
        mask = sample["loss_mask"].clone()
        mask[: len(mask) // 3] = 0
        return {**sample, "loss_mask": mask}

    MockGPTDataset.__getitem__ = masked
    return pretrain_losses(flags)


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    return run_ranks(1, masked_losses, tiny("--cp-comm-type zigzag --eod-mask-loss"))[0]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, CP),
        # two replicas, each with one of the two microbatches
        pytest.param(4, CP, marks=pytest.mark.slow),
        pytest.param(4, f"{CP} --tensor-model-parallel-size 2 --sequence-parallel", marks=pytest.mark.slow),
        pytest.param(4, f"{CP} --pipeline-model-parallel-size 2 --pp-schedule zb-h1", marks=pytest.mark.slow),
    ],
)
def test_masked_tokens_give_the_gradients_of_one_rank(ranks: int, flags: str, one: list[dict[str, Any]]) -> None:
    run = run_ranks(ranks, masked_losses, tiny(f"--eod-mask-loss {flags}"))[0]
    for ours, theirs in zip(run, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


# with two layers, the mask's edge is rolled from one rank's tokens to another's
@pytest.mark.slow
@pytest.mark.parametrize("mean", ["", "--calculate-per-token-loss"])
def test_masked_tokens_of_multi_token_prediction_give_the_gradients_of_one_rank(mean: str) -> None:
    flags = f"--eod-mask-loss --mtp-num-layers 2 --cp-comm-type zigzag {mean}"
    expected = run_ranks(1, masked_losses, tiny(flags))[0]
    for ours, theirs in zip(run_ranks(4, masked_losses, tiny(flags, CP4))[0], expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def refused_by_the_spec(flags: list[str]) -> str:
    """Return what the layer spec alone, without our launcher, says in a user's own script."""
    import sys

    from megatron_cp.megatron.layers import specs

    sys.argv = ["pretrain_gpt.py", *flags]
    with pytest.raises(Refused) as refusal:
        specs.check_unmodified_script()
    return str(refusal.value)


@pytest.mark.parametrize("flags", ["--eod-mask-loss --context-parallel-size 2"])
def test_the_spec_refuses_it_where_no_launcher_does(flags: str) -> None:
    (said,) = run_ranks(1, refused_by_the_spec, flags.split())
    assert said.startswith("--eod-mask-loss with --context-parallel-size 2: ")


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--eod-mask-loss --context-parallel-size 2", "--eod-mask-loss"),
        ("--sft --context-parallel-size=4", "--sft"),
        ("--allow-ambiguous-pad-tokens --context-parallel-size 2", "--allow-ambiguous-pad-tokens"),
        ("--null-tokenizer-pad-id 7 --context-parallel-size 2", "--null-tokenizer-pad-id 7"),
        ("--null-tokenizer-pad-id=-1 --context-parallel-size 2", None),
        ("--eod-mask-loss --context-parallel-size 2 --calculate-per-token-loss", None),
        ("--eod-mask-loss --context-parallel-size 1", None),
        ("--eod-mask-loss", None),
        ("--context-parallel-size 2", None),
    ],
)
def test_a_scripts_loss_that_differs_from_one_ranks_is_refused(flags: str, refused: str | None) -> None:
    if refused is None:
        check_script(flags.split(), layers=True)
        return
    with pytest.raises(
        Refused, match=rf"^{refused} with --context-parallel-size .* pass --calculate-per-token-loss, or"
    ):
        check_script(flags.split(), layers=False)
