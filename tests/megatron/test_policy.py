"""What the shipped recipes watch for, NaN, spikes and large gradients, changes nothing in a run that is well."""

from megatron_cp.recipe import recipe
from megatron_cp.recipe.command import flag_words
from megatron_cp.recipe.file import Unset
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

WATCHED = ("--rerun-mode", "--check-for-spiky-loss", "--check-for-large-grads")


def test_watching_leaves_losses_as_they_are() -> None:
    run = recipe.load("training/staying-alive", Unset({}))
    watched = flag_words({flag: run.model_args[flag] for flag in WATCHED})
    (plain,) = run_ranks(1, pretrain_losses, tiny())
    (seen,) = run_ranks(1, pretrain_losses, [*tiny(), *watched])
    assert seen == plain
