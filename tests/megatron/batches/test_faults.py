"""Faults of planned batches end in one line on every rank, before anything else is sent; a killed run goes on."""

import os
import re
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cp.batches import steps
from megatron_cp.comm import in_process
from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.command_line import check_script
from megatron_cp.megatron.checkpoint import resume
from megatron_cp.megatron.pipeline.planned import compare
from tests.megatron.batches.test_runs import planned, write_corpus
from tests.megatron.pretraining import pretrain_losses
from tests.ranks import DIED, RankError, run_ranks

DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


class OneStep:
    """What ranks compare of a step."""

    def __init__(self, text: str, refusal: str = "") -> None:
        self.text, self.refusal = text, refusal


def compared(steps: list[OneStep]) -> list[str]:
    """The line that each rank raises, empty for none."""

    def body(fabric: Any) -> str:
        try:
            compare(steps[fabric.rank], fabric, torch.device("cpu"))  # type: ignore[arg-type]
        except Refused as error:
            return str(error)
        return ""

    return in_process(len(steps), body)


def test_equal_steps_are_run() -> None:
    assert compared([OneStep("12 documents"), OneStep("12 documents")]) == ["", ""]


def test_steps_that_differ_are_refused_on_every_rank() -> None:
    lines = compared([OneStep("plan a"), OneStep("plan b"), OneStep("plan a")])
    assert len(set(lines)) == 1
    assert "differs between ranks: rank 0: plan a; rank 1: plan b; rank 2: plan a; give all ranks" in lines[0]


def test_a_refusal_of_one_rank_is_raised_on_all() -> None:
    lines = compared([OneStep("plan a"), OneStep("", "no group holds document 7")])
    assert lines[0] == lines[1]
    assert "cannot be planned: rank 0: plan a; rank 1: no group holds document 7" in lines[0]


def test_a_refusal_of_all_is_raised_as_it_is() -> None:
    assert compared([OneStep("", "no group")] * 2) == ["no group"] * 2


def unequal(corpus: str) -> Any:
    capacity = 24 if os.environ["RANK"] == "0" else 26
    return pretrain_losses(planned(corpus, f"--cp-plan balanced --cp-tokens-per-rank {capacity}"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("faults") / "corpus")
    write_corpus(prefix, [3, 9, 41, 14, 2, 30] * 12)
    return prefix


def lines_of(ranks: int, function: Any, *args: Any) -> list[str]:
    with pytest.raises(RankError) as caught:
        run_ranks(ranks, function, *args)
    assert sorted(caught.value.errors) == list(range(ranks))
    return [re.sub(r"rank \d+: ", "", text.splitlines()[0], count=1) for text in caught.value.errors.values()]


@pytest.mark.slow
def test_ranks_with_different_plans_end_in_one_line(corpus: str) -> None:
    lines = lines_of(2, unequal, corpus)
    assert len(set(lines)) == 1
    assert "the step differs between ranks: rank 0: 12 documents" in lines[0]


def with_an_empty_slot(corpus: str) -> Any:
    from megatron_cp.batches import plan

    old = plan.placed

    def placed(algorithm: str, problem: Any, slots: Any) -> Any:
        found = old(algorithm, problem, slots)
        pads = tuple(plan.RankGroup(rank, 1, ()) for rank in range(problem.ranks))
        broken = plan.BatchPlan(algorithm=algorithm, problem=problem, slots=(*found.slots, pads))
        plan.check_plan(broken)
        return broken

    steps.placed = placed
    try:
        return pretrain_losses(planned(corpus, "--cp-plan dcp --cp-tokens-per-rank 24"))
    finally:
        steps.placed = old


@pytest.mark.slow
def test_a_slot_without_documents_ends_in_one_line(corpus: str) -> None:
    lines = lines_of(2, with_an_empty_slot, corpus)
    assert len(set(lines)) == 1
    assert lines[0].endswith("1 slots hold no documents")


@pytest.mark.slow
def test_a_document_that_no_group_holds_ends_in_one_line(corpus: str) -> None:
    lines = lines_of(2, pretrain_losses, planned(corpus, "--cp-plan balanced --cp-tokens-per-rank 18"))
    assert len(set(lines)) == 1
    assert re.search(r"document 2 of .*corpus has 40 tokens, and the largest group holds 36, 2 ranks of 18", lines[0])


def test_a_script_cannot_run_a_plan() -> None:
    with pytest.raises(Refused, match=r"--cp-plan flexsp: .*; run megatron_cp.pretrain_gpt instead"):
        check_script(["--cp-plan", "flexsp"], layers=True)


def arguments(**changes: Any) -> Namespace:
    known = {"load": "there", "finetune": False, "no_load_optim": True, "cp_plan": "wlb", "global_batch_size": 12}
    return Namespace(**{**known, "seq_length": 40, "seed": 1, "split": "1", **changes})


@pytest.mark.parametrize(
    ("saved", "run", "said"),
    [
        (
            {},
            {"global_batch_size": 24},
            "and --global-batch-size 12, here it is 24: .* pass --global-batch-size 12, or",
        ),
        ({}, {"seq_length": 80}, "and --seq-length 40, here it is 80"),
        ({}, {"seed": 2}, "and --seed 1, here it is 2"),
        ({}, {"split": "2"}, "and --split 1, here it is 2"),
        ({}, {"cp_plan": "balanced"}, "saved with --cp-plan wlb and this run is with --cp-plan balanced: .* make them"),
        ({"cp_plan": "flexsp"}, {}, "saved with --cp-plan flexsp and this run is with --cp-plan wlb"),
        ({"cp_plan": None}, {}, "saved without --cp-plan and this run is with --cp-plan wlb"),
    ],
)
def test_a_run_in_which_other_documents_wait_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], run: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(resume, "_saved_arguments", lambda args: arguments(**saved))
    with pytest.raises(Refused, match=said) as caught:
        resume.check(arguments(**run))
    assert "\n" not in str(caught.value)
    resume.check(arguments(**run, finetune=True))
    resume.check(arguments(**saved))


