"""A memo has one choice for each bucket of tokens, by costs or by measured steps, and forgets old buckets."""

from megatron_cp.experts import PIPELINED, WEIGHTS
from megatron_cp.experts.degree import WeighedDispatch
from megatron_cp.experts.dispatch_cost import STOCK
from megatron_cp.experts.memo import BUCKET, MOST, DispatchMemo, bucket_of

CUT = STOCK._replace(comm_type=PIPELINED, pieces=2)
WHOLE = STOCK._replace(gather=WEIGHTS)


def test_numbers_of_tokens_in_one_bucket_are_weighed_once():
    asked = []

    def weigh(tokens):
        asked.append(tokens)
        few = tokens <= 2 * BUCKET
        return [WeighedDispatch(STOCK if few else WHOLE, 1e-3), WeighedDispatch(CUT, 2e-3)]

    memo = DispatchMemo(weigh)
    counts = (1, BUCKET, BUCKET + 1, 2 * BUCKET, 3 * BUCKET, 5, 3 * BUCKET - 1)
    taken = [memo.take(tokens, 0.0) for tokens in counts]
    assert [each.dispatch for each in taken] == [STOCK, STOCK, STOCK, STOCK, WHOLE, STOCK, WHOLE]
    assert asked == [BUCKET, 2 * BUCKET, 3 * BUCKET]
    # told once for each bucket
    assert [bool(each.why) for each in taken] == [True, False, True, False, True, False, False]
    assert taken[4].why == (
        f"up to {3 * BUCKET} tokens of a rank: alltoall with weights gathered, of alltoall with weights gathered 1 ms, "
        "pipelined in 2 pieces 2 ms"
    )


def test_each_choice_is_measured_and_the_fastest_is_kept():
    ways = [WeighedDispatch(way, 1e-3) for way in (STOCK, CUT, WHOLE)]
    memo, seconds = DispatchMemo(lambda _: ways, tries=2), {STOCK: 3.0, CUT: 1.0, WHOLE: 2.0}
    taken, last = [], 9.0
    for step in range(10):
        # other tokens in between belong to another bucket
        found = memo.take(BUCKET if step != 3 else 9 * BUCKET, last)
        taken.append(found.dispatch)
        last = seconds[found.dispatch] + (step % 2)
    assert taken == [STOCK, STOCK, CUT, STOCK, CUT, WHOLE, WHOLE, CUT, CUT, CUT]


def test_old_buckets_are_forgotten():
    asked = []
    memo = DispatchMemo(lambda tokens: asked.append(tokens) or [WeighedDispatch(STOCK, 1.0)])
    for number in range(MOST + 1):
        memo.take((number + 1) * BUCKET, 0.0)
    memo.take(2 * BUCKET, 0.0)
    assert len(asked) == MOST + 1
    memo.take(BUCKET, 0.0)
    assert asked[-1] == bucket_of(1)
    assert len(asked) == MOST + 2
