"""Context-parallel backends against one kernel call over the whole sequence, made by all ranks at the same time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch

from megatron_cp.bench.contest import WHOLE, Contender, Contest, Entry, RefusedError, Row, Shape, Timed, sends_nothing
from megatron_cp.bench.pairs import Pair, pairs_of
from megatron_cp.bench.peers import Peer, counted, installed, load
from megatron_cp.bench.predict import Forecast
from megatron_cp.bench.processes import QUIET, on_ranks
from megatron_cp.comm import Fabric, axes_of
from megatron_cp.context import AUTO, BACKENDS
from megatron_cp.context.attend import Plan, Sizes, attend, plan
from megatron_cp.context.auto import settle
from megatron_cp.grid import most_square
from megatron_cp.quiet import without_import_warnings

Enter = Callable[[Contest, str], Entry]
"""Makes the entry of an attention of somebody else's; raises RefusedError for a shape that it cannot do."""


@dataclass(frozen=True)
class Report:
    """Rows, other libraries pair by pair, the kernel and why, and what the ranks had to compute with.

    core_share: of its core that the rank with the least got while it did nothing but compute; cores: of all ranks
    """

    rows: list[Row]
    kernel: str
    reason: str
    core_share: float
    cores: int
    pairs: tuple[Pair, ...] = ()

    @property
    def quiet(self) -> bool:
        """Whether the machine was ours enough for a verdict."""
        return self.core_share >= QUIET

    @property
    def judged(self) -> list[Row]:
        """The rows; without a verdict no share of the ideal."""
        return self.rows if self.quiet else [replace(row, share_of_ideal=None) for row in self.rows]

    def as_json(self) -> list[dict[str, Any]]:
        """One object per contender; without a verdict `share_of_ideal` is null."""
        return [row.as_json() for row in self.judged if row.backend != WHOLE]


@dataclass(frozen=True)
class Contenders:
    """Who takes part.

    native:   our backends on tokens that lie as each wants them, not in Megatron's zigzag
    upstream: attention that a user would have without this package, by name
    peers:    also ring-flash-attn and yunchang, on the layouts of the backends
    predict:  also simulate the backends' traces, with tiles timed in the same run
    """

    backends: tuple[str, ...]
    native: bool = False
    upstream: Mapping[str, Enter] = field(default_factory=dict)
    peers: bool = False
    predict: bool = False


def bench(contenders: Contenders, ranks: int, shapes: Sequence[Shape], rounds: int, kernel: str = "auto") -> Report:
    """Run `ranks` processes of this machine (pinned to cores on a CPU) and measure; contenders take turns.

    Raises RuntimeError when a backend's result differs from the whole kernel call.
    """
    if contenders.peers:
        installed()
    if contenders.predict and any(shape.batch > 1 for shape in shapes):
        raise ValueError("traces are of one sequence, so that --predict needs --batch 1; use more heads instead")
    return on_ranks(ranks, _report, contenders, list(shapes), rounds, kernel, _cores(ranks))[0]


def _report(
    fabric: Fabric,
    device: torch.device,
    contenders: Contenders,
    shapes: list[Shape],
    rounds: int,
    kernel: str,
    cores: int,
) -> Report:
    rows: list[Row] = []
    pairs: list[Pair] = []
    shares, chosen = [], None
    for shape in shapes:
        contest = Contest(fabric, device, shape, kernel)
        chosen = contest.kernel
        entered = [_checked(contest, entry) for entry in _entries(contest, contenders)]
        running = [contender for contender in entered if not contender.problem]
        forecast = Forecast(contest, contenders.backends, contenders.native) if contenders.predict else None
        timed: list[Timed | Forecast] = [contest.whole, *([forecast] if forecast else []), *running]
        for turn in range(rounds):
            # nobody is always behind the same one, whose memory it finds
            first = turn % len(timed)
            for one in (*timed[first:], *timed[:first]):
                one.time()
        shares.append(contest.whole.core_share)
        rows += [contest.row(), *(contender.row() for contender in entered)]
        if forecast:
            rows = [replace(row, predicted=forecast.predicted(row)) for row in rows]
        pairs += pairs_of(running, shape.seq)
    assert chosen is not None, "no shape was asked for"
    return Report(rows, chosen[0].name, chosen[1], min(shares), cores, tuple(pairs))


def _cores(ranks: int) -> int:
    """How many cores or GPUs the ranks have."""
    gpus = torch.cuda.device_count()
    return gpus if gpus >= ranks else len(psutil.Process().cpu_affinity())


def _checked(contest: Contest, entry: Entry) -> Contender:
    contender = Contender(contest, entry)
    contender.check()
    return contender


def _entries(contest: Contest, contenders: Contenders) -> Iterator[Entry]:
    mine = [ours(contest, name, contenders.native) for name in contenders.backends]
    yield from mine
    yield from (upstream(contest, name, enter) for name, enter in contenders.upstream.items())
    if contenders.peers:
        # only those that one of ours can be held against
        layouts = {entry.layout for entry in mine}
        yield from (theirs(contest, peer) for peer in installed() if peer.layout in layouts)


def ours(contest: Contest, name: str, native: bool) -> Entry:
    """A backend of the registry; `native`: on tokens that lie where it wants them, else in Megatron's zigzag."""
    fabric, backend, shape = contest.fabric, BACKENDS.get(name), contest.shape
    inner, outer = axes_of(most_square(fabric.size), fabric) if backend.needs_grid else (None, None)
    layout = (backend.layout if native else None) or "zigzag"
    how = plan(
        name, cp=fabric, inner=inner, outer=outer, causal=shape.causal, kernel=contest.kernel_name, layout=layout
    )

    def sent(run: Callable[[], None]) -> int:
        before = how.sent
        run()
        return how.sent - before

    return Entry(name, layout, lambda q, k, v: attend(q, k, v, how), sent, took=_took(how, contest))


def _took(how: Plan, contest: Contest) -> str:
    if how.backend.name != AUTO:
        return ""
    shape = contest.shape
    sizes = Sizes(shape.seq, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype, contest.device.type)
    settled = settle(how, sizes)
    return f"{settled.backend.name}; {settled.why}"


def theirs(contest: Contest, peer: Peer) -> Entry:
    """Another library's function, on tokens that lie where it wants them."""
    function, causal = load(peer, contest.kernel[0]), contest.shape.causal

    def sent(run: Callable[[], None]) -> int:
        with counted() as sizes:
            run()
        return sum(sizes)

    # no group means all processes
    return Entry(peer.name, peer.layout, lambda q, k, v: function(q, k, v, causal, None), sent, trusted=False)


def upstream(contest: Contest, name: str, enter: Enter) -> Entry:
    """What Megatron or torch has itself; one that cannot take part refuses at its first call, as others do."""
    without_import_warnings()
    try:
        return enter(contest, name)
    except RefusedError as refusal:
        words = refusal

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise words

    return Entry(name, None, refuse, sends_nothing, trusted=False)
