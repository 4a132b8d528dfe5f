"""The real pretrain() with experts that several ranks share (expert tensor parallelism) gives what one rank gives."""

import pytest

from tests.megatron.experts.test_parity import EP2, GROUPED, OVERLAPPED, TP2, assert_equal, run

ETP2 = "--expert-tensor-parallel-size 2"

STOCK = {
    "EP 2 x ETP 2, TP 2": (4, f"{TP2} {EP2} {ETP2} {OVERLAPPED}"),
    "ETP 2, TP 2, experts at once": (2, f"{TP2} {ETP2} {GROUPED}"),
}


@pytest.fixture(scope="module")
def alone():
    """The run on one rank."""
    return run(1)[0].log


@pytest.mark.slow
@pytest.mark.parametrize("case", STOCK)
def test_shared_experts_with_megatrons_dispatcher_train_as_on_one_rank(alone, case):
    ranks, flags = STOCK[case]
    found = run(ranks, flags)
    assert_equal(found[0].log, alone)
    assert {kind for each in found for kind in each.experts} == {"GroupedMLP" if GROUPED in flags else "SequentialMLP"}
