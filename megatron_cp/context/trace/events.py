"""Events of one recorded run of a backend: kernel calls, messages and live memory of every rank.

The records are pure Python, so that they are matched, simulated and drawn without torch; `record` makes them.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.documents import Documents
from megatron_cp.context.layouts import ZIGZAG, Layout, layout
from megatron_cp.context.masks import CAUSAL, FULL, AnyMask, Mask, mask
from megatron_cp.grid import Grid


@dataclass(frozen=True)
class Problem:
    """One attention on `ranks` ranks.

    window: (left, right) keys that a query sees beside its own position; None is no limit
    grid:   the two axes of the ranks, for backends that need them
    layout: which positions the ranks' tokens have outside attention
    chunks: pieces over time, what waits lies in host memory; None for a whole run
    stripe: tokens in a block of layout "striped"
    device: "cuda" or "cpu": how partial results are merged, and how many wait for it
    windows: the kernel takes windows, so that a band along the diagonal is one call
    documents: those of a packed sequence
    document_layout: for these, the positions that the loop works on
    cut: the ranks' tokens have these positions already; else they move there and back inside attention
    ranks_per_node: ranks of a node; None for all of them on one
    latent: compressed and rotary numbers of a token, where they travel in place of keys and values
    """

    backend: str
    ranks: int
    seq: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    dtype: str = "bfloat16"
    grid: Grid | None = None
    placement: str = "head-first"
    layout: str = ZIGZAG
    chunks: int | None = None
    stripe: int = 1
    device: str = "cpu"
    windows: bool = False
    documents: Documents | None = None
    document_layout: str = STREAM
    cut: bool = False
    ranks_per_node: int | None = None
    latent: tuple[int, int] | None = None

    @property
    def mask(self) -> AnyMask:
        return self.band if self.packed is None else self.packed.mask(self.band)

    @property
    def band(self) -> Mask:
        return mask(self.causal, self.window)

    @cached_property
    def packed(self) -> Documents | None:
        """The documents, with the layout that the batch is cut by."""
        if self.documents is None or not self.cut:
            return self.documents
        return self.documents.cut_by(self.documents.planned(self.document_layout, self.ranks, self.band))

    @property
    def held(self) -> Layout:
        """Positions of each rank's tokens outside attention; raises ValueError where they cannot have these."""
        if self.packed is not None and self.packed.layout is not None:
            return self.packed.layout
        return layout(self.layout, self.seq, self.ranks, self.stripe)


class Compute(NamedTuple):
    """One kernel call.

    window: mask of the tile if it is neither full nor causal; its last query has its last key's position
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    backward: bool
    window: Mask | None = None

    @property
    def mask(self) -> Mask:
        """Mask of the tile."""
        return self.window or (CAUSAL if self.causal else FULL)

    @property
    def work(self) -> int:
        """Unmasked query-key pairs times query heads."""
        return self.mask.pairs(self.queries, self.keys) * self.heads


class Matmul(NamedTuple):
    """A matrix product of a loop that computes without a kernel."""

    flops: int
    backward: bool


class Touch(NamedTuple):
    """Everything between two other events: copies, merges, sums.

    size:    bytes of device memory read and written
    kernels: number of kernels that do so
    """

    size: int
    kernels: int = 0


class Message(NamedTuple):
    """Bytes to or from a rank, numbered in the whole context-parallel group.

    form: dtype and shape of the tensor's rows, in words; with the size it says its whole shape
    """

    peer: int
    size: int
    form: str = ""


class Post(NamedTuple):
    """A batch of messages, handed to the fabric of the ranks in `group`.

    collective: "gather" or "scatter" for the messages of a collective, which all ranks of the group start together
    """

    batch: int
    group: tuple[int, ...]
    sends: tuple[Message, ...]
    recvs: tuple[Message, ...]
    collective: str = ""


class Wait(NamedTuple):
    """The rank goes on when everything in the batch was sent and received."""

    batch: int


class HostCopy(NamedTuple):
    """Bytes that start on their way to or from the host store, beside what the rank computes."""

    size: int


Event = Compute | Matmul | Touch | HostCopy | Post | Wait


class Step(NamedTuple):
    """An event, and the most live bytes beyond the local q, k, v and dout since the event before it."""

    event: Event
    live: int


@dataclass(frozen=True)
class Pass:
    """The forward or the backward pass: each rank's steps in its own order.

    rows: for a loop that computes without a kernel, the work of each rank's own queries, which it keeps
    """

    steps: tuple[tuple[Step, ...], ...]
    head_dim: int
    rows: tuple[int, ...] = ()

    @property
    def work(self) -> list[int]:
        """Unmasked query-key pairs times query heads, per rank."""
        return list(self.rows) or [sum(call.work for call in self.calls(rank)) for rank in range(len(self.steps))]

    @property
    def sent(self) -> list[int]:
        """Bytes, per rank."""
        return [sum(row) for row in self.traffic]

    @property
    def received(self) -> list[int]:
        """Bytes, per rank."""
        return [
            sum(message.size for post in self._posts(rank) for message in post.recvs) for rank in range(len(self.steps))
        ]

    @property
    def peak(self) -> list[int]:
        """Most live bytes beyond the local q, k, v and dout, per rank."""
        return [max((step.live for step in steps), default=0) for steps in self.steps]

    @property
    def hosted(self) -> list[int]:
        """Bytes to and from host memory, per rank."""
        return [sum(event.size for event, _ in steps if isinstance(event, HostCopy)) for steps in self.steps]

    @property
    def touched(self) -> list[Touch]:
        """Bytes read and written between kernel calls and messages, and the kernels that do so, per rank."""
        touches = [[event for event, _ in steps if isinstance(event, Touch)] for steps in self.steps]
        return [Touch(*(sum(column) for column in zip(*each, strict=True))) for each in touches]

    @property
    def traffic(self) -> list[list[int]]:
        """Bytes that the rank of the row sends to the rank of the column."""
        matrix = [[0] * len(self.steps) for _ in self.steps]
        for rank, row in enumerate(matrix):
            for message in (message for post in self._posts(rank) for message in post.sends):
                row[message.peer] += message.size
        return matrix

    def sent_between(self, ranks_per_node: int) -> list[int]:
        """Bytes to ranks of other nodes, per rank."""
        return [
            sum(size for peer, size in enumerate(row) if peer // ranks_per_node != rank // ranks_per_node)
            for rank, row in enumerate(self.traffic)
        ]

    def load(self) -> list[list[int]]:
        """Per rank, the work between one wait and the next."""
        loads = []
        for steps in self.steps:
            load = [0]
            for event, _ in steps:
                if isinstance(event, Wait):
                    load.append(0)
                elif isinstance(event, Compute):
                    load[-1] += event.work
            loads.append(load)
        return loads

    def calls(self, rank: int) -> Iterator[Compute]:
        """Yield the rank's kernel calls."""
        return (event for event, _ in self.steps[rank] if isinstance(event, Compute))

    def _posts(self, rank: int) -> Iterator[Post]:
        return (event for event, _ in self.steps[rank] if isinstance(event, Post))


