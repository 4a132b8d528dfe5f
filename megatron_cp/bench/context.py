"""Context-parallel backends against one kernel call over the whole sequence, made by all ranks at the same time."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_cp.bench.contest import WHOLE, Contender, Contest, Entry, Row, Shape, WrongResultError
from megatron_cp.bench.peers import Peer, counted, installed, load
from megatron_cp.comm import Fabric, axes_of, connected
from megatron_cp.context import BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.grid import most_square

QUIET = 0.97
"""Share of its core that a computing rank gets on a quiet machine; below it there is no verdict."""


@dataclass(frozen=True)
class Report:
    """Rows, the kernel, and the share of a core that the ranks got while they did nothing but compute."""

    rows: list[Row]
    kernel: str
    reason: str
    core_share: float

    @property
    def quiet(self) -> bool:
        """Whether the machine was ours enough for a verdict."""
        return self.core_share >= QUIET

    def as_json(self) -> list[dict[str, Any]]:
        """One object per backend; without a verdict `share_of_ideal` is null."""
        ran = [row if self.quiet else replace(row, share_of_ideal=None) for row in self.rows if row.backend != WHOLE]
        return [asdict(row) for row in ran]


@dataclass(frozen=True)
class Contenders:
    """Who takes part: backends of ours, in Megatron's layout or each in its own, and other libraries."""

    backends: tuple[str, ...]
    native: bool = False
    peers: bool = False


def bench(contenders: Contenders, ranks: int, shapes: Sequence[Shape], rounds: int, kernel: str = "auto") -> Report:
    """Run `ranks` processes of this machine (pinned to cores on a CPU) and measure; contenders take turns.

    Raises RuntimeError when a backend's result differs from the whole kernel call.
    """
    if contenders.peers:
        installed()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, args=(ranks, port, contenders, list(shapes), rounds, kernel, results), nprocs=ranks)
    answer = results.get()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _rank(
    rank: int, ranks: int, port: int, contenders: Contenders, shapes: list, rounds: int, kernel: str, results: Any
) -> None:
    device = _device(rank, ranks)
    with connected(rank, ranks, port, device) as fabric:
        try:
            answer: Report | str = _report(fabric, device, contenders, shapes, rounds, kernel)
        except (ValueError, WrongResultError) as error:
            answer = str(error)
        if rank == 0:
            results.put(answer)


def _device(rank: int, ranks: int) -> torch.device:
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})
    return torch.device("cpu")


def _report(
    fabric: Fabric, device: torch.device, contenders: Contenders, shapes: list, rounds: int, kernel: str
) -> Report:
    rows, shares, chosen = [], [], None
    for shape in shapes:
        contest = Contest(fabric, device, shape, kernel)
        chosen = contest.kernel
        entries = [ours(contest, name, contenders.native) for name in contenders.backends]
        entries += [theirs(contest, peer) for peer in (installed() if contenders.peers else ())]
        running = [Contender(contest, entry) for entry in entries]
        for contender in running:
            contender.check()
        for _ in range(rounds):
            for timed in (contest.whole, *running):
                timed.time()
        shares.append(contest.whole.core_share)
        rows += [contest.row(), *(contender.row() for contender in running)]
    assert chosen is not None, "no shape was asked for"
    return Report(rows, chosen[0].name, chosen[1], min(shares))


def ours(contest: Contest, name: str, native: bool) -> Entry:
    """A backend of the registry; `native`: on tokens that lie where it wants them, else in Megatron's zigzag."""
    fabric, backend = contest.fabric, BACKENDS.get(name)
    inner, outer = axes_of(most_square(fabric.size), fabric) if backend.needs_grid else (None, None)
    layout = (backend.layout if native else None) or "zigzag"
    causal, kernel = contest.shape.causal, contest.kernel_name
    how = plan(name, cp=fabric, inner=inner, outer=outer, causal=causal, kernel=kernel, layout=layout)

    def sent(run: Callable[[], None]) -> int:
        before = how.sent
        run()
        return how.sent - before

    return Entry(name, layout, lambda q, k, v: attend(q, k, v, how), sent)


def theirs(contest: Contest, peer: Peer) -> Entry:
    """Another library's function, on tokens that lie where it wants them."""
    function, causal = load(peer, contest.kernel[0]), contest.shape.causal

    def sent(run: Callable[[], None]) -> int:
        with counted() as sizes:
            run()
        return sum(sizes)

    # no group means all processes
    return Entry(peer.name, peer.layout, lambda q, k, v: function(q, k, v, causal, None), sent, trusted=False)
