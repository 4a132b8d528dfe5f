"""Messages over gloo whose first one between two ranks of a communicator waits for the other side, as NCCL's does."""

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from megatron_cp.comm import Transfer, Wire


class MeetingWire(Wire):
    """A communicator that connects two ranks at their first message: there the host waits for the peer's first one.

    met: peers that this rank has met
    """

    def __init__(self, group: dist.ProcessGroup, patience: timedelta) -> None:
        super().__init__(group)
        self.met: set[int] = set()
        self._name, self._patience = group.group_name, patience
        self._members = dist.get_process_group_ranks(group)

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        self._meet(peer)
        return super().send(tensor, peer)

    def receive(self, buffer: Tensor, peer: int) -> Transfer:
        self._meet(peer)
        return super().receive(buffer, peer)

    def _meet(self, peer: int) -> None:
        if peer in self.met:
            return
        store = dist.distributed_c10d._get_default_store()
        mine, theirs = self._members[self.rank], self._members[peer]
        store.set(f"{self._name}: {mine} comes to {theirs}", "")
        try:
            store.wait([f"{self._name}: {theirs} comes to {mine}"], self._patience)
        except dist.DistStoreError:
            raise TimeoutError(f"rank {mine} waits for rank {theirs} at its first message in {self._name}") from None
        self.met.add(peer)


def meeting_wires(old: Callable, made: list[MeetingWire], patience: timedelta) -> Callable:
    """Make of `wires` one whose communicators meet; `made` fills with them."""

    def wires(group: dist.ProcessGroup, count: int, timeout: timedelta | None = None) -> list[MeetingWire]:
        found = [MeetingWire(wire._group, patience) for wire in old(group, count, timeout)]
        made.extend(found)
        return found

    return wires