@dataclass(frozen=True)
class Trace:
    """One backend at one problem.

    relayout: bytes that each rank sends in both passes to bring tokens to the positions that the loop wants, and back;
              they are part of the passes' traffic
    """

    problem: Problem
    forward: Pass
    backward: Pass
    relayout: list[int]


class UnmatchedError(RuntimeError):
    """A message without its send or receive, of another form than expected, or ranks that wait in a circle."""


def match(run: Pass) -> None:
    """Check every send against its receive and every wait against what the others post before it.

    Raises UnmatchedError. A batch is over when both sides of all its messages are posted, as in NCCL; a send
    without a receive would also leave gloo waiting.
    """
    _match_messages(run)
    _match_waits(run)


Channel = tuple[tuple[int, ...], int, int]


def _match_messages(run: Pass) -> None:
    sent, due = _messages(run)
    for channel in sorted({*sent, *due}):
        _, src, dst = channel
        here, there = sent[channel], due[channel]
        for number, (message, expected) in enumerate(zip(here, there, strict=False)):
            where = f"message {number} from rank {src} to rank {dst}"
            if message.size != expected.size:
                raise UnmatchedError(f"{where} has {message.size} bytes, the receiver expects {expected.size}")
            if message.form != expected.form:
                raise UnmatchedError(f"{where} has {message.form}, the receiver expects {expected.form}")
        if len(here) < len(there):
            raise UnmatchedError(
                f"rank {dst} waits for {len(there)} messages of rank {src}, who sends {len(here) or 'nothing'}"
            )
        if len(here) > len(there):
            raise UnmatchedError(f"rank {src} sends {len(here)} messages to rank {dst}, who takes {len(there)}")


def _messages(run: Pass) -> tuple[dict[Channel, list[Message]], dict[Channel, list[Message]]]:
    """List what is sent and what is expected, in order, per group, sender and receiver."""
    sent: dict[Channel, list[Message]] = defaultdict(list)
    due: dict[Channel, list[Message]] = defaultdict(list)
    for rank in range(len(run.steps)):
        for post in run._posts(rank):
            for message in post.sends:
                sent[post.group, rank, message.peer].append(message)
            for message in post.recvs:
                due[post.group, message.peer, rank].append(message)
    return sent, due


def _match_waits(run: Pass) -> None:
    """Let every rank run to its next wait as long as any rank gets further."""
    play = _Progress(run)
    awake = deque(range(len(run.steps)))
    while awake:
        awake += play.advance(awake.popleft())
    stuck = [rank for rank, event in enumerate(play.at) if event < len(run.steps[rank])]
    if stuck:
        raise UnmatchedError(f"ranks {', '.join(map(str, stuck))} wait for each other's messages without end")


class _Progress:
    """How far each rank has got, and which halves of messages are still missing in the batches it has posted."""

    def __init__(self, run: Pass) -> None:
        self._steps = run.steps
        self.at = [0] * len(run.steps)
        self._missing: dict[tuple[int, int], int] = defaultdict(int)
        self._halves: dict[tuple[Channel, str], deque[tuple[int, int]]] = defaultdict(deque)

    def advance(self, rank: int) -> list[int]:
        """Run the rank to a wait that is not yet fulfilled; return the ranks that may go on because of it."""
        woken: list[int] = []
        for event, _ in self._steps[rank][self.at[rank] :]:
            if isinstance(event, Wait) and self._missing[rank, event.batch]:
                break
            if isinstance(event, Post):
                woken += self._post(rank, event)
            self.at[rank] += 1
        return woken

    def _post(self, rank: int, post: Post) -> list[int]:
        mine = (rank, post.batch)
        sends = [((post.group, rank, message.peer), "send", "recv") for message in post.sends]
        recvs = [((post.group, message.peer, rank), "recv", "send") for message in post.recvs]
        woken = []
        for channel, half, other in (*sends, *recvs):
            if waiting := self._halves[channel, other]:
                theirs = waiting.popleft()
                self._missing[theirs] -= 1
                woken.append(theirs[0])
            else:
                self._missing[mine] += 1
                self._halves[channel, half].append(mine)
        return woken
