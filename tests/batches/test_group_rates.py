"""The time of a group, described by two sums over its documents, is the estimator's own."""

from dataclasses import replace

import pytest

from megatron_cp.batches.group_rates import GroupRequest, batch_problem, degrees, group_rate, most_tokens
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import estimate
from megatron_cp.planner.model import model_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.stages import slowest_stage
from megatron_cp.planner.work import RankConfig
from megatron_cp.recipe import recipe
from tests.cases import slow_unless

CLUSTER = load_cluster("h100-ib")
TOKENS = 4096


def request(ranks=64, tp=1, pp=1, model="llama3.1-8b", cluster=CLUSTER, **more):
    parallel = Parallel(tp=tp, pp=pp, dp=ranks, sp=tp > 1, global_batch=ranks * pp, **more)
    return GroupRequest(model_of(recipe.load(f"models/{model}", {})), parallel, cluster, stretching(record))


def alone(asked, degree, tokens):
    """A group's one document in the estimator."""
    parallel = replace(asked.parallel, cp=degree, dp=1, global_batch=asked.parallel.pp)
    return RankConfig(
        model=asked.model, parallel=parallel, cluster=asked.cluster, seq=degree * tokens, record=asked.record
    )


CASES = [
    *((degree, {}) for degree in (1, 2, 3, 8, 16, 24, 64)),
    *((degree, {"tp": 4, "pp": 2, "ranks": 8}) for degree in (1, 2, 8)),
    *((degree, {"recompute": "full"}) for degree in (2, 16)),
    *((degree, {"backend": "all-gather"}) for degree in (4, 16)),
]


@pytest.mark.parametrize(("degree", "given"), slow_unless([(3, {})], CASES))
def test_one_document_takes_what_the_estimator_says(degree, given):
    asked = request(**given)
    rate = group_rate(asked, degree, TOKENS)
    for tokens, tolerance in ((TOKENS, 0.001), (TOKENS // 2, 0.08), (TOKENS // 4, 0.10)):
        rank = alone(asked, degree, tokens)
        assert rate.seconds(rank.seq, rank.seq**2) == pytest.approx(slowest_stage(rank).seconds, rel=tolerance)


def test_short_documents_take_less_than_a_long_one_and_transfers_stay():
    rate = group_rate(request(), 16, TOKENS)
    tokens = 16 * TOKENS
    short = rate.seconds(tokens, 64 * (tokens // 64) ** 2)
    assert rate.fixed + (rate.token + rate.exchange) * tokens == pytest.approx(short)
    assert short < rate.seconds(tokens, tokens**2)


def test_degrees_are_all_of_a_node_then_halves_of_nodes():
    assert degrees(3, 8) == [1, 2, 3]
    assert degrees(64, 8)[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
    assert degrees(64, 8)[-1] == 64
    assert degrees(21, 4)[-2:] == [20, 21]


def test_the_problem_has_the_sizes_of_the_run():
    found = batch_problem(request(ranks=4, tp=2, pp=2), (5000, 100), 2048)
    assert found.ranks == found.per_node == 4
    assert (found.stages, found.schedule, found.capacity, found.lockstep) == (2, "1f1b", 2048, False)
    assert found.degrees == (1, 2, 3, 4)
    assert found.after > 0


@pytest.mark.slow
def test_as_many_tokens_as_memory_holds():
    asked = request(ranks=8, recompute="full")
    tokens = most_tokens(asked)

    def fits(count):
        parallel = replace(asked.parallel, global_batch=2 * asked.ranks)
        return estimate(asked.model, parallel, asked.cluster, count, asked.record).leaves(asked.headroom)

    assert tokens % 256 == 0
    assert fits(tokens)
    assert not fits(2 * tokens)


@pytest.mark.parametrize(
    ("given", "capacity", "said"),
    [
        ({"backend": "usp"}, 2048, "no grid, which usp needs; take another"),
        ({"tp": 4}, 3, "--cp-tokens-per-rank must be at least 4"),
        ({"cluster": replace(CLUSTER, memory_bytes=None)}, None, "does not say how much memory"),
        ({"cluster": replace(CLUSTER, memory_bytes=20e9)}, None, "has no room for 256 tokens of llama3.1-8b"),
    ],
)
def test_what_has_no_rates_is_refused(given, capacity, said):
    with pytest.raises(Refused, match=said):
        batch_problem(request(**{"ranks": 2, **given}), (100,), capacity)
