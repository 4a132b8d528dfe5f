"""Each element of a parameter is in one part of one rank, and a place of a node has one rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cp.replicas.parts import ParameterSpan, RankPart, parts_of, places_of, rows_of


@given(
    gaps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=6), ranks=st.integers(1, 7)
)
def test_parts_hold_each_element_once(gaps: list[tuple[int, int, bool]], ranks: int) -> None:
    spans, at = [], 0
    for gap, size, exact in gaps:
        spans.append(ParameterSpan(at + gap, at + gap + size, exact))
        at += gap + size
    elements = -(-at // ranks) * ranks
    parts = parts_of(spans, elements, ranks)
    assert len(parts) == ranks
    for exact in (False, True):
        found = [
            element
            for rank, part in enumerate(parts)
            for each in (part.plain if exact else part.coded)
            for element in range(each.start, each.stop)
            if rank * elements // ranks <= element < (rank + 1) * elements // ranks
        ]
        assert found == [at for one in spans if one.exact == exact for at in range(one.start, one.stop)]


def test_blocks_hold_elements_of_one_parameter() -> None:
    (part,) = parts_of([ParameterSpan(0, 10), ParameterSpan(10, 20), ParameterSpan(20, 24, exact=True)], 24, 1)
    assert part == RankPart((slice(0, 10), slice(10, 20)), (slice(20, 24),))
    assert rows_of(part.coded, 8) == 4


def test_uneven_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="25 elements has no 2 equal parts"):
        parts_of([], 25, 2)


@pytest.mark.parametrize(
    ("nodes", "places"),
    [
        ((0, 0, 1, 1, 2, 2), ((0, 2, 4), (1, 3, 5))),
        ((0, 1, 0, 1), ((0, 1), (2, 3))),
        ((4, 4, 4), ((0,), (1,), (2,))),
        # as many hops as go together
        ((0, 0, 1), ((0, 1, 2),)),
    ],
)
def test_a_place_of_a_node_has_one_rank(nodes: tuple[int, ...], places: tuple[tuple[int, ...], ...]) -> None:
    assert places_of(nodes) == places
