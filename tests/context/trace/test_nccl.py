"""The loops of all backends run under NCCL's rules for messages, however the processes are started."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import combinations, product

import pytest

from megatron_cp.context import ALGORITHMS, BACKENDS, PLACEMENTS
from megatron_cp.context.trace.events import Pass, Problem, Trace, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric, RecordingKernel, plan_on, record
from megatron_cp.errors import Refused
from tests.cases import slow_unless
from tests.context.problems import MASKS, grids
from tests.context.slicing import run_slices
from tests.context.test_documents import TOKENS, case, grid_of
from tests.context.test_slices import SLICED
from tests.context.trace.launches import launches
from tests.nccl import ALL_RULES, DeadlockError, Message, MismatchError, Operation, Rules, Tally, play

Case = tuple[tuple[bool, tuple[int, int] | None], int | None]
"""A mask, and the number of chunks."""

CAUSAL: Case = ((True, None), None)
CASES: list[Case] = [*zip(MASKS, (2, None, 2, None), strict=True)]


def traces(backend: str, ranks: int, cases: Iterable[Case]) -> Iterator[Trace]:
    """These cases on every grid, with the heads on either axis, except those that the backend refuses."""
    placements = PLACEMENTS if BACKENDS.get(backend).capabilities.placement else ("head-first",)
    for grid, placement, ((causal, window), chunks) in product(grids(backend, ranks), placements, cases):
        how = {"causal": causal, "window": window, "grid": grid, "placement": placement, "chunks": chunks}
        with suppress(Refused):
            yield record(Problem(backend, ranks, 24 * ranks, 12, 4, 16, **how))


def assert_runs(backend: str, ranks: int, cases: Iterable[Case], tally: Tally) -> None:
    for trace in traces(backend, ranks, cases):
        tally.play(launches(trace.forward, trace.backward))


def is_quick(backend: str, ranks: int) -> bool:
    return ranks == (4 if BACKENDS.get(backend).takes_grid else 3)


@pytest.mark.parametrize(("backend", "ranks"), slow_unless(is_quick, product(ALGORITHMS, range(2, 9))))
def test_no_loop_deadlocks(backend: str, ranks: int, tally: Tally) -> None:
    with tally.some():
        assert_runs(backend, ranks, [CAUSAL], tally)


LAID_OUT = ["stream", "blocks", "document"]
LOOPS = [(backend, ranks) for backend, ranks in product(ALGORITHMS, (3, 4)) if is_quick(backend, ranks)]


@pytest.mark.parametrize(
    ("loop", "layout", "cut"),
    slow_unless(
        lambda loop, layout, cut: cut and (loop[0], layout) == ("striped", "stream"),
        product(LOOPS, LAID_OUT, (True, False)),
    ),
)
def test_no_loop_deadlocks_on_packed_documents(loop: tuple[str, int], layout: str, cut: bool, tally: Tally) -> None:
    """`cut`: the ranks' tokens have the layout outside attention too."""
    backend, ranks = loop
    how = {"grid": grid_of(backend, ranks), "documents": case("causal", ranks).packed, "document_layout": layout}
    try:
        trace = record(Problem(backend, ranks, TOKENS * ranks, 12, 4, 16, cut=cut, **how))
    except Refused:
        # an algorithm with a layout of its own
        assert layout != "stream"
        return
    tally.play(launches(trace.forward, trace.backward))


def sliced(problem: Problem, lengths: list[int]) -> Pass:
    """What all ranks do for a sequence in slices, forward and backward."""
    ranks = []
    for rank in range(problem.ranks):
        with Recorder() as recorder:
            fabric = RecordingFabric(recorder, tuple(range(problem.ranks)), rank)
            plan = plan_on(problem, fabric, RecordingKernel(recorder, windows=False))
            run_slices(problem, plan, lengths, "meta")
            ranks.append(recorder.take())
    return Pass(tuple(ranks), problem.head_dim)


