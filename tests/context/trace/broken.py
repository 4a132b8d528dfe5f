"""Ring loops that are broken on purpose."""

from megatron_cp.context.algorithms import ring


class Mirrored:
    """Peers whose messages go the other way round the ring; what travels and its labels still agree in length."""

    def __init__(self, fabric):
        self._fabric, self.rank, self.size = fabric, fabric.rank, fabric.size

    def exchange(self, sends, recvs):
        return self._fabric.exchange(
            *([(x, (2 * self.rank - peer) % self.size) for x, peer in y] for y in (sends, recvs))
        )


def turn_back(monkeypatch):
    """Turn the ring the wrong way."""
    original = ring.circulating
    monkeypatch.setattr(ring, "circulating", lambda block, way, fabric: original(block, way, Mirrored(fabric)))


def swap_owners(monkeypatch):
    """Let rank 0 take the blocks of ranks 1 and 2 for each other's."""
    original = ring.circulating

    def swapped(block, way, fabric):
        for here in original(block, way, fabric):
            owner = {1: 2, 2: 1}.get(here.owner, here.owner) if fabric.rank == 0 else here.owner
            yield here._replace(owner=owner, runs=way.layout[owner])

    monkeypatch.setattr(ring, "circulating", swapped)
