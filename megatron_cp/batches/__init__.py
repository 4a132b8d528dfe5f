"""Registry of batch algorithms: which documents of a step share a microbatch, and how many ranks run each. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cp.batches.balanced import balanced
from megatron_cp.batches.dcp import dcp
from megatron_cp.batches.flexsp import flexsp
from megatron_cp.batches.homogeneous import homogeneous
from megatron_cp.batches.plan import BatchPlan, Share, placed
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.static import static
from megatron_cp.batches.wlb import wlb
from megatron_cp.registry import Registry

__all__ = ["ALGORITHMS", "BatchAlgorithm", "plan_batch"]


@dataclass(frozen=True, kw_only=True)
class BatchAlgorithm:
    """One way to plan a batch.

    slots:   returns the groups of every slot and their documents; a function of the problem alone
    what:    one line for tables
    degrees: sizes of groups that it forms, in words
    delays:  documents may wait for a later step
    """

    name: str
    paper: str
    what: str
    degrees: str
    slots: Callable[[BatchProblem], Sequence[Sequence[Share]]]
    delays: bool = False
    aliases: tuple[str, ...] = ()


ALGORITHMS = Registry(
    "batch algorithm",
    [
        BatchAlgorithm(
            name="static",
            paper="baseline",
            what="one degree for all documents, like numbers of tokens in each microbatch",
            degrees="one",
            slots=static,
        ),
        BatchAlgorithm(
            name="homogeneous",
            paper="baseline",
            what="one degree in each slot, the best for its documents",
            degrees="powers of two, one in a slot",
            slots=homogeneous,
        ),
        BatchAlgorithm(
            name="wlb",
            paper="arXiv:2503.17924",
            what="one degree for all documents, like work in each microbatch; long documents wait for others",
            degrees="one",
            slots=wlb,
            delays=True,
        ),
        BatchAlgorithm(
            name="flexsp",
            paper="arXiv:2412.01523",
            what="slots of documents of like length, each divided into groups whose slowest is fastest",
            degrees="powers of two",
            slots=flexsp,
        ),
        BatchAlgorithm(
            name="dcp",
            paper="VideoSys, 2024",
            what="each bucket of lengths at its most efficient degree and batch size, then groups of like time",
            degrees="powers of two",
            slots=dcp,
        ),
        BatchAlgorithm(
            name="balanced",
            paper="megatron-cp",
            what="slots from the longest document down, filled and then packed tightly; at worst the better baseline",
            degrees="any",
            slots=balanced,
        ),
    ],
)


def plan_batch(algorithm: BatchAlgorithm, problem: BatchProblem) -> BatchPlan:
    """Return the checked plan of an algorithm; equal arguments give equal plans on every rank."""
    return placed(algorithm.name, problem, algorithm.slots(problem))
