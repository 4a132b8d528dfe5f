"""Draw a context-parallel algorithm on a cluster: the ranks' timelines, memory over time, traffic between ranks.

A rank's row of the timeline has what it computes above and the messages that leave it below.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cp.context.trace.events import Pass, Trace
from megatron_cp.context.trace.simulate import Flight, Memory, SimulatedPass
from megatron_cp.plots.timeline import COLOURS, IDLE, PICTURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.patches import Patch

SUFFIXES = (*PICTURES, ".json")
ATTEND = {"forward": COLOURS["F"], "backward": COLOURS["B"]}
SPANS = {"copy": COLOURS["W"], "transfer": COLOURS["I"]}
NAMES = {"attend": "kernels", "copy": "copies and sums", "transfer": "own part in transfers", "wait": "waits"}
# by whether they stay inside a node
MESSAGES = {True: COLOURS["LOAD"], False: COLOURS["EVICT"]}
MESSAGE_NAMES = {True: "sends inside the node", False: "sends to other nodes"}
# upper edge and height in a row of height 1
COMPUTE, SENDS = (-0.43, 0.5), (0.11, 0.3)
# beyond this many ranks each matrix entry would be too small for its figure
MOST_FIGURES = 12
MOST_TICKS = 16
MOST_CURVES = 8
# not counted in an attention's memory
BEYOND = "\nbeyond local q, k, v, dout"


def draw(
    trace: Trace,
    runs: Mapping[str, SimulatedPass],
    file: Path,
    cluster: str,
    title: str = "",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Draw both passes next to each other as PNG, SVG or PDF: timeline, live memory and traffic matrix.

    cluster:  its name, for the title
    title:    of the picture; by default the attention's
    metadata: of the file
    """
    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    height = 1.5 + 0.24 * max(8, min(trace.problem.ranks, 64))
    figure = Figure(figsize=(16, height + 7.5), layout="constrained")
    figure.suptitle(f"{title or _title(trace)}\non the cluster {cluster}, {trace.problem.dtype}, simulated")
    grid = figure.add_gridspec(3, 2, height_ratios=[height, 2.5, 4.5])
    for column, (name, run) in enumerate({"forward": trace.forward, "backward": trace.backward}.items()):
        _timeline(figure.add_subplot(grid[0, column]), name, runs[name])
        _memory(figure.add_subplot(grid[1, column]), runs[name], "" if title else BEYOND)
        _matrix(figure.add_subplot(grid[2, column]), run)
    figure.savefig(file, dpi=120, metadata=metadata)
    return file


def _title(trace: Trace) -> str:
    problem = trace.problem
    heads = f"{problem.heads} query heads, {problem.kv_heads} KV heads of {problem.head_dim}"
    mask = f"{'causal' if problem.causal else 'full'}{', in a window' if problem.window else ''}"
    return f"{problem.backend} on {problem.ranks} ranks: S = {problem.seq:,} tokens, {heads}, {mask}"