@pytest.mark.parametrize(("backend", "ranks"), slow_unless([("zigzag", 3), ("usp", 4)], product(SLICED, (3, 4))))
def test_no_loop_deadlocks_on_slices_of_a_sequence(backend: str, ranks: int, tally: Tally) -> None:
    lengths = [12 * ranks, 8 * ranks, 4 * ranks]
    # a backend that exchanges heads has 8 ranks at most for them
    run = sliced(Problem(backend, ranks, sum(lengths), 24, 8, 16, grid=grid_of(backend, ranks)), lengths)
    match(run)
    tally.play(launches(run))


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_no_collective_deadlocks_on_several_nodes(per_node: int) -> None:
    for causal in (True, False):
        trace = record(Problem("all-gather", 8, 192, 8, 4, 16, causal, ranks_per_node=per_node))
        ranks = launches(trace.forward, trace.backward)
        whole = [operation for operation in ranks[0] if len(operation.messages) == 14]
        # four groups of KV heads, gathered twice and returned once
        assert len(whole) == 12 or (causal and per_node == 1)
        for rules in ALL_RULES:
            play(ranks, rules)


def test_collectives_in_another_order_on_one_rank_are_caught() -> None:
    trace = record(Problem("all-gather", 4, 96, 8, 4, 16, False))
    ranks = launches(trace.forward, trace.backward)
    gathers = [at for at, operation in enumerate(ranks[1]) if operation.messages]
    other = next(at for at in gathers if ranks[1][at].messages[0].label != ranks[1][gathers[0]].messages[0].label)
    ranks[1] = swapped(ranks[1], gathers[0], other)
    for rules in ALL_RULES:
        with pytest.raises(MismatchError, match="message"):
            play(ranks, rules)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_no_loop_deadlocks_under_any_mask_and_in_chunks(backend: str, tally: Tally) -> None:
    with tally.some():
        assert_runs(backend, 3, CASES, tally)


def swapped(operations: list[Operation], one: int, other: int) -> list[Operation]:
    """The operations with these two in each other's place."""
    changed = {one: operations[other], other: operations[one]}
    return [changed.get(place, operation) for place, operation in enumerate(operations)]


@pytest.mark.parametrize("backend", ["zigzag", "all-gather", "double-ring", "distflash"])
def test_swapped_batches_of_one_rank_are_caught(backend: str) -> None:
    trace = next(traces(backend, 4, [CAUSAL]))
    ranks = launches(trace.forward, trace.backward)
    batches = [place for place, operation in enumerate(ranks[1]) if operation.group]
    one, other = next(pair for pair in combinations(batches, 2) if differ(*(ranks[1][place] for place in pair)))
    ranks[1] = swapped(ranks[1], one, other)
    for rules in ALL_RULES:
        with pytest.raises(MismatchError, match="message"):
            play(ranks, rules)


def differ(one: Operation, other: Operation) -> bool:
    """True if both batches use a connection of one communicator for other messages."""
    labels = [{message[:3]: message.label for message in batch.messages} for batch in (one, other)]
    return any(labels[0][connection] != labels[1][connection] for connection in labels[0].keys() & labels[1].keys())


def test_a_receive_before_the_send_that_it_answers_is_caught() -> None:
    """Two ranks that each receive in one batch and send in the next; in one batch the two messages cross."""
    there, back = Message("cp", 0, 1, "there"), Message("cp", 1, 0, "back")
    ranks = [[Operation("batch 0", (back,), group=(0, 1)), Operation("batch 1", (there,), group=(0, 1))]]
    ranks += [[Operation("batch 0", (there,), group=(0, 1)), Operation("batch 1", (back,), group=(0, 1))]]
    for rules in ALL_RULES:
        with pytest.raises(DeadlockError, match="rank 0 waits for the"):
            play(ranks, rules)
        play([[Operation("batch", (there, back), group=(0, 1))]] * 2, rules)


def test_a_rank_that_never_uses_a_group_keeps_the_others_waiting_for_its_communicator() -> None:
    batch = Operation("batch", (Message("cp", 0, 1, "there"),), group=(0, 1, 2))
    play([[batch], [batch], []], Rules(eager=True, one_queue=False))
    with pytest.raises(DeadlockError, match=r"the ranks of cp wait for \[2\], which never come to it"):
        play([[batch], [batch], []], Rules(eager=False, one_queue=False))
