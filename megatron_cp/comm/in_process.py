"""Ranks that are threads of this process, for laws and checks on one GPU.

As strict as a process group of GPUs: a message must fit its buffer in dtype, shape and kind of device, and every
message that is sent must be received.
"""

import copy
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm.fabric import (
    Handle,
    Message,
    MessageError,
    Transfer,
    all_gather_by_exchange,
    all_to_all_by_exchange,
    check_batch,
    check_gathered,
    check_pair,
    check_parts,
    size_in_bytes,
    start_all_to_all_by_exchange,
)

TIMEOUT_SECONDS = 60


class RankPair(NamedTuple):
    """One direction between two ranks of a group; the ranks of `group` are those of the whole process."""

    group: tuple[int, ...]
    src: int
    dst: int


class Numbered(NamedTuple):
    """The n-th message of a pair, counted by each side in the order of its own calls."""

    pair: RankPair
    number: int


class Mailbox:
    """Messages between the ranks of `in_process`; a rank that fails wakes those that wait for it.

    running: held by the one rank that runs, released while it waits for a message. Ranks that ran at the same time
             would pass the interpreter back and forth at every torch op.
    """

    def __init__(self) -> None:
        self.running = threading.Lock()
        self._arrival: defaultdict[RankPair, threading.Condition] = defaultdict(
            lambda: threading.Condition(self.running)
        )
        self.messages: dict[Numbered, Tensor] = {}
        self._sent: Counter[RankPair] = Counter()
        self._expected: Counter[RankPair] = Counter()
        self.failed: BaseException | None = None

    def put(self, pair: RankPair, tensor: Tensor) -> None:
        """Store a copy of the pair's next message."""
        self.messages[Numbered(pair, self._sent[pair])] = tensor.detach().clone()
        self._sent[pair] += 1
        self._arrival[pair].notify()

    def expect(self, pair: RankPair) -> Numbered:
        """Return the number of the next message that the pair's receiver takes."""
        self._expected[pair] += 1
        return Numbered(pair, self._expected[pair] - 1)

    def take(self, due: Numbered) -> Tensor:
        """Wait for a message and remove it."""
        arrived = self._arrival[due.pair].wait_for(lambda: due in self.messages or self.failed, timeout=TIMEOUT_SECONDS)
        if self.failed:
            raise RuntimeError(f"another rank failed: {self.failed}")
        if not arrived:
            raise MessageError(f"rank {due.pair.dst} waits for rank {due.pair.src}, which sends nothing")
        return self.messages.pop(due)

    def fail(self, error: BaseException) -> None:
        """Wake all ranks with the first error."""
        self.failed = self.failed or error
        for arrival in self._arrival.values():
            arrival.notify_all()


class LocalFabric:
    """One of the ranks of `in_process`."""

    def __init__(self, mailbox: Mailbox, members: tuple[int, ...], me: int, per_node: int | None = None) -> None:
        self._mailbox, self._members, self._per_node = mailbox, members, per_node
        self.rank, self.size, self.sent = members.index(me), len(members), 0

    def __deepcopy__(self, _: object) -> "LocalFabric":
        """Return another fabric of the same ranks, with its own count of bytes."""
        return copy.copy(self)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Transfer:
        check_batch(self, sends, recvs)
        for tensor, peer in sends:
            self.sent += size_in_bytes(tensor)
            self._mailbox.put(RankPair(self._members, self.rank, peer), tensor)
        due = [(buffer, self._mailbox.expect(RankPair(self._members, peer, self.rank))) for buffer, peer in recvs]
        return _Receives(self, self._mailbox, due)

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(member // self._per_node if self._per_node else 0 for member in self._members)

    def all_gather(self, local: Tensor) -> Tensor:
        return all_gather_by_exchange(self, local)

    def start_all_gather(self, gathered: Tensor, local: Tensor) -> Transfer:
        check_gathered(self, gathered, local)
        gathered[self.rank] = local
        others = self._others(local)
        return self.exchange([(local, peer) for peer in others], [(gathered[peer], peer) for peer in others])

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        check_parts(self, whole)
        part = whole.new_empty(whole.shape[1:])
        self.start_reduce_scatter(part, whole.contiguous()).wait()
        return part

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Transfer:
        check_gathered(self, whole, part)
        parts = torch.empty_like(whole)
        parts[self.rank] = whole[self.rank]
        others = self._others(part)
        arriving = self.exchange([(whole[peer], peer) for peer in others], [(parts[peer], peer) for peer in others])
        return _SumOfParts(arriving, parts, part)

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        return all_to_all_by_exchange(self, rows, sends, recvs)

    def start_all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> tuple[Tensor, Handle]:
        return start_all_to_all_by_exchange(self, rows, sends, recvs)

    def subset(self, ranks: Sequence[int]) -> "LocalFabric":
        members = tuple(self._members[rank] for rank in ranks)
        return LocalFabric(self._mailbox, members, self._members[self.rank], self._per_node)

    def _others(self, message: Tensor) -> list[int]:
        """Return the ranks that a message to all goes to; an empty one goes to none."""
        return [peer for peer in range(self.size) if peer != self.rank and message.numel()]


class _Receives:
    """The receives of one batch."""

    def __init__(self, fabric: LocalFabric, mailbox: Mailbox, due: list[tuple[Tensor, Numbered]]) -> None:
        self._fabric, self._mailbox, self._due = fabric, mailbox, due

    def wait(self) -> None:
        for buffer, message in self._due:
            tensor = self._mailbox.take(message)
            check_pair(self._fabric, message.pair.src, tensor, buffer)
            buffer.copy_(tensor)
        self._due = []

    def done(self) -> bool:
        return not self._due


class _SumOfParts:
    """A reduce-scatter: the parts that arrive, and the tensor that takes their sum."""

    def __init__(self, arriving: Transfer, parts: Tensor, total: Tensor) -> None:
        self._arriving, self._parts, self._total = arriving, parts, total

    def wait(self) -> None:
        self._arriving.wait()
        self._total.copy_(self._parts.sum(0, dtype=self._parts.dtype))

    def done(self) -> bool:
        return self._arriving.done()


def in_process[T](size: int, body: Callable[[LocalFabric], T], per_node: int | None = None) -> list[T]:
    """Run `body` on each of `size` ranks, threads of this process that run one at a time, and return its results.

    per_node: ranks that the fabric calls one node; None for all
    The first rank to raise wakes the others, and its error is raised here; MessageError if a message was never
    received. On CUDA the body must call a backend's forward and backward itself: autograd runs all backward calls of a
    device on one thread, where ranks that wait for each other would deadlock.
    """
    mailbox = Mailbox()

    def rank_body(rank: int) -> T:
        with mailbox.running:
            try:
                return body(LocalFabric(mailbox, tuple(range(size)), rank, per_node))
            except BaseException as error:
                mailbox.fail(error)
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_body, rank) for rank in range(size)]
    if mailbox.failed:
        raise mailbox.failed
    for pair, _ in mailbox.messages:
        raise MessageError(f"rank {pair.src} sent a message to rank {pair.dst}, which never received it")
    return [future.result() for future in futures]
