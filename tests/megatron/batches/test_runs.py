"""Planned batches through the real pretrain(): losses and norms are those of one rank, whatever the groups."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.cases import slow_unless
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

LONGEST = 40


def counted(flags: list[str]) -> tuple[list[dict[str, Any]], set[int]]:
    """The losses of a run, and the sizes of the groups in which this rank's attention ran."""
    from megatron_cp.megatron.layers import attention

    degrees, old = set(), attention.attend

    def attend(q: Any, k: Any, v: Any, plan: Any, **kwargs: Any) -> torch.Tensor:
        degrees.add(plan.cp.size)
        return old(q, k, v, plan, **kwargs)

    attention.attend = attend
    try:
        return pretrain_losses(flags), degrees
    finally:
        attention.attend = old


def write_corpus(prefix: str, lengths: list[int]) -> None:
    numbers = random.Random(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        tokens = np.array([numbers.randrange(126) for _ in range(length)])
        builder.add_document(tokens, [length])
    builder.finalize(f"{prefix}.idx")
    builder.data_file.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of short and long documents, some of one token and some that are cut."""
    prefix, numbers = str(tmp_path_factory.mktemp("planned") / "corpus"), random.Random(1)
    write_corpus(prefix, [numbers.choice([1, 2, 5, 9, 14, 20, 30, LONGEST + 1, 50]) for _ in range(100)])
    return prefix


def planned(corpus: str, *flags: str) -> list[str]:
    data = f"--data-path {corpus} --split 100,0,0 --seq-length {LONGEST} --max-position-embeddings {LONGEST}"
    steps = "--micro-batch-size 1 --global-batch-size 12 --train-iters 5 --calculate-per-token-loss"
    return tiny(data, steps, *flags, without="--mock-data")


@pytest.fixture(scope="module")
def alone(corpus: str) -> list[dict[str, Any]]:
    """The run on one rank."""
    log, degrees = run_ranks(1, counted, planned(corpus, "--cp-plan balanced --cp-tokens-per-rank 48"))[0]
    assert degrees == {1}
    return log


def assert_equal_runs(run: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    assert len(run) == len(one) == 5
    for ours, theirs in zip(run, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


CASES = {
    "balanced on 3": ("--cp-plan balanced --cp-tokens-per-rank 16", 3, {1, 2, 3}),
    "balanced on 2": ("--cp-plan balanced --cp-tokens-per-rank 24", 2, {1, 2}),
    "balanced on 4": ("--cp-plan balanced --cp-tokens-per-rank 12 --use-distributed-optimizer", 4, {1, 2, 3, 4}),
    "flexsp on 4": ("--cp-plan flexsp --cp-tokens-per-rank 12", 4, {1, 2, 4}),
}


@pytest.mark.parametrize("case", slow_unless(["balanced on 3"], CASES))
def test_losses_are_those_of_one_rank(corpus: str, alone: list[dict[str, Any]], case: str) -> None:
    flags, ranks, expected = CASES[case]
    results = run_ranks(ranks, counted, planned(corpus, flags))
    assert set().union(*(degrees for _, degrees in results)) == expected
    assert_equal_runs(results[0][0], alone)