def test_without_waiting_documents_a_run_goes_on_with_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_saved_arguments", lambda args: arguments(cp_plan="balanced"))
    resume.check(arguments(cp_plan="flexsp", global_batch_size=24))


def with_documents(flags: list[str], kill_at: int = 0) -> tuple[list[dict[str, Any]], list[tuple[int, ...]]]:
    """The losses of a run and the documents of each of its steps; killed when that step begins."""
    from megatron_cp.megatron.batches import feed

    if kill_at:
        # as torchrun starts a rank, so that its checkpoint writers end with it
        os.setsid()
    seen, old = [], feed.DocumentFeed.__next__

    def counted(self: Any) -> Any:
        step = old(self)
        seen.append(step.documents)
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    feed.DocumentFeed.__next__ = counted  # type: ignore[method-assign]
    try:
        return pretrain_losses(flags), seen
    finally:
        feed.DocumentFeed.__next__ = old  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["balanced", "wlb"])
def test_a_killed_run_goes_on_with_another_number_of_ranks(corpus: str, tmp_path: Path, plan: str) -> None:
    def flags(tokens: int, *more: str) -> list[str]:
        return planned(corpus, f"--cp-plan {plan} --cp-tokens-per-rank {tokens} {DISTRIBUTED}", *more)

    unbroken, order = run_ranks(1, with_documents, flags(48))[0]
    assert (plan == "wlb") == any(len(step) != 12 for step in order), "documents wait with wlb alone"
    saves = f"--save {tmp_path} --save-interval 2"
    with pytest.raises(RankError) as caught:
        run_ranks(2, with_documents, flags(24, saves), 4)
    assert any(DIED in text for text in caught.value.errors.values())
    # the plan of documents that wait has been run on one rank, too
    ranks, tokens = (1, 48) if plan == "wlb" else (3, 16)
    found = run_ranks(ranks, with_documents, flags(tokens, f"--load {tmp_path}"))
    if plan == "wlb":
        lines = lines_of(2, pretrain_losses, flags(24, f"--load {tmp_path} --global-batch-size 6"))
        assert len(set(lines)) == 1
        assert "was saved with --cp-plan wlb and --global-batch-size 12, here it is 6" in lines[0]
    # iteration 2 was saved
    assert [step["iteration"] for step in found[0][0]] == [3, 4, 5]
    assert all(seen == order[2:] for _, seen in found)
    for ours, theirs in zip(found[0][0], unbroken[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
