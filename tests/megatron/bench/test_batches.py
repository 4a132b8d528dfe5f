"""The bench of planned batches: losses first, the ratio of medians beside the ratio of the plans that the ranks run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.cli import app
from megatron_cp.megatron.bench import batches
from megatron_cp.megatron.bench.batches import BatchResult, PlannedTimes, bench, check_losses, plans_of
from megatron_cp.megatron.bench.turns import in_turns
from megatron_cp.recipe import recipe
from megatron_cp.recipe.command import flag_words
from megatron_cp.runlog import Iteration
from tests.megatron.batches.test_runs import write_corpus
from tests.megatron.pretraining import pretrain_losses
from tests.ranks import run_ranks

PLANNED = """
--context-parallel-size 1 --micro-batch-size 1 --global-batch-size 6 --seq-length 96 --max-position-embeddings 96
--calculate-per-token-loss --cp-tokens-per-rank 48 --cp-cluster this-cpu --lr-warmup-iters 0 --num-layers 1
--save=false --save-interval=false
""".split()


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    write_corpus(str(tmp_path / "corpus"), [5, 97, 30, 12, 80, 44] * 12)
    return str(tmp_path / "corpus")


def run_of(corpus: str) -> recipe.Recipe:
    return recipe.load("quickstart", {}, ["--data-path", corpus, *PLANNED])


def test_the_ratio_is_of_the_medians_of_each_step() -> None:
    def times(seconds: float, *rounds: list[float]) -> PlannedTimes:
        plan = SimpleNamespace(seconds=seconds, problem=SimpleNamespace(tokens=100), degrees={})
        return PlannedTimes(plans=[plan, plan], rounds=rounds)  # type: ignore[list-item]

    static = times(3.0, [4.0, 8.0], [4.0, 80.0], [5.0, 8.0])
    found = BatchResult(name="balanced", plan=times(2.0, [2.0, 4.0], [3.0, 4.0], [2.0, 4.0]), baseline=static)
    assert (found.measured, found.predicted) == (2.0, 1.5)
    assert found.by_round == [2.0, 12.0, 13 / 6]
    assert found.baseline.tokens / found.baseline.measured == pytest.approx(200 / 12)


def test_plans_take_turns_and_first_steps_do_not_count(monkeypatch: pytest.MonkeyPatch, corpus: str) -> None:
    assert list(in_turns(3, [("a", "b"), ("c", "d")])) == [*"abbaab", *"cddccd"]

    def trained(words: list[str], environment: dict[str, str]) -> list[Iteration]:
        assert words[words.index("megatron_cp.megatron.bench.turns") + 1] == "2"
        assert words[words.index("--cp-plan") + 1] == "balanced"
        assert words[words.index("--train-iters") + 1] == "12"
        assert words[words.index("--lr") + 1] == "0"
        seconds = [9e9] * 4 + [3.0, 1.0, 1.5, 4.0] + [30.0, 10.0, 10.0, 30.0]
        return [
            Iteration(at, 12, {"elapsed time per iteration (ms)": 1e3 * each, "lm loss": 5.0 + (at - 1) // 4})
            for at, each in enumerate(seconds, start=1)
        ]

    monkeypatch.setattr(batches, "trained", trained)
    said: list[str] = []
    found = bench(run_of(corpus), "balanced", 2, 2, said.append)
    assert said[0].startswith("trains 12 steps: ")
    assert found.baseline.rounds == [[3.0, 30.0], [4.0, 30.0]]
    assert found.plan.rounds == [[1.0, 10.0], [1.5, 10.0]]
    assert found.measured == 33.5 / 11.25
    assert found.as_json()["measured_over_predicted"] == found.measured / found.predicted
    assert [plan.problem.lengths for plan in found.plan.plans] == [
        plan.problem.lengths for plan in found.baseline.plans
    ]
    # without a long document `static` needs no larger groups
    assert [set(plan.degrees) for plan in found.baseline.plans] == [{1}, {2}]
    assert found.plan.degrees.keys() == {1, 2}


def test_losses_that_differ_are_not_timed() -> None:
    check_losses("balanced", [5.0, 5.00001])
    with pytest.raises(WrongResultError, match=r"losses \[5\.0, 5\.1\] with static and balanced"):
        check_losses("balanced", [5.0, 5.1])
    with pytest.raises(WrongResultError, match="nan"):
        check_losses("balanced", [5.0, float("nan")])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plan", "wlb"], "--plan wlb keeps documents for later steps, which static does not; take balanced"),
        (["--plan", "balancd"], "unknown batch algorithm 'balancd'; did you mean 'balanced'"),
        (["--global-batch-size", "none"], "--global-batch-size takes a count such as 4M"),
    ],
)
def test_what_cannot_be_timed_is_refused(corpus: str, words: list[str], said: str) -> None:
    words = ["bench", "batches", "--cluster", "this-cpu", *words, "quickstart", "--data-path", corpus]
    assert said in str(CliRunner().invoke(app, words).exception)


def digests(flags: list[str]) -> list[str]:
    """The plans of a run's steps."""
    from megatron_cp.megatron.batches import feed

    seen, old = [], feed.DocumentFeed.__next__

    def noted(self: Any) -> Any:
        step = old(self)
        seen.append(step.plan.digest)
        return step

    feed.DocumentFeed.__next__ = noted  # type: ignore[method-assign]
    try:
        pretrain_losses(flags)
    finally:
        feed.DocumentFeed.__next__ = old  # type: ignore[method-assign]
    return seen


@pytest.mark.slow
def test_plans_are_those_that_the_ranks_run(corpus: str) -> None:
    run = recipe.overridden(run_of(corpus), ["--cp-plan", "balanced", "--train-iters", "3", "--eval-iters", "0"])
    (found, other) = run_ranks(2, digests, flag_words(run.model_args))
    assert found == other == [plan.digest for plan in plans_of(run, "balanced", 3)]


@pytest.mark.slow
def test_two_trainings_stand_beside_their_plans(corpus: str) -> None:
    words = "--cluster this-cpu --rounds 1 --steps 2 --seq-length 96 --cp-tokens-per-rank 48 --global-batch-size 6"
    command = ["bench", "batches", *words.split(), "--json", "quickstart", "--data-path", corpus, "--num-layers", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["measured_over_predicted"] == pytest.approx(found["measured"] / found["predicted"])
    assert list(found["plans"]) == ["static", "balanced"]
    assert "2" in found["plans"]["static"]["degrees"]
    assert "1" in found["plans"]["balanced"]["degrees"]
    assert all(plan["seconds"] > 0 and plan["predicted_seconds"] > 0 for plan in found["plans"].values())
