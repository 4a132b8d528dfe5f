"""A model of NCCL's rules for messages between two ranks, in pure Python: what would wait for what on a GPU cluster.

Every rank is a list of operations in the order in which its host launches them. The rules:

1. Operations of one stream run in launch order. A communicator has one stream on each of its ranks.
2. A message has no buffer: its send and its receive hold their streams until both have started.
3. A communication operation starts after the compute that was launched before it; compute waits for the operations it
   names (`wait` of torch puts an event on the compute stream, the host goes on).
   A host that reads a value waits for the end of an operation (`blocks`) before it launches the next one.
4. Several messages in one operation (`batch_isend_irecv`, a group of NCCL's) start together and end together. They
   use the communicator of the whole group in both modes; a single message without `device_id` uses one of its pair.
5. The first message of a connection stops the host until the other side's host has come to its own first message:
   without `device_id` torch makes a communicator for the pair there, with it NCCL connects sender and receiver there.
   The first batch of a group without `device_id` stops the host until all ranks of the group have come to theirs.
6. With CUDA_DEVICE_MAX_CONNECTIONS = 1 all streams of a process share one queue: what cannot start yet holds up
   everything that was launched after it.

All of these only say "not before", so a step is a graph of events: a cycle is a deadlock, and the longest path is the
time that the step takes.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, permutations
from typing import NamedTuple


class Message(NamedTuple):
    """One tensor between two ranks; `label` is equal on both sides."""

    communicator: Hashable
    source: int
    target: int
    label: Hashable


@dataclass(frozen=True)
class Operation:
    """One launch of a rank: compute where it has no messages.

    messages: all of one communicator
    after:    positions of earlier operations of this rank that it waits for
    seconds:  time of a compute operation
    group:    ranks of the communicator, of a batch of messages; empty for a single message
    blocks:   the host waits for its end, as where it reads a value of the device
    """

    name: str
    messages: tuple[Message, ...] = ()
    after: tuple[int, ...] = ()
    seconds: float = 0.0
    group: tuple[int, ...] = ()
    blocks: bool = False


class Rules(NamedTuple):
    """How the processes are started.

    eager:     `init_process_group` was given a device_id: a communicator has one stream for all of its pairs
    one_queue: CUDA_DEVICE_MAX_CONNECTIONS = 1
    """

    eager: bool
    one_queue: bool


ALL_RULES = [Rules(eager, one_queue) for eager in (False, True) for one_queue in (False, True)]

# of every operation, by the place in this list
EVENTS = ("launch", "start", "end")
START, END = 1, 2


class DeadlockError(Exception):
    """All ranks wait; the message names the first operation of each that never starts or ends."""


class MismatchError(Exception):
    """The n-th send of a connection is not the n-th receive."""


def play(ranks: Sequence[Sequence[Operation]], rules: Rules, hop: float = 0.0) -> float:
    """Return the time at which the last operation ends, a message taking `hop` once both of its sides have started.

    Raises DeadlockError, or MismatchError where the two sides of a connection disagree on the order of messages.
    """
    after, missing = _events(ranks, rules)
    took = [0.0] * len(after)
    for number, operation in enumerate(chain.from_iterable(ranks)):
        took[3 * number + END] = hop if operation.messages else operation.seconds
    times = [0.0] * len(after)
    ready = [event for event, count in enumerate(missing) if not count]
    while ready:
        event = ready.pop()
        times[event] = time = times[event] + took[event]
        for later in after[event]:
            if times[later] < time:
                times[later] = time
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    if any(missing):
        raise DeadlockError(_stuck(ranks, missing))
    return max(times)


class Tally:
    """Counts of plays and of deadlocks, by the number of ranks and the rules."""

    def __init__(self) -> None:
        self.plays: Counter[tuple[int, Rules]] = Counter()
        self.deadlocks: Counter[tuple[int, Rules]] = Counter()

    def play(self, ranks: Sequence[Sequence[Operation]]) -> None:
        """Play under all rules; raises as `play` does."""
        for rules in ALL_RULES:
            key = (len(ranks), rules)
            self.plays[key] += 1
            try:
                play(ranks, rules)
            except DeadlockError:
                self.deadlocks[key] += 1
                raise

    @contextmanager
    def some(self) -> Iterator[None]:
        """Check that something is played inside."""
        before = self.plays.total()
        yield
        assert self.plays.total() > before, "nothing was played"

    def lines(self) -> Iterator[str]:
        for (ranks, rules), plays in sorted(self.plays.items()):
            mode = f"{'with' if rules.eager else 'without'} device_id, {'one queue' if rules.one_queue else 'queues'}"
            yield f"p = {ranks}, {mode}: {plays} plays, {self.deadlocks[ranks, rules]} deadlocks"


def _first_events(ranks: Sequence[Sequence[Operation]]) -> list[int]:
    """The number of each rank's first event; its operations follow with three events each, as EVENTS has them."""
    return [3 * count for count in accumulate(map(len, ranks), initial=0)][:-1]


