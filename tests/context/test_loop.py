"""Every algorithm is a loop, offers what others use of it, and keeps bounded caches."""

import importlib
import pkgutil

import pytest

from megatron_cp.context import ALGORITHMS, BACKENDS, algorithms
from megatron_cp.context.algorithms import ring, ulysses
from megatron_cp.context.algorithms.fpdt import FPDT
from megatron_cp.context.attend import plan
from megatron_cp.context.loop import Accumulating, HeadParallel, Loop

FILES = [f"{algorithms.__name__}.{found.name}" for found in pkgutil.iter_modules(algorithms.__path__)]


@pytest.mark.parametrize("backend", ALGORITHMS)
def test_every_algorithm_is_a_loop(backend):
    assert isinstance(BACKENDS.get(backend).load(), Loop)


def test_algorithms_offer_their_parts_to_others():
    loops = {name: BACKENDS.get(name).load() for name in ALGORITHMS}
    assert {name for name, loop in loops.items() if isinstance(loop, HeadParallel)} == {"ulysses", "usp"}
    assert {name for name, loop in loops.items() if isinstance(loop, Accumulating)} == {"ring", "zigzag", "striped"}


def test_chunks_cut_the_loop_of_the_backend():
    assert plan("zigzag").loop is ring
    assert plan("zigzag", chunks=2).loop == FPDT(ring)
    assert plan("fpdt").loop == plan("fpdt", chunks=2).loop == FPDT(ulysses)


@pytest.mark.parametrize("name", [*FILES, "megatron_cp.context.plan", "megatron_cp.context.auto"])
def test_caches_are_bounded(name):
    own = [value for value in vars(importlib.import_module(name)).values() if getattr(value, "__module__", "") == name]
    sizes = {value.__name__: value.cache_parameters()["maxsize"] for value in own if hasattr(value, "cache_parameters")}
    assert [function for function, size in sizes.items() if size is None] == []
