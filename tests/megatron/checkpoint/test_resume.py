"""A run that stops and resumes is the unbroken run, with and without the distributed optimizer, in other topologies."""

from pathlib import Path
from typing import Any

import pytest

from megatron_cp.megatron import hooks
from megatron_cp.megatron.checkpoint import resume
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import RankError, run_ranks

STEPS = "--train-iters 4"
DISTRIBUTED = "--use-distributed-optimizer"
RESHARDABLE = f"{DISTRIBUTED} --dist-ckpt-optim-fully-reshardable"
CP2 = "--cp-comm-type p2p --context-parallel-size 2"

SAVED = {"plain": "", "distributed": DISTRIBUTED, "reshardable": RESHARDABLE, "bf16": f"{RESHARDABLE} --bf16"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For each kind of optimizer: the folder with a checkpoint after step 2 of 4, and the four unbroken steps."""
    made: dict[str, tuple[Path, list[dict]]] = {}

    def run(kind: str) -> tuple[Path, list[dict]]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            flags = tiny(STEPS, CP2, SAVED[kind], f"--save {folder} --save-interval 2")
            made[kind] = folder, run_ranks(2, pretrain_losses, flags)[0]
        return made[kind]

    return run


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "ranks", "topology"),
    [
        ("plain", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        pytest.param("distributed", 2, "", marks=pytest.mark.slow),
        pytest.param("distributed", 4, "--cp-comm-type p2p --context-parallel-size 4", marks=pytest.mark.slow),
        pytest.param("reshardable", 2, "--pipeline-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param("bf16", 2, CP2, marks=pytest.mark.slow),
    ],
)
def test_resuming_is_the_unbroken_run(saved: Any, kind: str, ranks: int, topology: str) -> None:
    folder, unbroken = saved(kind)
    flags = tiny(STEPS, SAVED[kind], topology, f"--load {folder} --ckpt-step 2")
    resumed = run_ranks(ranks, pretrain_losses, flags)[0]
    assert [step["iteration"] for step in resumed] == [3, 4]
    for ours, theirs in zip(resumed, unbroken[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def without_the_hooks(flags: list[str]) -> list[dict[str, Any]]:
    hooks.resumes_with_torch_adam = lambda: False  # type: ignore[assignment]
    return pretrain_losses(flags)


@pytest.mark.slow
def test_the_gap_that_the_optimizer_hooks_close_is_still_there(saved: Any) -> None:
    folder, _ = saved("distributed")
    with pytest.raises(RankError, match="AssertionError"):
        run_ranks(2, without_the_hooks, tiny(STEPS, CP2, DISTRIBUTED, f"--load {folder} --ckpt-step 2"))


def steps_after_loading(flags: list[str]) -> tuple[set[float], bool]:
    """The step counts in the optimizer's state, and whether each parameter has a tensor of its own."""
    seen: list[tuple[set[float], bool]] = []
    load = resume.load_state_dict

    def look(old: Any, optimizer: Any, *args: Any) -> Any:
        result = load(old, optimizer, *args)
        steps = [state["step"] for state in optimizer.optimizer.state.values()]
        seen.append(({float(step) for step in steps}, len({step.data_ptr() for step in steps}) == len(steps)))
        return result

    resume.load_state_dict = look  # type: ignore[assignment]
    pretrain_losses(flags)
    return seen[-1]


@pytest.mark.slow
def test_every_parameter_has_a_step_count_of_its_own(saved: Any) -> None:
    folder, _ = saved("distributed")
    for steps, own in run_ranks(
        2, steps_after_loading, tiny(STEPS, CP2, DISTRIBUTED, f"--load {folder} --ckpt-step 2")
    ):
        assert steps == {2.0}
        assert own


@pytest.mark.parametrize(
    ("kind", "flags", "text"),
    [
        ("plain", "--hidden-size 64", "is of another model: its hidden_size is 32, here it is 64"),
        ("plain", "--num-layers 4", "its num_layers is 2, here it is 4"),
        ("plain", DISTRIBUTED, "was saved without --use-distributed-optimizer"),
        pytest.param("distributed", "", "was saved with --use-distributed-optimizer", marks=pytest.mark.slow),
        pytest.param(
            "distributed",
            f"{DISTRIBUTED} --tensor-model-parallel-size 2",
            "save with --dist-ckpt-optim-fully-reshardable or pass --no-load-optim",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(saved: Any, kind: str, flags: str, text: str) -> None:
    folder, _ = saved(kind)
    with pytest.raises(RankError) as error:
        run_ranks(2, pretrain_losses, tiny(STEPS, flags, f"--load {folder} --ckpt-step 2"))
    for rank, message in error.value.errors.items():
        assert message.startswith(f"SystemExit: [megatron-cp] rank {rank}: the ")
        assert text in message.splitlines()[0]


@pytest.mark.slow
def test_weights_alone_load_without_the_optimizer(saved: Any) -> None:
    folder, unbroken = saved("distributed")
    flags = tiny(STEPS, f"--load {folder} --ckpt-step 2 --no-load-optim")
    resumed = run_ranks(2, pretrain_losses, flags)[0]
    # the first loss is of the saved weights, whatever the optimizer
    assert resumed[0]["loss"] == pytest.approx(unbroken[2]["loss"], rel=1e-6)


EXPERTS = "--num-experts 2 --moe-router-topk 1 --moe-router-pre-softmax --moe-aux-loss-coeff 0 --disable-bias-linear"


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts were divided between two ranks."""
    folder = tmp_path_factory.mktemp("experts")
    flags = tiny(
        EXPERTS, RESHARDABLE, f"--expert-model-parallel-size 2 --save {folder} --train-iters 1 --save-interval 1"
    )
    run_ranks(2, pretrain_losses, flags)
    return folder


@pytest.mark.slow
def test_experts_that_come_together_are_refused_in_one_line(apart: Path) -> None:
    flags = tiny(STEPS, EXPERTS, RESHARDABLE, f"--load {apart}")
    with pytest.raises(RankError) as error:
        run_ranks(2, pretrain_losses, flags)
    for message in error.value.errors.values():
        assert "cannot move from --expert-model-parallel-size 2 to 1" in message.splitlines()[0]
    assert run_ranks(2, pretrain_losses, [*flags, "--no-load-optim"])[0][0]["iteration"] == 2
