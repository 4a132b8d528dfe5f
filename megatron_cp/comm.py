"""How ranks talk. The only file that calls a collective.

A fabric connects the ranks of one group and counts the bytes this rank sends. `GroupFabric` talks through
torch.distributed, `SingleFabric` has nobody to talk to, and `in_process` runs every rank as a thread of this process,
which is what laws and one-GPU checks need.
"""

import inspect
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, Self, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cp.errors import CannotRun
from megatron_cp.grid import Grid

Message = tuple[Tensor, int]


@runtime_checkable
class Handle(Protocol):
    """A transfer in flight: the buffers handed to `exchange` may not be touched before `wait` returns."""

    def wait(self) -> None: ...


@runtime_checkable
class Transfer(Handle, Protocol):
    """A transfer that can be asked whether it is over; one that cannot tell says no."""

    def done(self) -> bool: ...


@runtime_checkable
class Peers(Protocol):
    """Numbered ranks that send to each other, as seen by one of them."""

    rank: int
    size: int

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        """Start one batch: send each tensor to its rank and fill each buffer from its rank, in order per pair of ranks.

        Tensors are contiguous and not empty; a message to oneself is not sent but copied by the caller.
        """
        ...


@runtime_checkable
class Fabric(Peers, Protocol):
    """The ranks of one group, as seen by one of them."""

    sent: int

    def all_gather(self, local: Tensor) -> Tensor:
        """The equally shaped `local` of all ranks, stacked in a new leading dim."""
        ...

    def subset(self, ranks: Sequence[int]) -> Self:
        """The fabric of these ranks, which include this one; every rank of the group calls it together."""
        ...


