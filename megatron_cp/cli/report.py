"""`megatron-cp report`: turn the logs of runs into a picture and a page."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from megatron_cp import config
from megatron_cp import report as of_run
from megatron_cp.cli.estimate import estimate_recipe
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.plots.page import ShownRun, page
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR…", help="Folder that the run saved or logged to; several are compared."),
    ],
    name: Annotated[
        str | None, typer.Option("--recipe", help="Its recipe, for the predicted step time and the model's operations.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Its cluster, for the peak of MFU; by default the recipe's own.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The page; by default report.html in the first RUN_DIR, of several compare.html."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Follow the run: write the page, which loads itself again, until it is done.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two pages of --live.")] = 10.0,
) -> None:
    """Turn the logs of a run, or of several beside each other, into report.html, and those of one into report.png."""
    target = output or folders[0] / ("report.html" if len(folders) == 1 else "compare.html")
    if target.suffix != ".html":
        raise ValueError(f"--output must be a .html file, got {str(target)!r}; the picture is written beside it")
    named, against = _named(folders), _reference(name, cluster)
    title = name if name and len(folders) == 1 else " and ".join(named)
    if live:
        _follow(named, against, target, title, every)
    runs = {label: of_run.read(folder) for label, folder in named.items()}
    shown = {label: _shown(run, against) for label, run in runs.items()}
    _write(page(shown, title), target)
    written = [target, *(_pictures(shown, target, title) if len(shown) == 1 else ())]
    _print(shown)
    typer.echo(f"written: {' and '.join(map(str, written))}")


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders by their names, by their paths where two have the same; raises ValueError for one twice."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is compared with others, got one folder twice: {', '.join(map(str, folders))}")
    return dict(zip(names, folders, strict=True))


def _follow(named: Mapping[str, Path], against: of_run.Reference, target: Path, title: str, every: float) -> None:
    """Write the page again and again until all runs are done or Ctrl-C ends it."""
    typer.echo(f"{target} follows the run until it is done; Ctrl-C ends it", err=True)
    try:
        while True:
            try:
                runs = {label: of_run.read(folder) for label, folder in named.items()}
            except of_run.NoIteration:
                runs = {}
            if runs and all(run.done for run in runs.values()):
                return
            shown = {label: _shown(run, against) for label, run in runs.items()}
            now = datetime.now().strftime("%T")
            _write(page(shown, f"{title}, {f'as of {now}' if runs else 'before its first iteration'}", every), target)
            time.sleep(every)
    except KeyboardInterrupt:
        return


def _shown(run: of_run.TrainingRun, against: of_run.Reference) -> ShownRun:
    curves = of_run.curves(run, against)
    return ShownRun(
        curves=curves,
        tokens=of_run.tokens_at(run, against),
        hours=of_run.hours_at(run),
        lost=of_run.lost(run),
        predicted=against.step_seconds,
        rows={**of_run.about(run), **of_run.table(run, curves, against)},
        said=run.said,
        arguments=run.arguments,
    )


def _write(text: str, target: Path) -> None:
    # a browser that loads the page meanwhile gets the old one or the new one
    half = target.with_suffix(".html.part")
    half.write_text(text, encoding="utf-8")
    half.replace(target)


def _pictures(shown: Mapping[str, ShownRun], target: Path, title: str) -> list[Path]:
    from megatron_cp.plots.report import draw_report

    return [
        draw_report(run.curves, run.lost, run.predicted, target.with_suffix(".png"), title) for run in shown.values()
    ]


def _print(shown: Mapping[str, ShownRun]) -> None:
    width = 2 + max(len(row) for run in shown.values() for row in run.rows)
    for label, run in shown.items():
        if len(shown) > 1:
            typer.echo(f"{label}:")
        for row, text in run.rows.items():
            typer.echo(f"{row:<{width}}{text}")


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
