"""Registry of batch algorithms: which documents of a step share a microbatch, and how many ranks run each.

Pure: an algorithm is imported with its first use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.batches.plan import Share
    from megatron_cp.batches.problem import BatchProblem

__all__ = ["ALGORITHMS", "BatchAlgorithm"]

type Slots = "Callable[[BatchProblem], Sequence[Sequence[Share]]]"


@dataclass(frozen=True, kw_only=True)
class BatchAlgorithm:
    """One way to plan a batch.

    load:    imports the function that returns the groups of every slot and their documents, of the problem alone
    what:    one line for tables
    degrees: sizes of groups that it forms, in words
    delays:  documents may wait for a later step
    """

    name: str
    paper: str
    what: str
    degrees: str
    load: Callable[[], Slots]
    delays: bool = False
    aliases: tuple[str, ...] = ()


def _static() -> Slots:
    from megatron_cp.batches.static import static

    return static


def _homogeneous() -> Slots:
    from megatron_cp.batches.homogeneous import homogeneous

    return homogeneous


def _wlb() -> Slots:
    from megatron_cp.batches.wlb import wlb

    return wlb


def _flexsp() -> Slots:
    from megatron_cp.batches.flexsp import flexsp

    return flexsp


def _dcp() -> Slots:
    from megatron_cp.batches.dcp import dcp

    return dcp


def _balanced() -> Slots:
    from megatron_cp.batches.balanced import balanced

    return balanced


ALGORITHMS = Registry(
    "batch algorithm",
    [
        BatchAlgorithm(
            name="static",
            paper="baseline",
            what="one degree for all documents, like numbers of tokens in each microbatch",
            degrees="one",
            load=_static,
        ),
        BatchAlgorithm(
            name="homogeneous",
            paper="baseline",
            what="one degree in each slot, the best for its documents",
            degrees="powers of two, one in a slot",
            load=_homogeneous,
        ),
        BatchAlgorithm(
            name="wlb",
            paper="arXiv:2503.17924",
            what="one degree for all documents, like work in each microbatch; long documents wait for others",
            degrees="one",
            load=_wlb,
            delays=True,
        ),
        BatchAlgorithm(
            name="flexsp",
            paper="arXiv:2412.01523",
            what="slots of documents of like length, each divided into groups whose slowest is fastest",
            degrees="powers of two",
            load=_flexsp,
        ),
        BatchAlgorithm(
            name="dcp",
            paper="VideoSys, 2024",
            what="each bucket of lengths at its most efficient degree and batch size, then groups of like time",
            degrees="powers of two",
            load=_dcp,
        ),
        BatchAlgorithm(
            name="balanced",
            paper="megatron-cp",
            what="slots from the longest document down, filled and then packed tightly; at worst the better baseline",
            degrees="any",
            load=_balanced,
        ),
    ],
)
