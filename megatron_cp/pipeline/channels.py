"""The channels between the stages of a pipeline, and the communicators that carry them.

NCCL runs the messages of one communicator on one stream per rank, in the order in which they were started. A receive
that waits would hold up a send behind it, so no rank takes part in two channels of one communicator:

    loop, 4 ranks   communicator 0   F 0->1         F 2->3
                    communicator 1          F 1->2
                    communicator 2   B 1->0         B 3->2
                    communicator 3          B 2->1

Activations that a rank lends to its peer have channels of their own: EVICT on the way there and LOAD on the way back.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_cp.comm import Transfer
from megatron_cp.pipeline.action import EVICT, FORWARD, FULL, HOLD, LOAD, Action
from megatron_cp.pipeline.placement import Placement


class PeerToPeer(Protocol):
    """A communicator of the pipeline's ranks, numbered from its first stage's rank on."""

    def send(self, tensor: Tensor, peer: int) -> Transfer: ...

    def receive(self, buffer: Tensor, peer: int) -> Transfer: ...


class PipelineChannel(NamedTuple):
    """All activations (F), gradients (B), or lent chunks that one rank sends to another; they arrive in the order sent.

    Lent chunks leave for the peer on EVICT and come back on LOAD.
    """

    kind: str
    source: int
    target: int


def communicators(placement: Placement, lends: bool = False) -> list[list[PipelineChannel]]:
    """Return the channels of stages on `placement`, one list for each communicator: an equal answer on all ranks.

    lends: True if activations move between rank r and its peer p - 1 - r too
    """
    hops = {(here, there) for here, there in pairwise(placement.rank_of) if here != there}
    channels = sorted(
        {PipelineChannel(FORWARD, *hop) for hop in hops} | {PipelineChannel(FULL, *hop[::-1]) for hop in hops}
    )
    if lends:
        pairs = [
            (rank, placement.ranks - 1 - rank) for rank in range(placement.ranks) if 2 * rank != placement.ranks - 1
        ]
        channels += [PipelineChannel(EVICT, *pair) for pair in pairs]
        channels += [PipelineChannel(LOAD, *pair) for pair in pairs]
    found: list[list[PipelineChannel]] = []
    for channel in channels:
        free = next((others for others in found if not any(_share_a_rank(channel, other) for other in others)), None)
        if free is None:
            found.append([channel])
        else:
            free.append(channel)
    return found


def lending_channel(placement: Placement, action: Action) -> PipelineChannel:
    """Return the channel of an EVICT or a LOAD, or of its HOLD or GIVE, all of which name the owner's stage."""
    owner = placement.rank_of[action.stage]
    peer = placement.ranks - 1 - owner
    return PipelineChannel(EVICT, owner, peer) if action.kind in (EVICT, HOLD) else PipelineChannel(LOAD, peer, owner)


def _share_a_rank(one: PipelineChannel, other: PipelineChannel) -> bool:
    return bool({one.source, one.target} & {other.source, other.target})


class Channels:
    """This rank's end of every channel; `peers` are in the order of `communicators(placement, lends)`."""

    def __init__(self, placement: Placement, rank: int, peers: Sequence[PeerToPeer], lends: bool = False) -> None:
        self._rank = rank
        self._peers = {
            channel: peer
            for channels, peer in zip(communicators(placement, lends), peers, strict=True)
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