def _timeline(axes: "Axes", name: str, run: SimulatedPass) -> None:
    from matplotlib.patches import Patch

    colours = {"attend": ATTEND[name], **SPANS}
    for rank, spans in enumerate(run.spans):
        top, height = COMPUTE
        axes.broken_barh(_milliseconds(_idle(run, rank)), (rank + top, height), **IDLE)
        busy = [span for span in spans if span.kind in colours]
        axes.broken_barh(
            _milliseconds((span.start, span.end) for span in busy),
            (rank + top, height),
            facecolors=[colours[span.kind] for span in busy],
        )
    inside_and_between = {flight.inside for flight in run.flights}
    for (rank, inside), flights in _by_sender(run.flights).items():
        top, height = SENDS
        if len(inside_and_between) > 1:
            top, height = top + (0 if inside else height / 2), height / 2
        axes.broken_barh(_milliseconds(_united(flights)), (rank + top, height), facecolors=MESSAGES[inside])
    axes.axvline(run.ideal * 1e3, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(f"{name}: {_rounded(run.time * 1e3)} ms; dashed: kernels alone, spread evenly")
    axes.set_xlabel("time in ms")
    axes.set_ylabel("rank")
    axes.set_ylim(len(run.spans) - 0.5, -0.5)
    axes.set_xlim(0, run.time * 1e3)
    _whole_numbers(axes.yaxis)
    axes.spines[["top", "right"]].set_visible(False)
    used = {span.kind for spans in run.spans for span in spans}
    names = {**NAMES, "attend": f"{name} kernels"}
    handles = [Patch(color=colour, label=names[kind]) for kind, colour in colours.items() if kind in used]
    handles.append(Patch(label="waits, idle", **IDLE))
    handles += [
        Patch(color=MESSAGES[inside], label=MESSAGE_NAMES[inside]) for inside in sorted(inside_and_between)[::-1]
    ]
    _legend(axes, handles, columns=5)


def _idle(run: SimulatedPass, rank: int) -> Iterator[tuple[float, float]]:
    """Yield when a rank waits for others, and when it is done before them."""
    spans = run.spans[rank]
    yield from ((span.start, span.end) for span in spans if span.kind == "wait")
    done = spans[-1].end if spans else 0.0
    if done < run.time:
        yield done, run.time


def _by_sender(flights: Iterable[Flight]) -> dict[tuple[int, bool], list[Flight]]:
    found: dict[tuple[int, bool], list[Flight]] = defaultdict(list)
    for flight in flights:
        found[flight.src, flight.inside].append(flight)
    return found


def _united(flights: Iterable[Flight]) -> list[tuple[float, float]]:
    """Return the times at which at least one message is under way."""
    times: list[tuple[float, float]] = []
    for flight in sorted(flights, key=lambda flight: flight.start):
        if times and flight.start <= times[-1][1]:
            times[-1] = times[-1][0], max(times[-1][1], flight.end)
        else:
            times.append((flight.start, flight.end))
    return times


def _milliseconds(times: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return start and width of each, as matplotlib wants them."""
    return [(start * 1e3, (end - start) * 1e3) for start, end in times]


def _rounded(value: float) -> str:
    """Show no more digits than a model's error leaves: three."""
    return f"{float(f'{value:.3g}'):,g}"


def _memory(axes: "Axes", run: SimulatedPass, beyond: str) -> None:
    from matplotlib import colormaps

    alike = _alike(run.memory)
    for index, (points, ranks) in enumerate(alike):
        label = f"{'ranks' if len(ranks) > 1 else 'rank'} {_ranges(ranks)}" if index < MOST_CURVES else None
        axes.step(
            [0.0, *(point.end * 1e3 for point in points)],
            [*(point.live / 2**20 for point in points), points[-1].live / 2**20],
            where="post",
            linewidth=1.0,
            color=colormaps["tab10"](index) if len(alike) <= 10 else colormaps["viridis"](index / len(alike)),
            label=label,
        )
    axes.set_xlabel("time in ms")
    axes.set_ylabel(f"live MiB of each rank{beyond}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, run.time * 1e3)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    more = len(alike) - MOST_CURVES
    _legend(axes, title=f"the first of {len(alike)} curves" if more > 0 else None, columns=MOST_CURVES)


def _alike(memory: Sequence[Sequence[Memory]]) -> list[tuple[Sequence[Memory], list[int]]]:
    """Return the different curves with the ranks that have each, which would hide each other."""
    ranks_of: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for rank, points in enumerate(memory):
        # sums in another order differ in their last digits
        ranks_of[tuple((f"{point.end:.6g}", point.live) for point in points)].append(rank)
    return [(memory[ranks[0]], ranks) for points, ranks in ranks_of.items() if points]


def _ranges(ranks: Sequence[int]) -> str:
    """Write numbers in order as `0-3, 6`, short enough for a legend."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [f"{first}-{last}" if first < last else f"{first}" for first, last in runs]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:3], "…"])


def _legend(axes: "Axes", handles: "Sequence[Patch] | None" = None, *, title: str | None = None, columns: int) -> None:
    axes.legend(
        handles=handles,
        title=title,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        # below the axis and its label
        borderaxespad=4.8,
        ncols=columns,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        columnspacing=1.2,
    )


def _matrix(axes: "Axes", run: Pass) -> None:
    sizes = [[size / 2**20 for size in row] for row in run.traffic]
    image = axes.imshow(sizes, cmap="Blues", vmin=0)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    for axis in (axes.xaxis, axes.yaxis):
        _whole_numbers(axis)
    largest = max(map(max, sizes))
    if len(sizes) <= MOST_FIGURES:
        for src, row in enumerate(sizes):
            for dst, size in enumerate(row):
                if size:
                    colour = "white" if size > largest / 2 else "black"
                    axes.text(dst, src, f"{size:.0f}", ha="center", va="center", fontsize=7, color=colour)
    assert axes.figure
    # inside the column, whose width belongs to the timeline
    axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)), label="MiB sent")


def _whole_numbers(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=MOST_TICKS, integer=True))


def write_events(trace: Trace, runs: Mapping[str, SimulatedPass], file: Path) -> Path:
    """Write Chrome's trace event format for Perfetto: a process per pass, a thread per rank, live bytes as counters."""
    events = [event for process, (name, run) in enumerate(runs.items()) for event in _events(run, process, name)]
    head = {"backend": trace.problem.backend, "ranks": trace.problem.ranks, "seq": trace.problem.seq}
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": head}))
    return file


def _events(run: SimulatedPass, process: int, name: str) -> Iterator[dict[str, object]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for rank, spans in enumerate(run.spans):
        here: dict[str, object] = {"pid": process, "tid": rank}
        yield {"ph": "M", "name": "thread_name", **here, "args": {"name": f"rank {rank}"}}
        for kind, start, end, work in spans:
            args = {"work": work} if work else {}
            yield {"ph": "X", "name": NAMES[kind], **here, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": args}
        for end, live in run.memory[rank]:
            yield {
                "ph": "C",
                "name": f"live bytes of rank {rank}",
                "pid": process,
                "ts": end * 1e6,
                "args": {"live": live},
            }
    for number, flight in enumerate(run.flights):
        label = f"{flight.src} to {flight.dst}, {flight.size} bytes, {'inside' if flight.inside else 'between'} nodes"
        # messages overlap each other: asynchronous events on tracks of their own
        message: dict[str, object] = {"cat": "message", "id": number, "pid": process, "tid": flight.src, "name": label}
        yield {"ph": "b", **message, "ts": flight.start * 1e6}
        yield {"ph": "e", **message, "ts": flight.end * 1e6}
