"""Draw curves of a run over its iterations, one panel each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cp.plots.timeline import COLOURS
from megatron_cp.report import Points, steady

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

    rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(14, 0.8 + 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, (label, points) in zip(panels, curves.items(), strict=False):
        _curve(axes, label, points)
        for what, numbers in lost.items():
            axes.plot(numbers, [0.02] * len(numbers), "x", color=LOST[what], transform=axes.get_xaxis_transform())
        if label == "step time, s" and predicted is not None:
            axes.axhline(predicted, color="black", linewidth=0.8, linestyle="--", label=f"predicted {predicted:.4g}")
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.2 * predicted))
            axes.legend(frameon=False)
    for axes in list(figure.axes)[len(curves) :]:
        axes.set_axis_off()
    if marked := [what for what in lost if lost[what]]:
        figure.axes[0].set_xlabel(f"iteration (x: {' or '.join(marked)})")
    figure.savefig(file, dpi=120)
    return file


def _curve(axes: "Axes", label: str, points: Points) -> None:
    numbers = sorted(points)
    marker = "o" if len(numbers) == 1 else ""
    axes.plot(numbers, [points[number] for number in numbers], color=COLOURS["F"], linewidth=1.2, marker=marker)
    axes.set(xlabel="iteration", title=label)
    if label not in ("loss", "gradient norm"):
        # the first iterations include the start and must not set the scale
        axes.set_ylim(0, max(1.5 * steady(points), *(points[number] for number in numbers[2:] or numbers)) or None)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
