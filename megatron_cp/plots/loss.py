"""Draw the loss curve of a run."""

from collections.abc import Sequence
from pathlib import Path

from megatron_cp.runlog import Iteration


def draw_loss(iterations: Sequence[Iteration], file: Path, title: str) -> Path | None:
    """Draw the training loss (natural log, per token) over the iterations as a PNG; None without a loss."""
    points = [(step.number, step.loss) for step in iterations if step.loss is not None]
    if not points:
        return None
    # not pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    numbers, losses = zip(*points, strict=True)
    axes.plot(numbers, losses, color="tab:blue", linewidth=1.5, marker="o" if len(points) == 1 else "")
    axes.annotate(
        f"{losses[-1]:.3f}", (numbers[-1], losses[-1]), textcoords="offset points", xytext=(4, 0), va="center"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return file
