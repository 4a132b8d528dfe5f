"""The channels between the stages of a pipeline, and the communicators that carry them.

NCCL runs the messages of one communicator on one stream per rank, in the order in which they were started. A receive
that waits would hold up a send behind it, so no rank takes part in two channels of one communicator:

    loop, 4 ranks   communicator 0   F 0->1         F 2->3
                    communicator 1          F 1->2
                    communicator 2   B 1->0         B 3->2
                    communicator 3          B 2->1
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_cp.comm import Transfer
from megatron_cp.pipeline.action import FORWARD, FULL
from megatron_cp.pipeline.placement import Placement


class PeerToPeer(Protocol):
    """A communicator of the pipeline's ranks, numbered from its first stage's rank on."""

    def send(self, tensor: Tensor, peer: int) -> Transfer: ...

    def receive(self, buffer: Tensor, peer: int) -> Transfer: ...


class PipelineChannel(NamedTuple):
    """All activations (F) or gradients (B) that one rank sends to another; they arrive in the order sent."""

    kind: str
    source: int
    target: int


def communicators(placement: Placement) -> list[list[PipelineChannel]]:
    """Return the channels of stages on `placement`, one list for each communicator: an equal answer on all ranks."""
    hops = {(here, there) for here, there in pairwise(placement.rank_of) if here != there}
    channels = sorted(
        {PipelineChannel(FORWARD, *hop) for hop in hops} | {PipelineChannel(FULL, *hop[::-1]) for hop in hops}
    )
    found: list[list[PipelineChannel]] = []
    for channel in channels:
        free = next((others for others in found if not any(_share_a_rank(channel, other) for other in others)), None)
        if free is None:
            found.append([channel])
        else:
            free.append(channel)
    return found


def _share_a_rank(one: PipelineChannel, other: PipelineChannel) -> bool:
    return bool({one.source, one.target} & {other.source, other.target})


class Channels:
    """This rank's end of every channel; `peers` are in the order of `communicators(placement)`."""

    def __init__(self, placement: Placement, rank: int, peers: Sequence[PeerToPeer]) -> None:
        self._rank = rank
        self._peers = {
            channel: peer
            for channels, peer in zip(communicators(placement), peers, strict=True)
            for channel in channels
        }

    def meet(self, token: Tensor) -> None:
        """Send `token` once through every channel of this rank; all ranks of the pipeline call it together.

        NCCL connects two ranks at their first message, and the host waits for the other side there. A step may come to
        its channels in any order, so the ranks meet beforehand in the order of `communicators`, in which every rank has
        at most one channel at a time and none waits for a third.
        """
        for kind, source, target in self._peers:
            if self._rank == source:
                self.send(target, kind, token).wait()
            elif self._rank == target:
                self.receive(source, kind, token.clone()).wait()

    def send(self, target: int, kind: str, tensor: Tensor) -> Transfer:
        return self._peers[PipelineChannel(kind, self._rank, target)].send(tensor, target)

    def receive(self, source: int, kind: str, buffer: Tensor) -> Transfer:
        return self._peers[PipelineChannel(kind, source, self._rank)].receive(buffer, source)
