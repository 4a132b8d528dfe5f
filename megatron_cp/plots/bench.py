"""Draw a benchmark as bars: each backend's share of the ideal, bytes sent and live bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cp.plots.timeline import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_cp.bench.comparison import BackendResult

PANELS = {
    "share_of_ideal": ("share of ideal", 1),
    "sent": ("sent per rank, MiB", 2**20),
    "peak": ("live beyond local q, k, v, dout, MiB", 2**20),
}
SHADES = tuple(COLOURS.values())


def draw_bench(rows: "Sequence[BackendResult]", file: Path, title: str) -> Path:
    """Draw one bar per backend and sequence length in three panels as PNG, SVG or PDF; without a figure, no bar."""
    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    names, lengths = list(dict.fromkeys(row.backend for row in rows)), list(dict.fromkeys(row.seq for row in rows))
    figure = Figure(figsize=(14, 2 + 0.15 * len(names) * (1 + len(lengths))), layout="constrained")
    figure.suptitle(title)
    for axes, (key, (label, unit)) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        for number, seq in enumerate(lengths):
            values = {names.index(row.backend): getattr(row, key) for row in rows if row.seq == seq}
            bars = {place: value / unit for place, value in values.items() if value is not None}
            _bars(axes, bars, number, lengths)
        axes.set(xlabel=label if axes.patches else f"{label}: no verdict", yticks=range(len(names)), yticklabels=names)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    if len(lengths) > 1:
        figure.axes[-1].legend(frameon=False)
    figure.savefig(file, dpi=120)
    return file


def _bars(axes: "Axes", bars: dict[int, float], number: int, lengths: Sequence[int]) -> None:
    """Draw the bars of one sequence length; the keys of `bars` are the backends' positions."""
    thickness = 0.8 / len(lengths)
    places = [place - 0.4 + (number + 0.5) * thickness for place in bars]
    colour = SHADES[number % len(SHADES)]
    drawn = axes.barh(places, list(bars.values()), thickness, label=f"S = {lengths[number]}", color=colour)
    axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
