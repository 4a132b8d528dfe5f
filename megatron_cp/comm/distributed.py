"""Ranks that are processes, through torch.distributed. The only file that calls a collective."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_cp import config
from megatron_cp.comm.fabric import (
    Done,
    Fabric,
    Message,
    SingleFabric,
    Transfer,
    check_counts,
    check_gathered,
    check_parts,
    size_in_bytes,
)
from megatron_cp.errors import CannotRun, Refused

# torch 2.14 renamed two collectives and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# fields of NCCL's configuration of a communicator; releases have some of them
COMMUNICATOR_SETTINGS = """
blocking cga_cluster_size min_ctas max_ctas net_name split_share traffic_class collnet_enable cta_policy nvls_ctas
""".split()


class GroupFabric:
    """The ranks of a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size, self.sent = dist.get_rank(group), dist.get_world_size(group), 0

    def __copy__(self) -> Self:
        """Return another fabric of the same process group, with a count of its own."""
        return type(self)(self.group)

    def __deepcopy__(self, _: object) -> Self:
        return type(self)(self.group)

    def __reduce__(self) -> NoReturn:
        raise Refused(
            f"a process group cannot be pickled, got a GroupFabric of {self.size} ranks; "
            "pickle the arguments, and make fabric and plan again where they are read"
        )

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Transfer:
        self.sent += sum(size_in_bytes(tensor) for tensor, _ in sends)
        operations = [self._operation(dist.isend, message) for message in sends]
        operations += [self._operation(dist.irecv, message) for message in recvs]
        return _Works(dist.batch_isend_irecv(operations), sends) if operations else Done()

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank, by torchrun's LOCAL_WORLD_SIZE; one node where nothing has set it."""
        per_node = int(config.variable("LOCAL_WORLD_SIZE") or dist.get_world_size())
        return tuple(rank // per_node for rank in dist.get_process_group_ranks(self.group))

    def all_gather(self, local: Tensor) -> Tensor:
        gathered = local.new_empty((self.size, *local.shape))
        self.start_all_gather(gathered, local.contiguous()).wait()
        return gathered

    def start_all_gather(self, gathered: Tensor, local: Tensor) -> Transfer:
        check_gathered(self, gathered, local)
        self.sent += (self.size - 1) * size_in_bytes(local)
        # gloo wants the flat concatenated shape
        work = _all_gather(gathered.flatten(0, 1), local, group=self.group, async_op=True)
        return _Works([work], [(local, self.rank)])

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        check_parts(self, whole)
        part = whole.new_empty(whole.shape[1:])
        self.start_reduce_scatter(part, whole.contiguous()).wait()
        return part

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Transfer:
        check_gathered(self, whole, part)
        self.sent += (self.size - 1) * size_in_bytes(part)
        # flat, because gloo wants one dim of p equal parts
        work = _reduce_scatter(part.view(-1), whole.view(-1), group=self.group, async_op=True)
        return _Works([work], [(whole, self.rank)])

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        check_counts(self, rows, sends, recvs)
        self.sent += size_in_bytes(rows) - size_in_bytes(rows[: sends[self.rank]])
        arrived = rows.new_empty((sum(recvs), *rows.shape[1:]))
        dist.all_to_all_single(arrived, rows.contiguous(), list(recvs), list(sends), group=self.group)
        return arrived

    def start_all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> tuple[Tensor, Transfer]:
        check_counts(self, rows, sends, recvs)
        self.sent += size_in_bytes(rows) - size_in_bytes(rows[: sends[self.rank]])
        arrived, rows = rows.new_empty((sum(recvs), *rows.shape[1:])), rows.contiguous()
        work = dist.all_to_all_single(arrived, rows, list(recvs), list(sends), group=self.group, async_op=True)
        return arrived, _Works([work], [(rows, self.rank)])

    def subset(self, ranks: Sequence[int]) -> "GroupFabric":
        """Connect these ranks; every process of the run calls it together, each with ranks of its own group."""
        members = tuple(dist.get_global_rank(self.group, rank) for rank in ranks)
        # all processes make all groups: a name that only its members make depends on how many others each of them made
        made = {
            others: _another(self.group, others, f"{self.group.group_desc}_SUBSET")
            for others in _groups_of_all(members)
        }
        group = made[members]
        assert isinstance(group, dist.ProcessGroup)
        return GroupFabric(group)

    def _operation(self, kind: Callable, message: Message) -> dist.P2POp:
        tensor, peer = message
        return dist.P2POp(kind, tensor, group=self.group, group_peer=peer)


def fabric_of(ranks: object, name: str = "cp") -> Fabric:
    """Return the fabric of a process group, of a DeviceMesh of one dim, or of a fabric; communicates nothing.

    None is a single rank in a process alone. `name` is the argument's, for the error. Raises ValueError for anything
    else, and for None in a job of several processes, where each would attend to its own tokens.
    """
    if isinstance(ranks, Fabric):
        return ranks
    if isinstance(ranks, DeviceMesh):
        if ranks.ndim != 1:
            raise Refused(f"{name} must be a mesh of one dim, got {ranks.ndim}; take one of its dims: mesh['{name}']")
        return GroupFabric(ranks.get_group())
    if isinstance(ranks, dist.ProcessGroup):
        return GroupFabric(ranks)
    if ranks is not None:
        raise Refused(
            f"{name} must be a process group, a DeviceMesh or a fabric, got a {type(ranks).__name__}; "
            "all ranks together are torch.distributed.group.WORLD"
        )
    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        raise Refused(
            f"{name} is left out in a job of {size} processes, where each would attend to its own tokens alone; "
            "give the group that shares a sequence, such as torch.distributed.group.WORLD, or SingleFabric()"
        )
    return SingleFabric()


class Wire:
    """Point-to-point messages over a separate communicator, in order between two ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        return _Works([dist.isend(tensor, group=self._group, group_dst=peer)], [(tensor, peer)])

    def receive(self, buffer: Tensor, peer: int) -> Transfer:
        return _Works([dist.irecv(buffer, group=self._group, group_src=peer)], [])


class Collectives:
    """Collectives over a separate communicator, in the order in which all of its ranks start them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank, self._size, self._group = dist.get_rank(group), dist.get_world_size(group), group

    def broadcast(self, tensor: Tensor, source: int) -> Transfer:
        work = dist.broadcast(tensor, group=self._group, group_src=source, async_op=True)
        return _Works([work], [(tensor, source)])

    def gather(self, tensor: Tensor) -> tuple[Transfer, list[Tensor]]:
        """Return the tensors of all ranks, once the transfer is over."""
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        work = dist.all_gather(parts, tensor, group=self._group, async_op=True)
        return _Works([work], [(tensor, self._rank)]), parts

    def gather_on(self, tensor: Tensor, target: int) -> tuple[Transfer, list[Tensor]]:
        """Return the tensors of all ranks on `target`, once the transfer is over, and none elsewhere."""
        parts = [torch.empty_like(tensor) for _ in range(self._size)] if self._rank == target else []
        work = dist.gather(tensor, parts or None, group=self._group, group_dst=target, async_op=True)
        return _Works([work], [(tensor, target)]), parts

    def sum_on(self, tensor: Tensor, target: int) -> Transfer:
        """Add up the tensors of all ranks in that of `target`; those of the others are lost."""
        work = dist.reduce(tensor, group=self._group, group_dst=target, async_op=True)
        return _Works([work], [(tensor, target)])


def wires(group: dist.ProcessGroup, count: int, timeout: timedelta | None = None) -> list[Wire]:
    """Return communicators of the group's ranks for messages; every process of the run calls it, as for `others`."""
    return [Wire(new) for new in others(group, count, "MESSAGES", timeout)]


def collectives(group: dist.ProcessGroup, count: int, timeout: timedelta | None = None) -> list[Collectives]:
    """Return communicators of the group's ranks for collectives; every process of the run calls it, as for `others`."""
    return [Collectives(new) for new in others(group, count, "COLLECTIVES", timeout)]


def others(
    group: dist.ProcessGroup, count: int, name: str, timeout: timedelta | None = None
) -> list[dist.ProcessGroup]:
    """`count` communicators of the group's ranks, numbered as in it, with its options of NCCL and its name in theirs.

    Every process of the run calls this together, each with its own group: only then do all agree on the names of the
    new groups, whatever other groups some of them belong to.
    """
    members = tuple(dist.get_process_group_ranks(group))
    assert list(members) == sorted(members), f"a new group would number the ranks {members} differently"
    made = {
        ranks: [_another(group, ranks, f"{group.group_desc}_{name}_{number}", timeout) for number in range(count)]
        for ranks in _groups_of_all(members)
    }
    return [new for new in made[members] if isinstance(new, dist.ProcessGroup)]


def _another(
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    name: str,
    timeout: timedelta | None = None,
    numbered: bool = True,
) -> object:
    """Make a group of these ranks as `group` was made: with options of its own that say what its options say.

    numbered: ranks are numbered upwards, as every torch does; False keeps their order
    """
    backend = dist.get_backend(group)
    options = options_like(group._get_backend(torch.device("cuda")).options) if backend == dist.Backend.NCCL else None
    # torch before 2.12 does not know the argument
    order: dict[str, Any] = {} if numbered else {"sort_ranks": False}
    return dist.new_group(list(ranks), timeout, backend, pg_options=options, group_desc=name, **order)


def options_like(options: Any) -> Any:
    """Return new options of a NCCL group with the priority of its stream and the settings of its communicator.

    torch writes the ranks and the name of a group into its options, so that two groups cannot share theirs.
    """
    made = dist.ProcessGroupNCCL.Options(is_high_priority_stream=options.is_high_priority_stream)
    for name in COMMUNICATOR_SETTINGS:
        # a name that was not given is None, which cannot be written
        if (value := getattr(options.config, name, None)) is not None:
            setattr(made.config, name, value)
    return made


def backwards(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Number the group's ranks from the other end; every process of the run calls this together, as for `wires`.

    Raises RuntimeError where torch numbers the ranks of every group upwards.
    """
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise CannotRun(f"a group that counts its ranks downwards needs torch 2.12 or later, got {torch.__version__}")
    members = tuple(dist.get_process_group_ranks(group))
    name = f"{group.group_desc}_BACKWARDS"
    made = {ranks: _another(group, ranks[::-1], name, numbered=False) for ranks in _groups_of_all(members)}
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
    """List the ranks of every group that some process of the run has named; all processes get the same list."""
    world = dist.distributed_c10d._world
    found = objects_of_all((members, world.group_count))
    # torch names a group after the number that its process has made, and two groups of one name take each other's
    # addresses from the store: all processes go on from the same number
    world.group_count = max(count for _, count in found)
    return sorted({ranks for ranks, _ in found})


def objects_of_all[Object](mine: Object) -> list[Object]:
    """Return what each process of the run passes, in the order of ranks; all call it together, and the hosts wait."""
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


@contextmanager
def connected(rank: int, size: int, port: int, device: torch.device) -> Iterator[GroupFabric]:
    """Connect `size` processes of this machine, NCCL on CUDA and gloo elsewhere; all leave together.

    port: of the store that the process that started them keeps
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    yield GroupFabric(dist.group.WORLD)
    leave_together()


def leave_together() -> None:
    """Wait for all processes of the run and end its groups."""
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


def collective(group: dist.ProcessGroup, kind: str, whole: Tensor) -> None:
    """Run a "gather", "scatter" or "reduce" of `whole`, flat, to time it; the content of `whole` is lost."""
    part = whole[: whole.shape[0] // group.size()].clone()
    if kind == "gather":
        _all_gather(whole, part, group=group)
    elif kind == "scatter":
        _reduce_scatter(part, whole, group=group)
    else:
        dist.all_reduce(whole, group=group)
