"""Which context-parallel backend is fastest for one attention on a cluster, and why.

The last rank of every backend that is weighed is recorded alone: a backend takes at least as long as that rank computes
and copies. In the order of these bounds, until they are worse than the second best time, all ranks are recorded and
simulated, both passes. Up to EXACT ranks that is the problem itself. On more it is two smaller ones with as many tokens
per rank, and the time grows linearly with the number of ranks, because loops over hops take one more hop per rank
and the others' work grows alike: 4 and 8 ranks, or a grid whose longer axis is 1 and 2, on nodes made smaller alike so
that as large a share of the traffic leaves them. A window beyond which no rank sees anything ends the growth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from megatron_cp.context import BACKENDS, PLACEMENTS
from megatron_cp.context.masks import Mask
from megatron_cp.context.trace.events import Compute, Problem, Step, Touch, Trace
from megatron_cp.context.trace.simulate import SimulatedPass, call_seconds, simulate
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster

EXACT = 8
"""Most ranks whose loops are all recorded as they are."""

SAMPLES = (4, 8)
AXIS_SAMPLES = (1, 2)


class Cost(NamedTuple):
    """Seconds of both passes, as a mean over the ranks: in kernels, in copies and sums, and idle until all are done."""

    kernels: float
    copies: float
    idle: float

    @property
    def time(self) -> float:
        """Until the last rank is done."""
        return sum(self)


IN_WORDS = {"kernels": "kernel calls", "copies": "copies and sums", "idle": "waiting"}


class Option(NamedTuple):
    """A backend with its choices, what it would cost, and most live bytes of a rank beside its q, k, v and dout."""

    problem: Problem
    cost: Cost
    peak: float

    @property
    def label(self) -> str:
        """Name of the backend, with its grid and placement if it has one."""
        entry, grid = BACKENDS.get(self.problem.backend), self.problem.grid
        if grid is None or not entry.takes_grid:
            return entry.name
        placement = f" {self.problem.placement}" if entry.capabilities.placement else ""
        return f"{entry.name} {grid.inner}x{grid.outer}{placement}"


@dataclass(frozen=True)
class BackendChoice:
    """The options that were simulated, fastest first, and the cluster that they were weighed for.

    estimated: True if their times are extrapolated from smaller numbers of ranks
    too_large: those that a rank of the cluster has no memory for
    """

    options: tuple[Option, ...]
    cluster: str
    estimated: bool
    too_large: tuple[Option, ...] = ()

    @property
    def problem(self) -> Problem:
        """Problem with the backend, grid and placement that are fastest."""
        return self.options[0].problem

    @property
    def why(self) -> str:
        """One line: the times of the first two and what made the difference, the memory of the first."""
        memory = f"it keeps at most {self.options[0].peak / 2**20:.4g} MiB beside q, k and v"
        if self.too_large:
            memory += f", {', '.join(option.label for option in self.too_large)} more than a rank has"
        return f"{self._times}; {memory}"

    @property
    def _times(self) -> str:
        best, *others = self.options
        about = "about " if self.estimated else ""
        line = f"{best.label} takes {about}{_ms(best.cost.time)} on {self.cluster}"
        if not others:
            return f"{line}, nothing else can do it"
        line += f", {others[0].label} {_ms(others[0].cost.time)}"
        saved = {name: there - here for name, here, there in zip(Cost._fields, best.cost, others[0].cost, strict=True)}
        most = max(saved, key=lambda name: saved[name])
        if saved[most] <= 0:
            return f"{line}: equal, listed first"
        here, there = (getattr(option.cost, most) for option in (best, others[0]))
        return f"{line}: {IN_WORDS[most]} {_ms(here)} against {_ms(there)}"


LastRank = Callable[[Problem], Sequence[Step]]
Record = Callable[[Problem], Trace]


def choose(problem: Problem, cluster: Cluster, last_rank: LastRank, record: Record) -> BackendChoice:
    """Compare every backend for `problem`, whose own backend does not matter; a pure function of its arguments.

    last_rank: what the last rank does in both passes; raises ValueError for a problem that the backend refuses
    record:    the trace of a problem
    With a grid the backends on a grid use this one, with either axis for heads; without it those that need one are
    left out, as are those that keep more than a rank's memory where the cluster says how much that is. Raises
    ValueError when every backend refuses, with the first one's words, when none fits, and when the cluster does not
    join so many ranks.
    """
    # asked once, and not taken for a backend's refusal
    cluster.link(0, problem.ranks - 1)
    options: list[Option] = []
    too_large: list[Option] = []
    for least, candidate in sorted(_bounds(problem, cluster, last_rank), key=lambda bound: bound[0]):
        if len(options) > 1 and least > options[1].cost.time:
            break
        try:
            option = _option(candidate, cluster, record)
        except ValueError:
            # it takes the problem, but not the smaller ones that stand for it
            continue
        (options if option.peak <= _room(cluster) else too_large).append(option)
        options.sort(key=_rating)
    if not options and too_large:
        least_peak = min(too_large, key=lambda option: option.peak)
        raise Refused(
            f"attention of no backend fits the {_room(cluster) / 2**30:.4g} GiB of a rank of cluster {cluster.name!r}: "
            f"{least_peak.label} keeps least, {least_peak.peak / 2**30:.4g} GiB; use more ranks or cut it into chunks"
        )
    return BackendChoice(tuple(options), cluster.name, problem.ranks > EXACT, tuple(too_large))


def _room(cluster: Cluster) -> float:
    """Bytes of a rank; what the rest of the model takes of them is not known here."""
    return inf if cluster.memory_bytes is None else cluster.memory_bytes - cluster.reserved_bytes


def _rating(option: Option) -> tuple[float, int]:
    """Return the sort key of an option: its time, then its place in the registry."""
    return option.cost.time, BACKENDS.names.index(option.problem.backend)


def _bounds(problem: Problem, cluster: Cluster, last_rank: LastRank) -> list[tuple[float, Problem]]:
    """Return the least time that each backend can take, of those that do not refuse."""
    bounds, refusals = [], []
    for candidate in candidates(problem):
        try:
            steps = last_rank(on_nodes(candidate, cluster.ranks_per_node))
            bounds.append((_least(steps, cluster), candidate))
        except ValueError as refusal:
            refusals.append(refusal)
    if not bounds:
        raise refusals[0]
    return bounds


def _least(steps: Sequence[Step], cluster: Cluster) -> float:
    seconds = call_seconds(cluster)
    events = [event for event, _ in steps]
    computed = sum(seconds(event) for event in events if isinstance(event, Compute))
    return computed + sum(event.size for event in events if isinstance(event, Touch)) / cluster.touch_bytes_per_s


def candidates(problem: Problem) -> Iterator[Problem]:
    """Yield the problem with every backend that is considered, and its choices."""
    for entry in BACKENDS:
        if not entry.weighs(problem.mask, windows=problem.windows) or (
            problem.chunks is not None and not entry.capabilities.chunks
        ):
            continue
        on_grid = entry.needs_grid or (entry.takes_grid and problem.grid is not None)
        if on_grid and problem.grid is None:
            continue
        for placement in PLACEMENTS if entry.capabilities.placement else [problem.placement]:
            grid = problem.grid if on_grid else None
            yield replace(problem, backend=entry.name, grid=grid, placement=placement)


def _option(problem: Problem, cluster: Cluster, record: Record) -> Option:
    *times, peak = continued(problem, cluster, record, _time_and_peak)
    return Option(problem, Cost(*times), peak)


Measure = Callable[[Trace, Cluster], Sequence[float]]


def continued(problem: Problem, cluster: Cluster, record: Record, measure: Measure) -> list[float]:
    """Return the measures of the problem's trace; on many ranks, extrapolated from two smaller problems' traces."""
    if problem.ranks <= EXACT:
        return list(measure(record(on_nodes(problem, cluster.ranks_per_node)), cluster))
    small, large = samples(problem)
    first, second = (_of_sample(sample, problem, cluster, record, measure) for sample in (small, large))
    share = (_reach(problem) - small.ranks) / (large.ranks - small.ranks)
    return [max(0.0, a + share * (b - a)) for a, b in zip(first, second, strict=True)]


def _of_sample(sample: Problem, whole: Problem, cluster: Cluster, record: Record, measure: Measure) -> Sequence[float]:
    shrunk = _shrunk(cluster, sample, whole)
    # on nodes of one rank a loop sends messages where it runs a collective on larger ones
    per_node = max(min(2, cluster.ranks_per_node), shrunk.ranks_per_node)
    return measure(record(on_nodes(sample, per_node)), shrunk)


def on_nodes(problem: Problem, ranks_per_node: int) -> Problem:
    """Return the problem on nodes of so many ranks, if its backend sends by them."""
    matters = BACKENDS.get(problem.backend).capabilities.by_nodes and ranks_per_node < problem.ranks
    return replace(problem, ranks_per_node=ranks_per_node if matters else None)


def samples(problem: Problem) -> tuple[Problem, Problem]:
    """Two smaller problems with as many tokens per rank, a small one and a larger one."""
    grid = problem.grid
    if grid is None:
        small, large = (_on(problem, ranks, None) for ranks in SAMPLES)
    elif grid.outer >= grid.inner:
        small, large = (_on(problem, grid.inner * size, Grid(grid.inner, size)) for size in AXIS_SAMPLES)
    else:
        small, large = (_on(problem, size * grid.outer, Grid(size, grid.outer)) for size in AXIS_SAMPLES)
    return small, large


def _on(problem: Problem, ranks: int, grid: Grid | None) -> Problem:
    return replace(problem, ranks=ranks, seq=problem.seq // problem.ranks * ranks, grid=grid)


def _shrunk(cluster: Cluster, sample: Problem, whole: Problem) -> Cluster:
    """Nodes of so many fewer ranks; on a grid that keeps its inner axis the nodes stay, and become fewer."""
    if sample.grid and whole.grid and sample.grid.inner == whole.grid.inner:
        return cluster
    return replace(cluster, ranks_per_node=max(1, cluster.ranks_per_node * sample.ranks // whole.ranks))


def _reach(problem: Problem) -> int:
    """Return how many ranks the time grows with: all, or as many as hold what a window shows."""
    mask = problem.mask
    if not isinstance(mask, Mask) or mask.left is None or mask.right is None:
        return problem.ranks
    tokens = problem.seq // problem.ranks
    return min(problem.ranks, max(SAMPLES[-1], -(-(mask.left + mask.right) // tokens) + 1))


def _time_and_peak(trace: Trace, cluster: Cluster) -> tuple[float, ...]:
    passes = (trace.forward, trace.backward)
    forward, backward = (parts(simulate(run, cluster)) for run in passes)
    return *(a + b for a, b in zip(forward, backward, strict=True)), max(max(run.peak) for run in passes)


def parts(run: SimulatedPass) -> Cost:
    """Split the time of a pass by what the ranks do, as a mean over them."""
    ranks, kinds = len(run.spans), {"attend": 0.0, "copy": 0.0, "transfer": 0.0}
    for span in (span for spans in run.spans for span in spans if span.kind in kinds):
        kinds[span.kind] += (span.end - span.start) / ranks
    kernels, copies = kinds["attend"], kinds["copy"] + kinds["transfer"]
    return Cost(kernels, copies, run.time - kernels - copies)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
