"""Draw the timeline of a pipeline step as a picture (PNG, SVG, PDF), or write a trace for Perfetto.

Bars come from the simulator or from a real run's recorded times; given both, the recorded ones are drawn right below.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cp.pipeline.action import MOVES
from megatron_cp.pipeline.simulate import Bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_cp.pipeline.simulate import SimulatedStep

COLOURS = {
    "F": "#4c78a8",
    "B": "#54a24b",
    "I": "#72b7b2",
    "W": "#eeca3b",
    "S": "#ff9da6",
    "T": "#9d755d",
    "EVICT": "#e45756",
    "LOAD": "#b279a2",
}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
NAMES |= {"S": "logits of a rank's vocabulary", "T": "their weight gradients"}
NAMES |= {"EVICT": "activations leave", "LOAD": "activations come back"}
# of a row's height, below its compute
MOVES_HEIGHT = 0.25
OTHER = "#bab0ac"
IDLE: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": "#c8c8c8", "hatch": "////", "linewidth": 0}
"""Look of the time in which a rank waits."""
UNIT = "time, in the unit of the given times"
PICTURES = (".png", ".svg", ".pdf")
# beyond this many bars the labels would be unreadable and slow
MOST_LABELS = 1500
# part of the picture's width
DIGIT = 0.003


Bars = Sequence[Sequence[Bar]]


def bars(run: "SimulatedStep") -> Bars:
    """Return the bars of a simulated step, one list per rank."""
    return run.bars()


def check_suffix(file: Path) -> None:
    """Raise ValueError for a file that `draw_timeline` cannot write."""
    if file.suffix not in (*PICTURES, ".json"):
        raise ValueError(f"a timeline must be a {', '.join(PICTURES)} picture or a .json trace, got {file.name!r}")


def draw_timeline(simulated: Bars, file: Path, title: str, recorded: Bars | None = None) -> Path:
    """Write the step to `file`: a picture for .png, .svg or .pdf, a trace for .json.

    Later chunks of a rank are drawn paler. Raises ValueError for another suffix.
    """
    check_suffix(file)
    if file.suffix == ".json":
        return write_trace(simulated, file, recorded)
    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    ranks = len(simulated)
    figure = Figure(figsize=(16, 1.2 + 0.45 * ranks * (2 if recorded else 1)), layout="constrained")
    axes = figure.add_subplot(xlabel="time in ms" if recorded else UNIT, title=title)
    height = 0.42 if recorded else 0.86
    _draw(axes, simulated, height, offset=-height / 2 if recorded else 0.0)
    if recorded:
        _draw(axes, recorded, height, offset=height / 2)
    _name_ranks(axes, ranks)
    _legend(axes, [simulated, recorded] if recorded else [simulated])
    figure.savefig(file, dpi=120)
    return file


def draw_steps(steps: "Mapping[str, SimulatedStep]", file: Path, title: str, metadata: dict[str, str]) -> Path:
    """Draw steps below each other over one axis of time as PNG, with the peak memory of each rank beside its row.

    metadata: of the file
    """
    from matplotlib.figure import Figure

    heights = [1.0 + 0.22 * len(step.peak) for step in steps.values()]
    figure = Figure(figsize=(16, 0.8 + sum(heights)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(steps), 2, sharex="col", squeeze=False, width_ratios=[9, 1], height_ratios=heights)
    for (times, memory), (name, step) in zip(grid, steps.items(), strict=True):
        _draw(times, step.bars(), 0.86, 0.0)
        _name_ranks(times, len(step.peak))
        figures = f"makespan {step.makespan:.4g}, bubble {step.bubble:.1%}, peak {max(step.peak):.3g} M_B"
        times.set_title(f"{name}: {figures}", loc="left", fontsize=10)
        memory.barh(range(len(step.peak)), step.peak, 0.86, color=OTHER)
        memory.set_ylim(len(step.peak) - 0.5, -0.5)
        memory.set_yticks([])
        memory.spines[["top", "right"]].set_visible(False)
    grid[-1, 0].set_xlabel(UNIT)
    grid[-1, 1].set_xlabel("peak, M_B")
    _legend(grid[0, 1], [step.bars() for step in steps.values()])
    figure.savefig(file, dpi=120, metadata=metadata)
    return file


def _name_ranks(axes: "Axes", ranks: int) -> None:
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.margins(x=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw(axes: "Axes", lines: Bars, height: float, offset: float) -> None:
    labelled = sum(map(len, lines)) <= MOST_LABELS
    begin, end = min(bar.start for line in lines for bar in line), max(bar.end for line in lines for bar in line)
    for rank, line in enumerate(lines):
        idle = [(start, stop - start) for start, stop in _gaps(line, begin, end)]
        axes.broken_barh(idle, (rank + offset - height / 2, height), **IDLE)
        chunks = {stage: chunk for chunk, stage in enumerate(sorted({bar.action.stage for bar in line}))}
        low = [bar.action.kind in MOVES for bar in line]
        middles = [rank + offset + move * height * (1 - MOVES_HEIGHT) / 2 for move in low]
        axes.barh(
            middles,
            [bar.end - bar.start for bar in line],
            [height * MOVES_HEIGHT if move else height for move in low],
            [bar.start for bar in line],
            color=[
                (COLOURS.get(bar.action.kind, OTHER), 0.95 - 0.6 * chunks[bar.action.stage] / len(chunks))
                for bar in line
            ],
            edgecolor="white",
            linewidth=0.4,
        )
        for bar, where in zip(line, middles, strict=True) if labelled else ():
            label = "" if bar.action.micro is None else str(bar.action.micro)
            if label and bar.end - bar.start > DIGIT * len(label) * (end - begin):
                middle = (bar.start + bar.end) / 2
                axes.text(middle, where, label, ha="center", va="center", fontsize=5, clip_on=True)


def _gaps(line: Sequence[Bar], begin: float, end: float) -> Iterator[tuple[float, float]]:
    """Yield the times in which a rank computes nothing."""
    for bar in sorted((bar for bar in line if bar.action.kind not in MOVES), key=lambda bar: bar.start):
        if bar.start > begin:
            yield begin, bar.start
        begin = max(begin, bar.end)
    if begin < end:
        yield begin, end


def _legend(axes: "Axes", all_bars: Sequence[Bars]) -> None:
    from matplotlib.patches import Patch

    used = {bar.action.kind for lines in all_bars for line in lines for bar in line}
    handles = [Patch(color=colour, label=NAMES[kind]) for kind, colour in COLOURS.items() if kind in used]
    if any(len({bar.action.stage for bar in line}) > 1 for lines in all_bars for line in lines):
        handles.append(Patch(color=(OTHER, 0.4), label="paler: a later chunk"))
    handles.append(Patch(label="idle", **IDLE))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def write_trace(simulated: Bars, file: Path, recorded: Bars | None = None) -> Path:
    """Write Chrome's trace event format: one process per source, times taken as milliseconds.

    Every rank is a thread, and its moves of activations another one.
    """
    events = [*_events(simulated, 0, "simulated"), *(_events(recorded, 1, "recorded") if recorded else ())]
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return file


def _events(lines: Bars, process: int, name: str) -> Iterator[dict[str, object]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for rank, line in enumerate(lines):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
        if any(bar.action.kind in MOVES for bar in line):
            # they run beside compute, and a thread holds one event at a time
            moves = {"name": f"rank {rank} moves"}
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": len(lines) + rank, "args": moves}
        for action, start, end in line:
            yield {
                "ph": "X",
                "name": str(action),
                "cat": NAMES.get(action.kind, action.kind),
                "pid": process,
                "tid": rank + len(lines) * (action.kind in MOVES),
                "ts": start * 1000,
                "dur": (end - start) * 1000,
                "args": {"stage": action.stage, "microbatch": action.micro},
            }
