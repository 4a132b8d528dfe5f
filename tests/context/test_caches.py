"""Caches keep what a run uses again and forget what passes by: packed documents bring a new layout with each batch."""

import functools
import tracemalloc
import weakref

import pytest

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.documents import documents
from megatron_cp.context.layouts import gathered, layout, moves
from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.tiles import seen, tiles
from megatron_cp.grid import Grid
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded
from tests.context.thousand import BATCHES, WARM, caches, in_a_process, line

RANKS, LAYOUTS = 4, 400
FIRST = 1000
"""Small numbers are shared by all that hold them."""


def test_every_cache_has_a_bound():
    found = caches()
    assert {"layout", "gathered", "moves", "tiles", "seen"} <= {each.__name__ for each in found}
    assert [each.__qualname__ for each in found if each.cache_parameters()["maxsize"] is None] == []


def test_an_unbounded_cache_is_noticed():
    @functools.cache
    def unbounded() -> None: ...

    assert unbounded.cache_parameters()["maxsize"] is None


def use(number):
    """Ask for what a batch with a layout of its own needs: it has as many tokens as no other."""
    made = layout("zigzag", 2 * RANKS * number, RANKS)
    gathered(made)
    moves(made, layout("contiguous", 2 * RANKS * number, RANKS))
    tiles(made[0], made[-1], CAUSAL)
    seen(made[0], made[-1], CAUSAL)


def test_memory_does_not_grow_with_layouts_that_are_used_once():
    # tiles and seen keep one entry for each pair of ranks, the others fewer
    kept = gathered.cache_parameters()["maxsize"]
    tracemalloc.start()
    for number in range(FIRST, FIRST + kept):
        use(number)
    tiles.cache_clear()
    seen.cache_clear()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(FIRST + kept, FIRST + kept + LAYOUTS):
        use(number)
    tiles.cache_clear()
    seen.cache_clear()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [each.cache_info().currsize for each in (layout, gathered, moves)] == [
        each.cache_parameters()["maxsize"] for each in (layout, gathered, moves)
    ]
    # without a bound it would more than double
    assert after < 1.5 * before


def test_tiles_of_layouts_that_are_used_once_are_forgotten():
    kept = seen.cache_parameters()["maxsize"]
    for number in range(kept + LAYOUTS):
        for each in (seen, tiles):
            each((range(number, number + 2),), (range(number, number + 2),), CAUSAL)
    assert seen.cache_info().currsize == tiles.cache_info().currsize == kept


# tokens on zigzag are two pieces on each rank
@pytest.mark.parametrize("order", [["striped", "contiguous"], ["contiguous", "striped"]], ids="-".join)
@pytest.mark.parametrize("backend", [name for name in ALGORITHMS if BACKENDS.get(name).layout != "zigzag"])
def test_layouts_of_one_token_a_rank_share_what_is_cached(backend, order):
    """The positions of these layouts are equal, so that either finds what the other has left in the caches."""
    for cache in caches():
        cache.cache_clear()
    task = problem(3, 6, 3, causal=True)
    grid = Grid(1, 3) if BACKENDS.get(backend).needs_grid else None
    for outside in order:
        body = functools.partial(sharded, task=task, backend=backend, grid=grid, outside=outside)
        assert_equals_dense(in_process(3, body), task)


# one of each kind of loop and layout; `python -m tests.context.thousand` measures every algorithm
THOUSAND = [("all-gather", False), ("striped", False), ("usp", True), ("zigzag", False), ("zigzag", True)]


@pytest.mark.slow
@pytest.mark.parametrize("row", THOUSAND, ids=lambda row: f"{row[0]}{', blocks' if row[1] else ''}")
def test_memory_does_not_grow_over_a_thousand_batches_of_documents(row):
    ((warm, last),) = in_a_process([row], (WARM, BATCHES))
    print(line(row, warm, last))
    assert 0 < warm.entries == last.entries
    assert last.resident <= 1.01 * warm.resident


def test_results_of_documents_go_with_them():
    packed = documents([0, 5, 64])
    kept = packed.mask(CAUSAL)
    tiles((range(32),), (range(32),), kept)
    assert len(kept.results) == 1
    tiles((range(32),), (range(32),), kept)
    tiles((range(32),), (range(32),), kept, windows=True)
    assert len(kept.results) == 2
    gone = weakref.ref(kept)
    del packed, kept
    assert gone() is None
