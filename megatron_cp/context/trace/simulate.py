"""When everything that a trace notes happens on a cluster: an event simulation of kernels, copies and messages.

A rank does one thing after the other; messages travel beside it. A message starts when both sides have posted it, and
the messages that pass a port at the same time share it evenly. Each level of links has its own ports, in and out.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from megatron_cp.context.trace.events import Compute, Event, HostCopy, Matmul, Pass, Post, Touch, Wait
from megatron_cp.hardware.cluster import Cluster, Link


class Span(NamedTuple):
    """An activity of a rank from `start` to `end`: "attend", "copy", "transfer" (its own part in one) or "wait"."""

    kind: str
    start: float
    end: float
    work: int = 0


class Flight(NamedTuple):
    """A message under way."""

    src: int
    dst: int
    size: int
    inside: bool
    start: float
    end: float


class Memory(NamedTuple):
    """Most live bytes of a rank in the time up to `end`."""

    end: float
    live: int


@dataclass(frozen=True)
class SimulatedPass:
    """A pass on a cluster, in seconds from its start.

    ideal: the kernels alone, spread evenly over the ranks
    """

    spans: list[list[Span]]
    flights: list[Flight]
    memory: list[list[Memory]]
    ideal: float

    @property
    def time(self) -> float:
        """Until the last rank is done."""
        return max(spans[-1].end if spans else 0.0 for spans in self.spans)

    def busy(self, rank: int) -> float:
        """Seconds in which the rank does not wait."""
        return sum(span.end - span.start for span in self.spans[rank] if span.kind != "wait")


Seconds = Callable[[Compute], float]


def call_seconds(cluster: Cluster) -> Seconds:
    """Return the time of a kernel call by the cluster's rates."""
    return lambda call: cluster.call_s + flops(call, cluster.block_keys) / _rate(cluster, call.backward)


def simulate(run: Pass, cluster: Cluster, seconds: Seconds | None = None) -> SimulatedPass:
    """Play the pass on the cluster, with kernel times from `seconds` (measured ones) or from the cluster's rates.

    The records must have been matched. Raises ValueError when there are more ranks than the cluster joins.
    """
    play = _PassSimulation(run, cluster, seconds or call_seconds(cluster))
    play.run()
    return SimulatedPass(play.spans, sorted(play.flights, key=lambda f: f.start), play.memory, play.ideal)


def flops(call: Compute, block_keys: int = 0) -> float:
    """Two matrix products forward, five backward, of 2 d operations per pair (Dao 2023, arXiv:2307.08691, 4.1).

    Where the mask ends a query's keys, its last block of them is computed whole: half of it is masked in the mean.
    """
    ends = sum(limit is not None for limit in call.mask)
    masked = ends * call.heads * call.queries * min(block_keys, call.queries) / 2
    return (10 if call.backward else 4) * call.head_dim * (call.work + masked)


def _rate(cluster: Cluster, backward: bool) -> float:
    return cluster.flops_backward if backward else cluster.flops_forward


Port = tuple


@dataclass(eq=False)
class _Flow:
    src: int
    dst: int
    size: int
    link: Link
    inside: bool
    ports: tuple[Port, Port]
    batches: tuple[tuple[int, int], tuple[int, int]]
    left: float = 0.0
    rate: float = 0.0
    start: float = 0.0
    since: float = 0.0
    version: int = 0


@dataclass
class _Half:
    """Messages that one side has posted and the other has not: when, and in which batch."""

    sends: deque = field(default_factory=deque)
    recvs: deque = field(default_factory=deque)


