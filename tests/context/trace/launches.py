"""What the loops of context and tensor parallelism launch, as operations of the model of NCCL in `tests.nccl`."""

from collections.abc import Iterable, Iterator

from megatron_cp.context.trace.events import Pass, Post, Step, Wait
from tests.nccl import Message, Operation


def launches(*passes: Pass) -> list[list[Operation]]:
    """These passes one after the other on every rank; a wait is compute that is launched after the batch it names."""
    ranks = zip(*(run.steps for run in passes), strict=True)
    return [list(_operations(rank, (step for steps in ran for step in steps))) for rank, ran in enumerate(ranks)]


def _operations(rank: int, steps: Iterable[Step]) -> Iterator[Operation]:
    place, posted = 0, {}
    for event, _ in steps:
        if isinstance(event, Post):
            posted[event.batch] = place
            yield Operation(f"batch {event.batch}", tuple(_messages(rank, event)), group=event.group)
        elif isinstance(event, Wait):
            yield Operation(f"wait for batch {event.batch}", after=(posted[event.batch],))
        else:
            continue
        place += 1


def _messages(rank: int, post: Post) -> Iterator[Message]:
    if post.collective:
        # it ends when all ranks have come to it, whichever way its bytes take
        for peer in (peer for peer in post.group if peer != rank):
            label = (post.collective, post.sends[0].form)
            yield from (Message(post.group, rank, peer, label), Message(post.group, peer, rank, label))
        return
    yield from (Message(post.group, rank, peer, (size, form)) for peer, size, form in post.sends)
    yield from (Message(post.group, peer, rank, (size, form)) for peer, size, form in post.recvs)
