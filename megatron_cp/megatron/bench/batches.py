"""Train one recipe with groups of their own for every microbatch, and with one size for all, step by step in turns.

Steps on the same documents follow each other without a change of the weights, so that their losses are equal, and the
ratio of their times stands beside the ratio of what their plans predict.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from statistics import median
from types import SimpleNamespace
from typing import Any

from megatron_cp.batches import ALGORITHMS
from megatron_cp.batches.order import DocumentOrder, steps
from megatron_cp.batches.plan import BatchPlan
from megatron_cp.batches.steps import plan_batch
from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.training import step_seconds, trained
from megatron_cp.errors import Refused
from megatron_cp.megatron.batches.documents import CorpusDocuments
from megatron_cp.megatron.batches.provider import DEFAULT_SPLIT
from megatron_cp.megatron.batches.request import problem_of_run
from megatron_cp.megatron.bench import turns as turns_entry
from megatron_cp.megatron.bench.turns import BASELINE, turns
from megatron_cp.recipe.command import command, complete, flag_words, processes
from megatron_cp.recipe.recipe import Recipe, Setting, overridden
from megatron_cp.runlog import Iteration

WARM = 1
"""Documents of first steps, which are not counted."""
CLOSE = 1e-5
"""Relative difference of the losses of a step, which Megatron prints to seven digits."""
SEED, VOCABULARY_MULTIPLE = 1234, 128
"""Megatron's own."""


@dataclass(frozen=True, kw_only=True)
class PlannedTimes:
    """Counted steps of one plan.

    plans:  of each step
    rounds: seconds of each step, round by round
    """

    plans: Sequence[BatchPlan]
    rounds: Sequence[Sequence[float]]

    @property
    def predicted(self) -> float:
        """Seconds of all steps by their plans."""
        return sum(plan.seconds for plan in self.plans)

    @cached_property
    def measured(self) -> float:
        """Seconds of all steps, each the median of its rounds."""
        return sum(median(times) for times in zip(*self.rounds, strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(plan.problem.tokens for plan in self.plans)

    @property
    def degrees(self) -> Counter[int]:
        """Number of groups with documents, by degree."""
        return sum((plan.degrees for plan in self.plans), Counter())


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """A plan beside the baseline."""

    name: str
    plan: PlannedTimes
    baseline: PlannedTimes

    @property
    def measured(self) -> float:
        """Tokens per second of the plan over those of the baseline."""
        return self.baseline.measured / self.plan.measured

    @property
    def predicted(self) -> float:
        """That ratio by the plans."""
        return self.baseline.predicted / self.plan.predicted

    @property
    def by_round(self) -> list[float]:
        """The measured ratio of each round."""
        return [sum(one) / sum(ours) for one, ours in zip(self.baseline.rounds, self.plan.rounds, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Return the figures; seconds are of a step in the mean."""
        both = {BASELINE: self.baseline, self.name: self.plan}
        return {
            "measured": self.measured,
            "predicted": self.predicted,
            "measured_over_predicted": self.measured / self.predicted,
            "rounds": self.by_round,
            "plans": {
                name: {
                    "seconds": times.measured / len(times.plans),
                    "predicted_seconds": times.predicted / len(times.plans),
                    "tokens_per_second": times.tokens / times.measured,
                    "degrees": dict(sorted(times.degrees.items())),
                }
                for name, times in both.items()
            },
        }


def bench(
    run: Recipe, name: str, rounds: int, count: int, say: Callable[[str], None] = lambda line: None
) -> BatchResult:
    """Train on the documents of `count` steps, `rounds` times with each plan.

    run: a recipe for planned batches, but for the plan's name
    say: is told before the training how long it takes
    Raises ValueError for a plan that runs other documents than the baseline, and RuntimeError where losses differ or a
    training fails.
    """
    if ALGORITHMS.get(name).delays:
        raise Refused(f"--plan {name} keeps documents for later steps, which {BASELINE} does not; take balanced")
    order = turns(rounds)
    steps = str((WARM + count) * len(order))
    # a step that changes no weight may be run again
    run = complete(overridden(run, ["--cp-plan", name, "--train-iters", steps, "--lr", "0", "--min-lr", "0"]))
    plans = {each: plans_of(run, each, WARM + count) for each in (BASELINE, name)}
    seconds = rounds * sum(plan.seconds for each in plans.values() for plan in each)
    say(f"trains {steps} steps: {seconds:.0f} s by their plans, without loading the libraries")
    made = command(replace(run, launch={**run.launch, "entry": Setting((turns_entry.__name__,), "bench batches")}))
    at = made.words.index(turns_entry.__name__) + 1
    found = trained([*made.words[:at], str(rounds), *made.words[at:]], made.environment)
    taken = [found[first : first + len(order)] for first in range(0, len(found), len(order))]
    for each in taken:
        check_losses(name, [step.loss for step in each])
    times = {
        each: PlannedTimes(plans=plans[each][WARM:], rounds=_rounds(taken[WARM:], order, at))
        for at, each in enumerate(plans)
    }
    return BatchResult(name=name, plan=times[name], baseline=times[BASELINE])


def _rounds(taken: Sequence[Sequence[Iteration]], order: Sequence[int], plan: int) -> list[list[float]]:
    """Return the seconds of one of the two plans in every round, for each step's documents."""
    places = [at for at, other in enumerate(order) if other == plan]
    seconds = [step_seconds(steps) for steps in taken]
    return [[step[at] for step in seconds] for at in places]


def check_losses(name: str, losses: Sequence[float | None]) -> None:
    """Raise WrongResultError unless all steps on the same documents have the loss of the first."""
    first = losses[0]
    for loss in losses:
        if first is None or loss is None or not abs(loss - first) <= CLOSE * abs(first):
            raise WrongResultError(f"the same documents have losses {losses} with {BASELINE} and {name} in turns")


def plans_of(run: Recipe, name: str, count: int) -> list[BatchPlan]:
    """Return the plans of the first steps of a run, as its ranks make them."""
    tensor, multiple = (
        run.number("--tensor-model-parallel-size", 1),
        run.number("--make-vocab-size-divisible-by", VOCABULARY_MULTIPLE),
    )
    args = SimpleNamespace(
        cp_cluster=run.flag("--cp-cluster", "") or None,
        cp_tokens_per_rank=run.number("--cp-tokens-per-rank", 0) or None,
        padded_vocab_size=-(-run.required("--vocab-size") // (multiple * tensor)) * multiple * tensor,
        world_size=processes(run),
    )
    problem = problem_of_run(args, flag_words(run.model_args))
    corpus = CorpusDocuments(run.flag("--data-path", ""), run.required("--seq-length"))
    order = DocumentOrder(corpus.numbers(run.flag("--split", DEFAULT_SPLIT), 0), run.number("--seed", SEED))
    documents = islice(steps(order, corpus.lengths, 0, run.required("--global-batch-size")), count)
    return [
        plan_batch(ALGORITHMS.get(name), replace(problem, lengths=tuple(corpus.lengths[found].tolist())))
        for found in documents
    ]


def degrees_in_words(degrees: Mapping[int, int]) -> str:
    """Return numbers of groups by their degree, as tables have them."""
    return "  ".join(f"{degree} x {number}" for degree, number in sorted(degrees.items()))
