"""Caches keep what a run uses again and forget what passes by: packed documents bring a new layout with each batch."""

import functools
import gc
import importlib
import pkgutil
import random
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch

import megatron_cp.context
import megatron_cp.kernels
from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.documents import documents
from megatron_cp.context.layouts import gathered, layout, moves
from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.tiles import seen, tiles
from megatron_cp.grid import Grid
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded

RANKS, BATCHES = 4, 400
FIRST = 1000
"""Small numbers are shared by all that hold them."""


def caches():
    """Every cache of the context and kernel packages."""
    for package in (megatron_cp.context, megatron_cp.kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    packages = (megatron_cp.context.__name__, megatron_cp.kernels.__name__)
    found = [each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper]
    return [each for each in found if each.__module__.startswith(packages)]


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
    for number in range(FIRST + kept, FIRST + kept + BATCHES):
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
    for number in range(kept + BATCHES):
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


WARM, TOKENS = 100, 32


def batches(fabric, backend, count, cut=False):
    """Attend `count` batches of documents that differ; the cache entries and resident pages after WARM and all.

    cut: each batch is cut by blocks of its documents, not as one stream
    """
    axes = {"inner": fabric.subset([fabric.rank]), "outer": fabric} if BACKENDS.get(backend).needs_grid else {}
    made, found, numbers = plan(backend, cp=fabric, kernel="reference", **axes), [], random.Random(0)
    q, k, v = (torch.ones(TOKENS, 1, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    for number in range(1, count + 1):
        packed = documents([0, *sorted(numbers.sample(range(1, 2 * TOKENS), 5)), 2 * TOKENS])
        if cut:
            packed = packed.cut_by(packed.planned("blocks", 2))
        # two layers
        attend(attend(q, k, v, made, documents=packed), k, v, made, documents=packed).sum().backward()
        if number in (WARM, count):
            gc.collect()
            held = sum(each.cache_info().currsize for each in caches())
            found.append((held, int(Path("/proc/self/statm").read_text().split()[1])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "cut"), [*((name, False) for name in ALGORITHMS), ("all-gather", True), ("usp", True), ("zigzag", True)]
)
def test_documents_add_nothing_to_any_cache(backend, cut):
    for (before, _), (after, _) in in_process(2, lambda fabric: batches(fabric, backend, WARM + 30, cut)):
        assert before == after


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zigzag", "usp", "distflash"])
def test_memory_does_not_grow_over_a_thousand_batches_of_documents(backend):
    ranks = in_process(2, lambda fabric: batches(fabric, backend, 1000))
    for (entries, pages), (more_entries, more_pages) in ranks:
        assert entries == more_entries
        assert more_pages <= 1.01 * pages


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
