"""A stretched trace is the trace."""

import pytest

from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.stretch import TOKENS, stretching
from megatron_cp.grid import Grid


@pytest.mark.parametrize(
    "problem",
    [
        Problem("zigzag", 4, 4 * TOKENS * 3, 8, 2),
        Problem("zigzag", 4, 4 * TOKENS * 3, 8, 2, causal=False),
        Problem("all-gather", 3, 3 * TOKENS * 8, 8, 4),
        Problem("ulysses", 4, 4 * TOKENS * 5, 6, 2),
        Problem("usp", 8, 8 * TOKENS * 4, 8, 8, grid=Grid(4, 2)),
        Problem("double-ring", 6, 6 * TOKENS * 2, 4, 4, grid=Grid(3, 2)),
        Problem("distflash", 5, 5 * TOKENS * 2, 8, 2),
        Problem("zigzag", 4, 4 * TOKENS * 3, 8, 2, window=(100, 0)),
    ],
    ids=lambda problem: f"{problem.backend}-{problem.mask.window}",
)
def test_a_stretched_trace_is_what_would_be_recorded(problem: Problem) -> None:
    found, recorded = stretching(record)(problem), record(problem)
    assert found.problem == recorded.problem
    assert found.relayout == recorded.relayout
    for here, there in ((found.forward, recorded.forward), (found.backward, recorded.backward)):
        assert here == there