class _PassSimulation:
    def __init__(self, run: Pass, cluster: Cluster, seconds: Seconds) -> None:
        self._run, self._cluster, self._seconds = run, cluster, seconds
        ranks = len(run.steps)
        self.spans: list[list[Span]] = [[] for _ in range(ranks)]
        self.memory: list[list[Memory]] = [[] for _ in range(ranks)]
        self.flights: list[Flight] = []
        self.ideal = _ideal(run, cluster, seconds)
        self._at, self._clock, self._host = [0] * ranks, [0.0] * ranks, [0.0] * ranks
        self._open: dict[tuple[int, int], int] = defaultdict(int)
        self._waiting: dict[tuple[int, int], int] = {}
        self._halves: dict[tuple, _Half] = defaultdict(_Half)
        self._through: dict[Port, dict[_Flow, None]] = defaultdict(dict)
        self._agenda: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._order = count()

    def run(self) -> None:
        for rank in range(len(self._run.steps)):
            self._plan(0.0, self._advance, rank)
        while self._agenda:
            now, _, act, args = heappop(self._agenda)
            act(now, *args)
        assert all(at == len(steps) for at, steps in zip(self._at, self._run.steps, strict=True)), "unmatched records"

    def _plan(self, when: float, act: Callable[..., None], *args: object) -> None:
        heappush(self._agenda, (when, next(self._order), act, args))

    def _advance(self, now: float, rank: int) -> None:
        """Let the rank do what it can: up to a wait, or up to a batch to post at a later time."""
        steps = self._run.steps[rank]
        self._clock[rank] = max(self._clock[rank], now)
        while self._at[rank] < len(steps):
            event, live = steps[self._at[rank]]
            if isinstance(event, Post) and self._clock[rank] > now:
                # messages of others that start before it must be seen first
                self._plan(self._clock[rank], self._advance, rank)
                return
            if isinstance(event, Wait) and self._open[rank, event.batch]:
                self._waiting[rank, event.batch] = rank
                return
            self._do(rank, event)
            self.memory[rank].append(Memory(self._clock[rank], live))
            self._at[rank] += 1
        self._spend(rank, "wait", self._host[rank] - self._clock[rank])

    def _do(self, rank: int, event: Event) -> None:
        if isinstance(event, Compute):
            self._spend(rank, "attend", self._seconds(event), event.work)
        elif isinstance(event, Matmul):
            self._spend(rank, "attend", self._cluster.call_s + event.flops / _rate(self._cluster, event.backward))
        elif isinstance(event, Touch):
            self._spend(rank, "copy", event.size / self._cluster.touch_bytes_per_s)
        elif isinstance(event, HostCopy):
            self._copy(rank, event)
        elif isinstance(event, Post):
            self._post(rank, event)

    def _spend(self, rank: int, kind: str, seconds: float, work: int = 0) -> None:
        if seconds > 0:
            start = self._clock[rank]
            self._clock[rank] = start + seconds
            self.spans[rank].append(Span(kind, start, start + seconds, work))

    def _copy(self, rank: int, event: HostCopy) -> None:
        """Beside the computation where the host's memory is another one; the pass ends no sooner than its copies."""
        if self._cluster.host_bytes_per_s is None:
            self._spend(rank, "copy", 2 * event.size / self._cluster.touch_bytes_per_s)
        else:
            start = max(self._clock[rank], self._host[rank])
            self._host[rank] = start + event.size / self._cluster.host_bytes_per_s

    def _post(self, rank: int, post: Post) -> None:
        now, mine = self._clock[rank], (rank, post.batch)
        self._open[mine] += len(post.sends) + len(post.recvs)
        for message in post.sends:
            half = self._halves[post.group, rank, message.peer]
            half.sends.append((mine, message.size))
            self._pair(half, now)
        for message in post.recvs:
            half = self._halves[post.group, message.peer, rank]
            half.recvs.append(mine)
            self._pair(half, now)
        busy = sum(
            message.size * self._cluster.link(rank, message.peer).busy_s_per_byte
            for message in (*post.sends, *post.recvs)
        )
        busy += sum(self._cluster.link(rank, message.peer).busy_s_per_message for message in post.sends)
        self._spend(rank, "transfer", busy)

    def _pair(self, half: _Half, now: float) -> None:
        if half.sends and half.recvs:
            (sender, size), receiver = half.sends.popleft(), half.recvs.popleft()
            src, dst = sender[0], receiver[0]
            link = self._cluster.link(src, dst)
            inside = link is self._cluster.inside
            flow = _Flow(src, dst, size, link, inside, _ports(link, inside, src, dst), (sender, receiver), float(size))
            self._plan(now + link.latency_s, self._start, flow)

    def _start(self, now: float, flow: _Flow) -> None:
        flow.start = flow.since = now
        for port in flow.ports:
            self._through[port][flow] = None
        self._share(now, flow.ports)

    def _end(self, now: float, flow: _Flow, version: int) -> None:
        if version != flow.version:
            return
        for port in flow.ports:
            del self._through[port][flow]
        self.flights.append(Flight(flow.src, flow.dst, flow.size, flow.inside, flow.start, now))
        self._share(now, flow.ports)
        for batch in flow.batches:
            self._open[batch] -= 1
            if not self._open[batch] and batch in self._waiting:
                rank = self._waiting.pop(batch)
                self._spend(rank, "wait", now - self._clock[rank])
                self._plan(now, self._advance, rank)

    def _share(self, now: float, ports: tuple[Port, Port]) -> None:
        """Give every message through these ports its new rate."""
        for flow in {flow: None for port in ports for flow in self._through[port]}:
            rate = flow.link.bytes_per_s / max(len(self._through[port]) for port in flow.ports)
            if rate != flow.rate:
                flow.left -= (now - flow.since) * flow.rate
                flow.rate, flow.since, flow.version = rate, now, flow.version + 1
                self._plan(now + max(0.0, flow.left) / rate, self._end, flow, flow.version)


def _ports(link: Link, inside: bool, src: int, dst: int) -> tuple[Port, Port]:
    """Return the port that a message leaves through and the one that it arrives at."""
    if link.ports == "shared":
        return ("out", src, inside), ("in", dst, inside)
    return ("out", src, inside, dst), ("in", dst, inside, src)


def _ideal(run: Pass, cluster: Cluster, seconds: Seconds) -> float:
    ranks = len(run.steps)
    return (sum(seconds(call) for rank in range(ranks) for call in run.calls(rank)) + _plain(run, cluster)) / ranks


def _plain(run: Pass, cluster: Cluster) -> float:
    """Return the time of the unmasked part of what is computed without a kernel."""
    return sum((flops / _rate(cluster, backward) for flops, backward in _plain_flops(run)), 0.0)


def _plain_flops(run: Pass) -> Iterator[tuple[float, bool]]:
    for rank, steps in enumerate(run.steps):
        plain = [event for event, _ in steps if isinstance(event, Matmul)]
        if plain and run.rows:
            call = plain[0]
            yield (10 if call.backward else 4) * run.head_dim * run.rows[rank], call.backward
