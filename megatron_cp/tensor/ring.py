"""Engine `ring`: one product for each rank's tokens, beside the messages of the next one.

FLUX (arXiv:2406.06858, 3) does so tile by tile inside one kernel; here the pieces are ranks and the messages those of
any fabric. Tokens go around a ring, own ones first; partial products go straight to the rank that adds them, so that
each is rounded once. A rank sends as many bytes as in the collectives, and has two buffers for pieces.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_cp.comm import Done, Handle
from megatron_cp.tensor.engine import Arrival, Engine, add


class RingEngine(Engine):
    """Point-to-point messages, each in flight during a product."""

    name = "ring"

    def arrivals(self, local: Tensor) -> Iterator[Arrival]:
        rank, size, rows = self.fabric.rank, self.fabric.size, len(local)
        piece = local.contiguous()
        for hop in range(size):
            first = (rank - hop) % size * rows
            transfer: Handle = Done()
            # 1. pass the piece on and receive the next one
            if hop < size - 1:
                following = torch.empty_like(piece)
                transfer = self.fabric.exchange([(piece, (rank + 1) % size)], [(following, (rank - 1) % size)])
            # 2. meanwhile the caller multiplies the one at hand
            yield Arrival(slice(first, first + rows), piece)
            transfer.wait()
            if hop < size - 1:
                piece = following

    def matmul_rs(self, whole: Tensor, matrix: Tensor) -> Tensor:
        parts = whole.unflatten(0, (self.fabric.size, -1))
        return self.add_at_owners(lambda owner: self.product(parts[owner], matrix))

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        return self.add_at_owners(lambda owner: parts[owner].contiguous())

    def add_at_owners(self, part_of: Callable[[int], Tensor]) -> Tensor:
        """Add over all ranks the part that each makes for this one; `part_of(owner)` makes a contiguous one."""
        rank, size = self.fabric.rank, self.fabric.size
        total: Tensor | None = None
        arriving: Tensor | None = None
        transfer: Handle = Done()
        for distance in range(1, size):
            owner = (rank + distance) % size
            # 1. make a part while the one before is in flight
            part = part_of(owner)
            transfer.wait()
            if arriving is not None:
                total = add(total, arriving)
            # 2. send it to its owner, and receive one of this rank's
            arriving = torch.empty_like(part)
            transfer = self.fabric.exchange([(part, owner)], [(arriving, (rank - distance) % size)])
        # 3. the own part comes last, for the last message to hide behind it
        own = part_of(rank)
        transfer.wait()
        if arriving is None:
            return own
        return add(add(total, arriving), own).to(own.dtype)
