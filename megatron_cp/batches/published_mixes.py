"""Batch algorithms on mixes of published lengths, beside what their papers claim."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from megatron_cp.batches import ALGORITHMS
from megatron_cp.batches.group_rates import GroupRequest, batch_problem
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.published import published_problem
from megatron_cp.batches.steps import plan_batch
from megatron_cp.context.choose import Record
from megatron_cp.corpus.mixes import MIXES, drawn
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.model import model_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.recipe import recipe

DOCUMENTS, LONGEST = 512, 320_000
"""Documents of a batch, and the tokens to which they are cut."""
ESTIMATED = (("llama3.1-8b", 64, 1, 1), ("llama3.1-70b", 512, 8, 4))
"""Models with full recomputation on h100-ib: GPUs, tensor-parallel size, pipeline stages."""
CLUSTER = "h100-ib"


class Claim(NamedTuple):
    """A paper's claim of an algorithm: times as fast as the best static setting.

    mean: of the paper's cases, otherwise the largest of them
    """

    algorithm: str
    ratio: float
    words: str
    source: str
    mean: bool = False


CLAIMS = (
    Claim("flexsp", 1.98, "GPT of 7B to 30B on 64 A100, up to 384K tokens", "arXiv:2412.01523"),
    Claim("dcp", 2.1, "video models, against packed and bucketed batches", "VideoSys, 2024"),
    Claim("wlb", 1.23, "models of 0.5B to 70B, up to 128K tokens", "arXiv:2503.17924", mean=True),
)


class MixRow(NamedTuple):
    """One mix, model and cluster: seconds of a step by algorithm, and the lower bound."""

    mix: str
    model: str
    cluster: str
    ranks: int
    seconds: dict[str, float]
    bound: float


def mix_rows(record: Record, mixes: Sequence[str] = tuple(MIXES)) -> Iterator[MixRow]:
    """Yield the steps of every algorithm, mix by mix on each model and cluster.

    record: makes traces of context-parallel loops
    """
    for mix in mixes:
        lengths = tuple(drawn(mix, DOCUMENTS, LONGEST))
        yield _row(mix, "GPT-7B, FlexSP's costs", "A100 40 GB", published_problem(lengths), 64)
        for name, gpus, tp, pp in ESTIMATED:
            dp = gpus // (tp * pp)
            parallel = Parallel(tp=tp, pp=pp, dp=dp, sp=tp > 1, global_batch=dp, recompute="full")
            model = model_of(recipe.load(f"models/{name}", {}))
            request = GroupRequest(model, parallel, load_cluster(CLUSTER), record)
            sizes = f"{name}, TP {tp}, PP {pp}"
            yield _row(mix, sizes, CLUSTER, batch_problem(request, lengths), gpus)


def ratios(rows: Sequence[MixRow], algorithm: str, baseline: str = "static") -> list[float]:
    """Return how many times as fast as a baseline an algorithm is, row by row."""
    return [row.seconds[baseline] / row.seconds[algorithm] for row in rows]


def holds(claim: Claim, rows: Sequence[MixRow]) -> str:
    """Say what of a claim the rows show."""
    found = ratios(rows, claim.algorithm)
    if claim.mean:
        return f"{fmean(found):.2f} in the mean, {max(found):.2f} at most"
    reached = sum(ratio >= claim.ratio for ratio in found)
    return f"reached on {reached} of {len(rows)} rows" if reached else f"{max(found):.2f} at most"


def _row(mix: str, model: str, cluster: str, problem: BatchProblem, ranks: int) -> MixRow:
    plans = {entry.name: plan_batch(entry, problem) for entry in ALGORITHMS}
    seconds = {name: plan.seconds for name, plan in plans.items()}
    return MixRow(mix, model, cluster, ranks, seconds, plans["static"].bound)
