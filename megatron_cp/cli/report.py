"""`megatron-cp report`: turn a run's logs into a picture and a page."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_cp import config
from megatron_cp import report as of_run
from megatron_cp.cli.estimate import estimate_recipe
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder that the run saved or logged to.")],
    name: Annotated[
        str | None, typer.Option("--recipe", help="Its recipe, for the predicted step time and the model's operations.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Its cluster, for the peak of MFU; by default the recipe's own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The page; by default RUN_DIR/report.html.")] = None,
) -> None:
    """Turn a run's logs into report.png and report.html, which contains the picture."""
    from megatron_cp.plots.report import draw_report

    target = output or folder / "report.html"
    if target.suffix != ".html":
        raise ValueError(f"--output must be a .html file, got {str(target)!r}; the picture is written beside it")
    run, against = of_run.read(folder), _reference(name, cluster)
    curves = of_run.curves(run, against)
    title = name or folder.resolve().name
    picture = draw_report(curves, of_run.lost(run), against.step_seconds, target.with_suffix(".png"), title)
    rows = of_run.table(run, curves, against)
    target.write_text(of_run.page(title, rows, picture.read_bytes()), encoding="utf-8")
    for label, text in rows.items():
        typer.echo(f"{label:<24}{text}")
    typer.echo(f"{'written':<24}{target} and {picture}")


def _reference(name: str | None, cluster: str | None) -> of_run.Reference:
    if name is not None:
        run = recipe.load(name, Unset(config.environment()), [])
        found = estimate_recipe(run, cluster)
        flops = found.flops_per_gpu() * found.seconds
        peak = found.cluster.gemm(found.parallel.precision).peak
        return of_run.Reference(found.seconds, flops, peak, found.seq, tuple(unmodelled(run)))
    if cluster is None:
        return of_run.Reference()
    known = load_cluster(cluster)
    # the dtype that a run computes in, unless its recipe says otherwise
    return of_run.Reference(peak=known.gemm(known.dtype).peak)
