"""The coverage proof: true for every backend of the registry, false for loops that were broken on purpose."""

import pytest

from megatron_cp.context import ALGORITHMS, BACKENDS, heads, tiles
from megatron_cp.context.masks import Mask
from megatron_cp.context.returns import Returns
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.probe import probe
from megatron_cp.context.trace.proof import Book, prove, small
from megatron_cp.context.trace.record import record
from megatron_cp.grid import most_square
from tests.cases import slow_unless
from tests.context.problems import MASKS, grids
from tests.context.trace.broken import swap_owners, turn_back

RANKS = [2, 3, 4]


def proved(backend, ranks, causal=True, window=None, **choices):
    return prove(Problem(backend, ranks, 6 * ranks, 8, 2, causal=causal, window=window, **choices))


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("ranks", RANKS, ids=lambda n: f"p{n}")
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_every_unmasked_pair_is_computed_once_in_each_pass(backend, ranks, causal, window):
    for grid in grids(backend, ranks):
        proof = proved(backend, ranks, causal, window, grid=grid)
        assert proof.covered, proof.problem
        visible = Book(Problem(backend, ranks, 6 * ranks, causal=causal, window=window)).visible
        assert proof.pairs == 8 * visible.sum()


BANDS = [mask for mask in MASKS if mask[1] is not None]


@pytest.mark.parametrize(("causal", "window"), BANDS)
@pytest.mark.parametrize("ranks", slow_unless([3], RANKS), ids=lambda n: f"p{n}")
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_so_it_is_where_the_kernel_takes_windows(backend, ranks, causal, window):
    for grid in grids(backend, ranks):
        proof = proved(backend, ranks, causal, window, grid=grid, windows=True)
        assert proof.covered, proof.problem


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("backend", ["zigzag", "striped", "ulysses"])
def test_a_band_that_is_off_by_one_is_caught(monkeypatch, backend, shift):
    right = tiles._band

    def wrong(steps):
        tile = right(steps)
        if not isinstance(tile.shape, Mask) or not tile.shape.left:
            return tile
        return tile._replace(shape=tile.shape._replace(left=tile.shape.left + shift))

    monkeypatch.setattr(tiles, "_band", wrong)
    tiles.tiles.cache_clear()
    try:
        assert not proved(backend, 3, True, (4, 0), windows=True).covered
    finally:
        tiles.tiles.cache_clear()


@pytest.mark.parametrize("backend", slow_unless(["usp"], ["ring", "ulysses", "all-gather", "usp", "wallfacer"]))
def test_sixty_four_ranks(backend):
    grid = most_square(64) if BACKENDS.get(backend).needs_grid else None
    # eight query heads to a KV head; these two give every rank a head of its own
    heads = 64 if backend in ("ulysses", "fpdt") else 8
    proof = prove(small(Problem(backend, 64, 2**20, heads, heads // 8, causal=True, grid=grid)))
    assert proof.covered, proof.problem


@pytest.mark.parametrize("backend", ["ulysses", "usp", "zigzag"])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_over_time(backend, chunks):
    for grid in grids(backend, 4):
        proof = prove(small(Problem(backend, 4, 2**20, 8, 2, grid=grid, chunks=chunks)))
        assert proof.covered, proof.problem


def test_small_problem_keeps_ranks_heads_and_the_window_s_share():
    long = Problem("zigzag", 8, 96_000, 32, 8, causal=True, window=(10_000, 0))
    short = small(long)
    assert (short.seq, short.window, short.ranks, short.heads) == (96, (10, 0), 8, 32)
    assert small(short) == short


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("backend", ["zigzag", "ring", "striped"])
def test_a_ring_that_turns_the_wrong_way_is_caught(monkeypatch, backend, causal, window):
    turn_back(monkeypatch)
    proof = proved(backend, 5, causal, window)
    assert not proof.covered
    assert proof.problem


def test_a_turned_ring_is_consistent_to_the_recorder(monkeypatch):
    turn_back(monkeypatch)
    # messages match and the work is right: only the payload shows that the labels lie
    trace = record(Problem("zigzag", 4, 48, 8, 2, causal=False))
    assert sum(trace.forward.work) == sum(trace.backward.work) == 48 * 48 * 8
    assert not proved("zigzag", 4, causal=False).covered


@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_a_swapped_owner_is_caught(monkeypatch, causal, window):
    swap_owners(monkeypatch)
    assert not proved("zigzag", 4, causal, window).covered


def test_a_lost_gradient_is_caught(monkeypatch):
    monkeypatch.setattr(Returns, "finish", lambda self: None)
    proof = proved("zigzag", 3)
    assert not proof.covered
    assert proof.problem.startswith(("dk", "dv"))


def test_swapped_heads_are_caught(monkeypatch):
    original = heads.share_heads

    def swapped(*args):
        shares = original(*args)
        return shares._replace(kv=shares.kv[::-1])

    swapped.__wrapped__ = original
    monkeypatch.setattr("megatron_cp.context.algorithms.ulysses.share_heads", swapped)
    assert "query heads" in proved("ulysses", 2).problem


@pytest.mark.parametrize("backend", ["zigzag", "ulysses"])
def test_the_probe_of_loops_without_a_kernel_sees_the_same(monkeypatch, backend):
    problem = Problem(backend, 3, 36, 4, 2, causal=True)
    book = Book(problem)
    assert probe(problem, book.visible) == ""
    wrong = book.visible.copy()
    wrong[20, 3] = False
    assert "position 20" in probe(problem, wrong)


def test_what_a_backend_refuses_is_not_called_uncovered():
    with pytest.raises(ValueError, match="ranks cannot share 8 query heads"):
        proved("ulysses", 16)