class Done:
    """A transfer that has nothing left to wait for."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


class SingleFabric:
    """A group of one rank."""

    def __init__(self) -> None:
        self.rank, self.size, self.sent = 0, 1, 0

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        assert not sends, "a single rank has nobody to send to"
        assert not recvs, "a single rank has nobody to receive from"
        return Done()

    def all_gather(self, local: Tensor) -> Tensor:
        return local[None]

    def subset(self, ranks: Sequence[int]) -> Self:
        return self


class GroupFabric:
    """The ranks of a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size, self.sent = dist.get_rank(group), dist.get_world_size(group), 0

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Transfer:
        self.sent += _bytes(sends)
        operations = [self._operation(dist.isend, message) for message in sends]
        operations += [self._operation(dist.irecv, message) for message in recvs]
        return _Works(dist.batch_isend_irecv(operations), sends) if operations else Done()

    def all_gather(self, local: Tensor) -> Tensor:
        self.sent += (self.size - 1) * local.numel() * local.element_size()
        # gloo wants the flat concatenated shape
        gathered = local.new_empty((self.size * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.unflatten(0, (self.size, local.shape[0]))

    def subset(self, ranks: Sequence[int]) -> "GroupFabric":
        members = [dist.get_global_rank(self.group, rank) for rank in ranks]
        group = dist.new_group(members, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return GroupFabric(group)

    def _operation(self, kind: Callable, message: Message) -> dist.P2POp:
        tensor, peer = message
        return dist.P2POp(kind, tensor, group=self.group, group_peer=peer)


class Members:
    """Some ranks of a fabric, numbered in the order given, over its connections: unlike `subset` it makes no group.

    Their transfers stand in the same queues as the whole fabric's.
    """

    def __init__(self, whole: Peers, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = whole, tuple(ranks)
        self.rank, self.size = self._ranks.index(whole.rank), len(self._ranks)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        sends, recvs = ([(tensor, self._ranks[peer]) for tensor, peer in batch] for batch in (sends, recvs))
        return self._whole.exchange(sends, recvs)


class Wire:
    """Point to point over a communicator of its own: between two ranks messages arrive in the order they were sent."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        return _Works([dist.isend(tensor, group=self._group, group_dst=peer)], [(tensor, peer)])

    def receive(self, buffer: Tensor, peer: int) -> Transfer:
        return _Works([dist.irecv(buffer, group=self._group, group_src=peer)], [])


def wires(group: dist.ProcessGroup, count: int, timeout: timedelta | None = None) -> list[Wire]:
    """`count` communicators of the group's ranks, numbered as in it.

    Every process of the run calls this together, each with its own group: only then do all agree on the names of the
    new groups, whatever other groups some of them belong to.
    """
    members = tuple(dist.get_process_group_ranks(group))
    assert list(members) == sorted(members), f"a new group would number the ranks {members} differently"
    made = {ranks: [dist.new_group(list(ranks), timeout) for _ in range(count)] for ranks in _groups_of_all(members)}
    return [Wire(new) for new in made[members] if isinstance(new, dist.ProcessGroup)]


def backwards(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group's ranks numbered from the other end; every process of the run calls this together, as for `wires`.

    Raises RuntimeError where torch numbers the ranks of every group upwards.
    """
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise CannotRun(f"a group that counts its ranks downwards needs torch 2.12 or later, got {torch.__version__}")
    members = tuple(dist.get_process_group_ranks(group))
    made = {ranks: dist.new_group(list(ranks[::-1]), sort_ranks=False) for ranks in _groups_of_all(members)}
    found = made[members]
    assert isinstance(found, dist.ProcessGroup)
    return found


def hand_over[T](group: dist.ProcessGroup, source: int, target: int, value: T) -> T:
    """`value` of rank `source` of the group, on rank `target`; other ranks keep their own. It travels as an object."""
    box = [value]
    if group.rank() == source:
        dist.send_object_list(box, group=group, group_dst=target)
    if group.rank() == target:
        dist.recv_object_list(box, group=group, group_src=source)
    return box[0]


def _groups_of_all(members: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The ranks of every group that some process of the run has named, the same list on all."""
    found: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, members)
    return sorted(set(found))


@contextmanager
def connected(rank: int, size: int, port: int, device: torch.device) -> Iterator[GroupFabric]:
    """The fabric of `size` processes of this machine, NCCL on CUDA and gloo elsewhere; all leave together."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    yield GroupFabric(dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


class _Works:
    """Requests of one batch; holds on to what is being sent."""

    def __init__(self, works: Sequence[dist.Work | None], sends: Sequence[Message]) -> None:
        # None is what a rank outside the group gets
        self._works, self._sends = [work for work in works if work], sends

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._sends = [], ()

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)


# group, sender, receiver
_Pair = tuple[tuple[int, ...], int, int]
_Letter = tuple[_Pair, int]


class _Post:
    """Letter boxes of ranks that are threads of one process; a rank that died wakes those who wait for it.

    The n-th letter that a rank expects from another is the n-th that this one sends it, whenever they are waited for.
    running: held by the one rank that runs; it lets go where it waits for a letter. Ranks that ran at the same time
             would hand the interpreter to and fro at every torch op.
    """

    def __init__(self) -> None:
        self.running = threading.Lock()
        self._arrival: defaultdict[_Pair, threading.Condition] = defaultdict(lambda: threading.Condition(self.running))
        self.boxes: dict[_Letter, Tensor] = {}
        self.posted: Counter[_Pair] = Counter()
        self.expected: Counter[_Pair] = Counter()
        self.failed: BaseException | None = None

    def put(self, pair: _Pair, tensor: Tensor) -> None:
        self.boxes[pair, self.posted[pair]] = tensor.detach().clone()
        self.posted[pair] += 1
        self._arrival[pair].notify()

    def expect(self, pair: _Pair) -> _Letter:
        self.expected[pair] += 1
        return pair, self.expected[pair] - 1

    def take(self, letter: _Letter) -> Tensor:
        pair, _ = letter
        _, sender, receiver = pair
        arrived = self._arrival[pair].wait_for(lambda: letter in self.boxes or self.failed, timeout=60)
        if self.failed:
            raise RuntimeError(f"another rank failed: {self.failed}")
        if not arrived:
            raise RuntimeError(f"rank {receiver} waits for rank {sender}, who sends nothing")
        return self.boxes.pop(letter)

    def fail(self, error: BaseException) -> None:
        self.failed = self.failed or error
        for arrival in self._arrival.values():
            arrival.notify_all()


class LocalFabric:
    """One of the ranks of `in_process`."""

    def __init__(self, post: _Post, members: tuple[int, ...], me: int) -> None:
        self._post, self._members = post, members
        self.rank, self.size, self.sent = members.index(me), len(members), 0

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Transfer:
        self.sent += _bytes(sends)
        for tensor, peer in sends:
            assert tensor.is_contiguous(), "process groups send contiguous tensors only"
            self._post.put((self._members, self.rank, peer), tensor)
        due = [(buffer, self._post.expect((self._members, peer, self.rank))) for buffer, peer in recvs]
        return _Letters(self._post, due)

    def all_gather(self, local: Tensor) -> Tensor:
        gathered = local.new_empty((self.size, *local.shape))
        gathered[self.rank] = local
        others = [peer for peer in range(self.size) if peer != self.rank]
        sends = [(local.contiguous(), peer) for peer in others]
        self.exchange(sends, [(gathered[peer], peer) for peer in others]).wait()
        return gathered

    def subset(self, ranks: Sequence[int]) -> "LocalFabric":
        return LocalFabric(self._post, tuple(self._members[rank] for rank in ranks), self._members[self.rank])


class _Letters:
    def __init__(self, post: _Post, due: list[tuple[Tensor, _Letter]]) -> None:
        self._post, self._due = post, due

    def wait(self) -> None:
        for buffer, letter in self._due:
            buffer.copy_(self._post.take(letter))
        self._due = []

    def done(self) -> bool:
        return not self._due


def in_process[T](size: int, body: Callable[[LocalFabric], T]) -> list[T]:
    """What `body` returned on each of `size` ranks, threads of this process that run one at a time.

    The first rank to raise wakes the others, and its error is raised here. On CUDA the body must call a backend's
    forward and backward itself: autograd runs all backward calls of a device on one thread, where ranks would wait for
    each other for ever.
    """
    post = _Post()

    def rank_body(rank: int) -> T:
        with post.running:
            try:
                return body(LocalFabric(post, tuple(range(size)), rank))
            except BaseException as error:
                post.fail(error)
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_body, rank) for rank in range(size)]
    if post.failed:
        raise post.failed
    return [future.result() for future in futures]


def axes_of(grid: Grid, fabric: Fabric) -> tuple[Fabric, Fabric]:
    """The inner and the outer axis of a grid over a fabric's ranks; all of them call it together."""
    return fabric.subset(grid.members("inner", fabric.rank)), fabric.subset(grid.members("outer", fabric.rank))


def largest(fabric: Fabric, device: torch.device, *values: float) -> list[float]:
    """The largest of each value over all ranks; all ranks have arrived when it returns."""
    gathered = fabric.all_gather(torch.tensor([0.0, *values], dtype=torch.float64, device=device))
    return gathered.max(dim=0).values.tolist()[1:]


def collective(group: dist.ProcessGroup, kind: str, whole: Tensor) -> None:
    """A "gather", "scatter" or "reduce" of all of `whole`, flat, whose content is lost: for the time that it takes."""
    part = whole[: whole.shape[0] // group.size()].clone()
    if kind == "gather":
        dist.all_gather_into_tensor(whole, part, group=group)
    elif kind == "scatter":
        dist.reduce_scatter_tensor(part, whole, group=group)
    else:
        dist.all_reduce(whole, group=group)


def values_of_all(fabric: Fabric, device: torch.device, values: Sequence[int]) -> list[tuple[int, ...]]:
    """Every rank's values, in order of rank; what this sends is not counted."""
    before = fabric.sent
    gathered = fabric.all_gather(torch.tensor([list(values)], dtype=torch.int64, device=device))
    fabric.sent = before
    return [tuple(row) for row in gathered.flatten(0, 1).tolist()]


def _bytes(messages: Sequence[Message]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor, _ in messages)