def _events(ranks: Sequence[Sequence[Operation]], rules: Rules) -> tuple[list[list[int]], list[int]]:
    """By the number of an event, the events that come after it, and how many it comes after."""
    other = _partners(ranks)
    met = _meetings(ranks, rules)
    base = _first_events(ranks)
    count = 3 * sum(map(len, ranks))
    after: list[list[int]] = [[] for _ in range(count)]
    missing = [0] * count

    def need(event: int, earlier: int) -> None:
        after[earlier].append(event)
        missing[event] += 1

    for rank, operations in enumerate(ranks):
        first = base[rank]
        compute: int | None = None
        last: dict[Hashable, int] = {}
        for place, operation in enumerate(operations):
            launch = first + 3 * place
            start, end = launch + START, launch + END
            if place:
                need(launch, launch - 3)
                if operations[place - 1].blocks:
                    need(launch, end - 3)
                if rules.one_queue:
                    need(start, start - 3)
            # the host of the other side has launched all that comes before its own first message
            for peer, at in met.get((rank, place), ()):
                if at:
                    need(launch, base[peer] + 3 * (at - 1))
            need(start, launch)
            for earlier in operation.after:
                need(start, first + 3 * earlier + END)
            if compute is not None:
                need(start, compute)
            if operation.messages:
                stream = _stream(operation, rules)
                if stream in last:
                    need(start, last[stream])
                last[stream] = end
            else:
                compute = end
            need(end, start)
            for peer, at in other.get((rank, place), ()):
                need(end, base[peer] + 3 * at + START)
    return after, missing


def _stream(operation: Operation, rules: Rules) -> Hashable:
    message = operation.messages[0]
    whole = rules.eager or operation.group
    return message.communicator, None if whole else frozenset((message.source, message.target))


def _partners(ranks: Sequence[Sequence[Operation]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The operations on other ranks with which each operation shares a message."""
    sides: dict[tuple[Hashable, int, int], tuple[list, list]] = defaultdict(lambda: ([], []))
    for rank, operations in enumerate(ranks):
        for place, operation in enumerate(operations):
            for communicator, source, target, label in operation.messages:
                sides[communicator, source, target][rank == target].append((label, (rank, place)))
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for connection, (sends, receives) in sides.items():
        for number, ((sent, sender), (meant, receiver)) in enumerate(zip(sends, receives, strict=False)):
            if sent != meant:
                raise MismatchError(f"message {number} of {connection}: sent {sent}, expected {meant}")
            found[sender].append(receiver)
            found[receiver].append(sender)
        if len(sends) != len(receives):
            raise MismatchError(f"{connection}: {len(sends)} sends, {len(receives)} receives")
    return found


def _meetings(ranks: Sequence[Sequence[Operation]], rules: Rules) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Operations that are a rank's first of a connection or a group, with those of the other ranks."""
    first: dict[tuple[Hashable, Collection[int]], dict[int, int]] = defaultdict(dict)
    for rank, operations in enumerate(ranks):
        for place, operation in enumerate(operations):
            for message in operation.messages:
                ends = (message.source, message.target)
                directed = rules.eager or operation.group
                first[message.communicator, ends if directed else frozenset(ends)].setdefault(rank, place)
            if operation.group and not rules.eager:
                first[operation.messages[0].communicator, operation.group].setdefault(rank, place)
    met: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for (communicator, members), sides in first.items():
        if absent := {*members} - sides.keys():
            raise DeadlockError(f"the ranks of {communicator} wait for {sorted(absent)}, which never come to it")
        for (rank, place), other in permutations(sides.items(), 2):
            met[rank, place].append(other)
    return met


def _stuck(ranks: Sequence[Sequence[Operation]], missing: Sequence[int]) -> str:
    """The first operation of each rank that waits, and how far it came."""
    lines = []
    for rank, (first, operations) in enumerate(zip(_first_events(ranks), ranks, strict=True)):
        for place, operation in enumerate(operations):
            event = first + 3 * place
            waits = next((kind for kind, count in zip(EVENTS, missing[event : event + 3], strict=True) if count), None)
            if waits:
                lines.append(f"rank {rank} waits for the {waits} of {operation.name}")
                break
    return "; ".join(lines)
