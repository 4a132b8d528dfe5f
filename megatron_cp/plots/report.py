"""Draw the curves of a run over its iterations as a picture, one panel for each quantity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cp.plots.timeline import COLOURS
from megatron_cp.report import STEP, Points, panels, top_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
LOST = {"skipped": COLOURS["W"], "NaN": "tab:red"}


def draw_report(
    curves: Mapping[str, Points], lost: Mapping[str, Sequence[int]], predicted: float | None, file: Path, title: str
) -> Path:
    """Draw every curve as PNG; `lost` iterations are marked, `predicted` (seconds) is a line in the step times."""
    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    drawn = panels(curves)
    rows = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(14, 0.8 + 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, (panel, labels) in zip(grid, drawn.items(), strict=False):
        _panel(axes, panel, {label: curves[label] for label in labels})
        for what, numbers in lost.items():
            axes.plot(numbers, [0.02] * len(numbers), "x", color=LOST[what], transform=axes.get_xaxis_transform())
        if panel == STEP and predicted is not None:
            axes.axhline(predicted, color="black", linewidth=0.8, linestyle="--", label=f"predicted {predicted:.4g}")
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.2 * predicted))
            axes.legend(frameon=False)
    for axes in list(figure.axes)[len(drawn) :]:
        axes.set_axis_off()
    if marked := [what for what in lost if lost[what]]:
        figure.axes[0].set_xlabel(f"iteration (x: {' or '.join(marked)})")
    figure.savefig(file, dpi=120)
    return file


def _panel(axes: "Axes", panel: str, curves: Mapping[str, Points]) -> None:
    for index, (label, points) in enumerate(curves.items()):
        numbers = sorted(points)
        axes.plot(
            numbers,
            [points[number] for number in numbers],
            color=list(COLOURS.values())[index % len(COLOURS)],
            linewidth=1.2,
            marker="o" if len(numbers) < 10 else "",
            markersize=3,
            label=label.removesuffix(panel).strip(" :") or "training",
        )
    axes.set(xlabel="iteration", title=panel)
    if top := top_of(panel, curves.values()):
        axes.set_ylim(0, top)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
