"""Draw a context-parallel algorithm on a cluster: the ranks' timelines, memory over time, traffic between ranks."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cp.context.trace.events import Pass, Trace
from megatron_cp.context.trace.simulate import SimulatedPass
from megatron_cp.plots.timeline import COLOURS, OTHER, PICTURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SUFFIXES = (*PICTURES, ".json")
ATTEND = {"forward": COLOURS["F"], "backward": COLOURS["B"]}
SPANS = {"copy": COLOURS["W"], "transfer": COLOURS["I"], "wait": OTHER}
NAMES = {"attend": "kernels", "copy": "copies and sums", "transfer": "own part in transfers", "wait": "waits"}
# beyond this many ranks each matrix entry would be too small for its figure
MOST_FIGURES = 12
MOST_TICKS = 16


def draw(trace: Trace, runs: Mapping[str, SimulatedPass], file: Path, title: str = "") -> Path:
    """Draw both passes next to each other as PNG, SVG or PDF: timeline, live memory and traffic matrix.

    title: of the picture; by default the attention's
    """
    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    problem, ranks = trace.problem, trace.problem.ranks
    height = 1.5 + 0.16 * max(8, min(ranks, 64))
    figure = Figure(figsize=(15, height + 7.5), layout="constrained")
    heads = f"{problem.heads} query heads, {problem.kv_heads} KV heads"
    mask = f"{'causal' if problem.causal else 'full'}{', in a window' if problem.window else ''}"
    figure.suptitle(title or f"{problem.backend}, {ranks} ranks, S = {problem.seq}, {heads}, {mask}")
    grid = figure.add_gridspec(3, 2, height_ratios=[height, 2.5, 4.5])
    for column, (name, run) in enumerate({"forward": trace.forward, "backward": trace.backward}.items()):
        _timeline(figure.add_subplot(grid[0, column]), name, runs[name])
        _memory(figure.add_subplot(grid[1, column]), runs[name])
        _matrix(figure.add_subplot(grid[2, column]), run)
    figure.savefig(file, dpi=120)
    return file


def _timeline(axes: "Axes", name: str, run: SimulatedPass) -> None:
    from matplotlib.patches import Patch

    colours = {"attend": ATTEND[name], **SPANS}
    for rank, spans in enumerate(run.spans):
        axes.broken_barh(
            [(span.start * 1e3, (span.end - span.start) * 1e3) for span in spans],
            (rank - 0.43, 0.86),
            facecolors=[colours[span.kind] for span in spans],
        )
    axes.axvline(run.ideal * 1e3, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(f"{name}: {run.time * 1e3:.3f} ms (dashed: kernels alone, evenly, {run.ideal * 1e3:.3f} ms)")
    axes.set_xlabel("ms")
    axes.set_ylabel("rank")
    axes.set_ylim(len(run.spans) - 0.5, -0.5)
    axes.set_xlim(left=0)
    _whole_numbers(axes.yaxis)
    axes.spines[["top", "right"]].set_visible(False)
    used = {span.kind for spans in run.spans for span in spans}
    handles = [Patch(color=colour, label=NAMES[kind]) for kind, colour in colours.items() if kind in used]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7)


def _memory(axes: "Axes", run: SimulatedPass) -> None:
    for points in run.memory:
        axes.step(
            [0.0, *(point.end * 1e3 for point in points)],
            [*(point.live / 2**20 for point in points), points[-1].live / 2**20],
            where="post",
            linewidth=0.8,
        )
    axes.set_xlabel("ms")
    axes.set_ylabel("live MiB of each rank\nbeyond local q, k, v, dout")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


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
    axes.figure.colorbar(image, ax=axes, label="MiB sent")


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
