"""Small problems with simple rates, random ones, and the four mixes at the size of the published model."""

from hypothesis import strategies as st

from megatron_cp.batches.problem import BatchProblem, GroupRate
from megatron_cp.batches.published import published_problem
from megatron_cp.corpus.mixes import drawn

LONGEST = 320_000


def rates(degrees, fixed=1.0, token=0.01, square=1e-5, exchange=0.002):
    """Rates of groups that share all work, and exchange more the larger they are."""
    return tuple(
        (degree, GroupRate(fixed, token / degree, square / degree, exchange * (degree - 1) / degree))
        for degree in degrees
    )


def problem(lengths, ranks=4, capacity=100, degrees=None, per_node=None, **more):
    """A problem whose groups may have any size."""
    degrees = degrees or range(1, ranks + 1)
    return BatchProblem(
        lengths=tuple(lengths),
        ranks=ranks,
        capacity=capacity,
        rates=rates(degrees, **{name: more.pop(name) for name in ("fixed", "exchange") if name in more}),
        per_node=per_node or ranks,
        **more,
    )


def mix(name, documents=512):
    """512 documents of a mix under the published model."""
    return published_problem(tuple(drawn(name, documents, LONGEST)))


@st.composite
def random_problems(draw):
    """Any problem of up to 16 ranks that is not refused."""
    ranks = draw(st.integers(1, 16))
    capacity = draw(st.integers(1, 300))
    degrees = draw(st.sampled_from([[*range(1, ranks + 1)], [1 << at for at in range(ranks.bit_length())]]))
    if draw(st.booleans()):
        degrees = sorted({*draw(st.lists(st.sampled_from(degrees), min_size=1)), degrees[-1]})
    longest = degrees[-1] * capacity
    lengths = draw(st.lists(st.integers(1, longest) | st.integers(1, min(longest, 40)), min_size=1, max_size=40))
    per_node = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8, ranks) if size <= ranks]))
    stages = draw(st.sampled_from([1, 1, 2, 4]))
    return problem(
        lengths,
        ranks,
        capacity,
        degrees,
        per_node,
        fixed=draw(st.sampled_from([0.0, 0.5, 5.0])),
        exchange=draw(st.sampled_from([0.0, 0.02])),
        stages=stages,
        multiple=draw(st.sampled_from([1, stages])),
        lockstep=draw(st.booleans()),
        after=draw(st.sampled_from([0.0, 2.0])),
    )
