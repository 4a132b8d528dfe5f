"""The entry of `bench batches`: `torchrun -m megatron_cp.megatron.bench.turns ROUNDS FLAGS`.

One training runs the documents of every step with the baseline and with the plan of the flags, several times in turns,
so that what else the machine does in these seconds slows both.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_cp.quiet import without_import_warnings

if TYPE_CHECKING:
    from megatron_cp.megatron.batches.feed import DocumentStep

BASELINE = "static"


def turns(rounds: int) -> list[int]:
    """Return which of two plans each of the steps on the same documents runs: 0 1, 1 0, 0 1, …"""
    return [(at + turn) % 2 for turn in range(rounds) for at in range(2)]


def in_turns[T](rounds: int, pairs: Iterable[tuple[T, T]]) -> Iterator[T]:
    """Yield the two steps of each pair as `turns` says."""
    for pair in pairs:
        for at in turns(rounds):
            yield pair[at]


def _feed(
    rounds: int, corpus: Any, order: Any, start: int, batch: int, settings: Any, fabric: Any
) -> Iterator["DocumentStep"]:
    from megatron_cp.megatron.batches.feed import DocumentFeed

    both = (replace(settings, algorithm=BASELINE), settings)
    feeds = [DocumentFeed(corpus, order, start, batch, each, fabric) for each in both]
    return in_turns(rounds, zip(*feeds, strict=True))


def main() -> None:
    """Train with two feeds in place of one."""
    from megatron_cp.megatron.batches import provider
    from megatron_cp.megatron.process import pretrain

    provider.DocumentFeed = partial(_feed, int(sys.argv.pop(1)))  # type: ignore[assignment,misc]
    pretrain.main()


if __name__ == "__main__":
    without_import_warnings()
    main()
