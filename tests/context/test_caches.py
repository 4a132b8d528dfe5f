"""Caches keep what a run uses again and forget what passes by: packed documents bring a new layout with each batch."""

import functools
import gc
import importlib
import pkgutil
import tracemalloc

import megatron_cp.context
import megatron_cp.kernels
from megatron_cp.context.layouts import gathered, moves, zigzag
from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.tiles import seen, tiles

RANKS, BATCHES = 8, 400
BYTES_PER_BATCH = 1024


def caches():
    """Every cache of the context and kernel packages."""
    for package in (megatron_cp.context, megatron_cp.kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    packages = (megatron_cp.context.__name__, megatron_cp.kernels.__name__)
    found = [each for each in gc.get_objects() if isinstance(each, functools._lru_cache_wrapper)]
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
    """Everything that rank 0 of a batch asks of its layout, which no other batch has."""
    layout = tuple(tuple(range(run.start + number, run.stop + number) for run in runs) for runs in zigzag(64, RANKS))
    gathered(layout)
    moves(layout, layout)
    for runs in layout:
        tiles(layout[0], runs, CAUSAL)
        seen(layout[0], runs, CAUSAL)


def test_memory_does_not_grow_with_layouts_that_are_used_once():
    tracemalloc.start()
    # tiles and seen keep the most, with as many entries in a batch as there are ranks
    full = tiles.cache_parameters()["maxsize"] // RANKS
    for number in range(full):
        use(number)
    before, _ = tracemalloc.get_traced_memory()
    for number in range(full, full + BATCHES):
        use(number)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(each.cache_info().currsize <= each.cache_parameters()["maxsize"] for each in caches())
    assert after - before < BATCHES * BYTES_PER_BATCH
