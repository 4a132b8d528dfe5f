"""What travels: counted by the fabrics, equal to the formulas of the registry."""

import pytest

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.algorithms.ring import route
from megatron_cp.context.heads import share_heads
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from megatron_cp.context.traffic import Formula, LocalSizes, TrafficFormula
from megatron_cp.grid import Grid, divisors
from tests.context.dense import problem
from tests.context.test_backends import sharded

RANKS = [2, 3, 4, 5, 8]
BYTES = 8
TOKENS, DIM = 24, 16
LEAST_SHARE = 0.4
"""Of a bound that the mean reaches at least; a formula of the wrong order does not."""


def on_grids(backend, ranks):
    """Every grid for a formula that names its axes, and none for the others."""
    if not BACKENDS.get(backend).traffic.axes:
        return [None]
    found = [Grid(inner, ranks // inner) for inner in divisors(ranks)]
    return [grid for grid in found if not BACKENDS.get(backend).capabilities.teams or ranks % grid.inner**2 == 0]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("ranks", "per_rank"),
    [
        pytest.param(3, (2, 1), id="p3-shared"),
        pytest.param(4, (2, 2), id="p4-equal"),
        pytest.param(8, (2, 1), id="p8-shared", marks=pytest.mark.slow),
        pytest.param(8, (2, 2), id="p8-equal", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_counted_bytes_are_the_registry_s_formula(backend, ranks, per_rank, causal):
    entry, (heads, kv_heads) = BACKENDS.get(backend), (ranks * n for n in per_rank)
    sizes, layout_of_loop = LocalSizes(ranks, TOKENS, 1, heads, kv_heads, DIM), entry.layout or "zigzag"
    for grid in on_grids(backend, ranks):
        problem = Problem(
            backend, ranks, TOKENS * ranks, heads, kv_heads, DIM, causal, grid=grid, layout=layout_of_loop
        )
        recorded, sense = record(problem), entry.traffic.sense_of(causal)
        passes = [recorded.forward, recorded.backward][: 2 if entry.traffic.backward else 1]
        for backward, run in enumerate(passes):
            formula = entry.traffic.elements(sizes, causal=causal, grid=grid, backward=bool(backward)).size(2, 4)
            assert counted_as(sense, run.sent, formula), (grid, run.sent, formula)


def test_every_algorithm_states_both_passes():
    assert all(BACKENDS.get(name).traffic.backward for name in ALGORITHMS)


def counted_as(sense, counted, formula):
    """True if bytes that were counted keep what a formula promises."""
    mean = sum(counted) / len(counted)
    if sense == "rank":
        return counted == pytest.approx([formula] * len(counted), rel=1e-12)
    if sense == "mean":
        return mean == pytest.approx(formula, rel=1e-12)
    return LEAST_SHARE * formula <= mean <= formula * (1 + 1e-12)


@pytest.mark.parametrize(
    ("sense", "counted", "keeps"),
    [
        ("rank", [4, 4], True),
        ("rank", [3, 5], False),
        ("mean", [3, 5], True),
        ("mean", [3, 4], False),
        ("at most", [3, 4], True),
        ("at most", [4, 5], False),
        ("at most", [1, 1], False),
    ],
)
def test_a_formula_that_is_wrong_is_noticed(sense, counted, keeps):
    assert counted_as(sense, counted, 4) == keeps


@pytest.mark.parametrize(
    ("text", "value"),
    [("2(p-1)U", 60), ("(p-1)/p (2Uq + 2U)", 45), ("2U p/3", 80 / 3), ("(4p-1)/(4p) U", 9.375), ("3/2 (p-1)U", 45)],
)
def test_a_formula_is_evaluated_as_it_is_written(text, value):
    formula = Formula(text)
    assert str(formula) == text
    assert formula(p=4, U=10, Uq=20, Us=1) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2(p-1)U, causal", "2**p", "p % 2", "f(p"])
def test_what_is_not_a_formula_is_refused(text):
    with pytest.raises((ValueError, SyntaxError)):
        Formula(text)


def test_a_formula_says_in_the_table_what_it_promises():
    traffic = TrafficFormula(full="2(p-1)U", causal="pU", sense="at most", causal_sense="at most", where="p = a c")
    assert str(traffic) == "at most 2(p-1)U, causal at most pU, p = a c"
    assert str(TrafficFormula(full="2(p-1)U", causal="3/4 of it")) == "2(p-1)U, causal 3/4 of it"


def sent(ranks, backend, causal, heads=8, kv_heads=2):
    """Bytes that each rank sends, forward and backward, and the size of one rank's K in bytes."""
    task = problem(12 * ranks, heads, kv_heads, causal=causal)

    def body(fabric):
        sharded(fabric, task, backend)
        return fabric.sent

    return in_process(ranks, body), task.k.numel() // ranks * BYTES


@pytest.mark.parametrize("ranks", RANKS)
def test_full_ring_sends_every_block_to_everybody_and_gradients_home(ranks):
    bytes_sent, unit = sent(ranks, "zigzag", causal=False)
    assert bytes_sent == [2 * (ranks - 1) * unit * 3] * ranks


@pytest.mark.parametrize(("name", "share"), [("zigzag", 0.75), ("contiguous", 0.5)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 16, 64])
def test_causal_ring_carries_only_what_someone_further_on_sees(name, ranks, share):
    tokens = 4 * ranks
    full = route(layout(name, tokens, ranks), FULL).volume
    assert route(layout(name, tokens, ranks), CAUSAL).volume == share * full


@pytest.mark.parametrize("ranks", RANKS)
def test_causal_zigzag_sends_three_quarters(ranks):
    bytes_sent, unit = sent(ranks, "zigzag", causal=True)
    assert sum(bytes_sent) == 0.75 * ranks * 2 * (ranks - 1) * unit * 3


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_sends_its_share_of_each_tensor(ranks):
    bytes_sent, unit = sent(ranks, "ulysses", causal=True, heads=8, kv_heads=8)
    # q, k, v, out forward; dout, dq, dk, dv backward
    assert bytes_sent == [8 * unit * (ranks - 1) // ranks] * ranks


@pytest.mark.parametrize(("ranks", "kv_heads"), [(8, 2), (4, 4), (16, 2)])
def test_gradients_of_kv_heads_on_several_ranks_are_sent_in_float32(ranks, kv_heads):
    recorded = record(Problem("ulysses", ranks, TOKENS * ranks, 16, kv_heads, DIM))
    queries, keys = (2 * (ranks - 1) * TOKENS * heads * DIM for heads in (16 // ranks, max(1, kv_heads // ranks)))
    assert recorded.forward.sent == [2 * (queries + keys)] * ranks
    assert recorded.backward.sent == [2 * queries + (2 if ranks <= kv_heads else 4) * keys] * ranks


def test_kv_head_goes_to_each_rank_that_needs_it_and_to_no_other():
    shares = share_heads(8, 2, 4)
    assert [share.stop - share.start for share in shares.q] == [2, 2, 2, 2]
    assert [(share.start, share.stop) for share in shares.kv] == [(0, 1), (0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize("ranks", RANKS)
def test_all_gather_sends_what_others_see_and_gradients_of_what_was_seen(ranks):
    bytes_sent, unit = sent(ranks, "all-gather", causal=False)
    assert bytes_sent == [2 * (ranks - 1) * unit * 3] * ranks
    bytes_sent, unit = sent(ranks, "all-gather", causal=True)
    assert sum(bytes_sent) == 0.75 * ranks * 2 * (ranks - 1) * unit * 3


@pytest.mark.parametrize(("window", "hops"), [(1, 1), (11, 1), (12, 1), (13, 2), (24, 2), (25, 3)])
def test_window_skips_transfers_outside_it(window, hops):
    way = route(layout("contiguous", 96, 8), Mask(window, 0))
    # rank r's queries see back to the blocks of `hops` ranks before
    assert [sum(part.stop > part.start for part in carried[1:]) for carried in way.carried[: 8 - hops]] == [hops] * (
        8 - hops
    )
    assert way.volume == sum(min(window, 12 * (8 - 1 - owner)) for owner in range(8))
