"""Draw plans of batches, the groups of every slot over time, and distributions of document lengths."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_cp.batches.plan import BatchPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAD = "#dddddd"
"""Colour of ranks that run a pad."""
MOST_LABELS = 400
"""Beyond so many groups, labels would be unreadable and slow."""


class LengthRow(Protocol):
    """Documents of `least` up to twice as many tokens."""

    @property
    def least(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def tokens(self) -> int: ...


def draw_plans(plans: Sequence[BatchPlan], file: Path, title: str) -> Path:
    """Draw the groups of each plan's slots, ranks over time, below each other as PNG, SVG or PDF.

    A group's colour is its degree, its label the number of its documents. With pipeline stages, the groups are drawn
    as if a stage never waited for another.
    """
    from matplotlib import colormaps

    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = plans[0].problem.ranks
    figure = Figure(figsize=(15, 0.8 + len(plans) * (1.2 + 0.035 * ranks)), layout="constrained")
    figure.suptitle(title)
    degrees = sorted({degree for plan in plans for degree in plan.degrees})
    shades = colormaps["viridis"]
    colours = {degree: shades(index / max(1, len(degrees) - 1)) for index, degree in enumerate(degrees)}
    rows = figure.subplots(len(plans), 1, sharex=True, squeeze=False)[:, 0]
    for axes, plan in zip(rows, plans, strict=True):
        _draw(axes, plan, colours)
    rows[-1].set_xlabel("seconds")
    handles = [Patch(color=colour, label=f"{degree}") for degree, colour in colours.items()]
    handles.append(Patch(color=PAD, label="no documents"))
    figure.legend(handles=handles, title="degree", loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=120)
    return file


def _draw(axes: "Axes", plan: BatchPlan, colours: dict[int, tuple[float, float, float, float]]) -> None:
    labelled = sum(map(len, plan.slots)) <= MOST_LABELS
    for slot, spans in zip(plan.slots, plan.spans, strict=True):
        for group, span in zip(slot, spans, strict=True):
            axes.barh(
                group.first,
                span.end - span.start,
                group.degree,
                span.start,
                align="edge",
                color=colours[group.degree] if group.documents else PAD,
                edgecolor="white",
                linewidth=0.4,
            )
            if labelled and group.documents:
                middle = (span.start + span.end) / 2, group.first + group.degree / 2
                axes.text(*middle, str(len(group.documents)), ha="center", va="center", fontsize=5, color="white")
    axes.set_title(f"{plan.algorithm}: {plan.seconds:.4g} s, {plan.gap:.1%} above the lower bound", fontsize=9)
    axes.set_ylabel("rank")
    axes.set_ylim(plan.problem.ranks, 0)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def draw_lengths(rows: Sequence[LengthRow], file: Path, title: str) -> Path:
    """Draw the share of documents and of tokens in each doubling of the length as PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="tokens of a document, from", ylabel="share")
    places = range(len(rows))
    for offset, name, colour in ((-0.2, "documents", "#4c78a8"), (0.2, "tokens", "#eeca3b")):
        whole = sum(getattr(row, name) for row in rows)
        shares = [getattr(row, name) / whole for row in rows]
        axes.bar([place + offset for place in places], shares, 0.4, color=colour, label=name)
    axes.set_xticks(places, [f"{row.least:,}" for row in rows], rotation=45, ha="right", fontsize=8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return file
