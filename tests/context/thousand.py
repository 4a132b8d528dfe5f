"""Attend a thousand batches of documents that all differ, and see what memory and caches hold on the way.

`python -m tests.context.thousand` does so for every algorithm and prints a table.
"""

import gc
import importlib
import itertools
import pkgutil
import random
from functools import _lru_cache_wrapper, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import megatron_cp.context
import megatron_cp.kernels
from megatron_cp.comm import Fabric, in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.documents import documents
from tests.ranks import run_ranks

RANKS, TOKENS = 2, 32
BATCHES = 1000
WARM = 100
"""Batches after which memory and caches may hold no more."""

CUT = ("all-gather", "usp", "zigzag")
"""Those that are measured with balanced blocks of documents too."""

ROWS = [*((name, False) for name in ALGORITHMS), *((name, True) for name in CUT)]
"""Pairs of algorithm and whether each batch is cut by blocks of its documents, not as one stream."""


class Held(NamedTuple):
    """What a process holds: entries of all caches, and resident memory in KiB."""

    entries: int
    resident: int


def caches() -> list[Any]:
    """Return every cache of the context and kernel packages."""
    for package in (megatron_cp.context, megatron_cp.kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    packages = (megatron_cp.context.__name__, megatron_cp.kernels.__name__)
    found = [each for each in gc.get_objects() if type(each) is _lru_cache_wrapper]
    return [each for each in found if each.__module__.startswith(packages)]


def measured(rows: list[tuple[str, bool]], at: tuple[int, ...]) -> list[list[Held]]:
    """Attend batches for each of the rows, caches empty at its start; what is held after `at` many, by row."""
    # what lay there before the process was forked, the caches too
    gc.unfreeze()
    # a list of all objects takes megabytes: made once
    every = caches()
    return [_measured(backend, cut, at, every) for backend, cut in rows]


def _measured(backend: str, cut: bool, at: tuple[int, ...], every: list[Any]) -> list[Held]:
    for cache in every:
        cache.cache_clear()
    ends = random.Random(0).sample(list(itertools.combinations(range(1, RANKS * TOKENS), 2)), at[-1])
    return in_process(RANKS, partial(_batches, backend=backend, cut=cut, ends=ends, at=at, every=every))[0]


def _batches(
    fabric: Fabric, backend: str, cut: bool, ends: list[tuple[int, ...]], at: tuple[int, ...], every: list[Any]
) -> list[Held]:
    axes = {"inner": fabric.subset([fabric.rank]), "outer": fabric} if BACKENDS.get(backend).needs_grid else {}
    made, found = plan(backend, cp=fabric, kernel="torch", **axes), []
    q, k, v = (torch.ones(TOKENS, 1, 2, 4).requires_grad_() for _ in range(3))
    for number, inner in enumerate(ends, start=1):
        packed = documents([0, *inner, RANKS * TOKENS])
        if cut:
            packed = packed.cut_by(packed.planned("blocks", RANKS))
        attend(q, k, v, made, documents=packed).sum().backward()
        if number in at:
            # the other ranks may be a batch behind
            fabric.all_gather(torch.zeros(1))
            gc.collect()
            found.append(Held(sum(each.cache_info().currsize for each in every), resident()))
    return found


def resident() -> int:
    """Return the resident memory of this process in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def in_a_process(rows: list[tuple[str, bool]], at: tuple[int, ...]) -> list[list[Held]]:
    """Call `measured` in a process of its own, which checks no types."""
    (found,) = run_ranks(1, measured, rows, at)
    return found


def line(row: tuple[str, bool], warm: Held, last: Held) -> str:
    """Return a line of the table."""
    name = row[0] + ", blocks" * row[1]
    grown = last.resident / warm.resident - 1
    return f"{name:<20} {warm.resident / 1024:.1f} MiB, {grown:+.2%}; entries {warm.entries}, {last.entries}"


if __name__ == "__main__":
    for row in ROWS:
        ((warm, last),) = in_a_process([row], (WARM, BATCHES))
        print(line(row, warm, last), flush=True)
