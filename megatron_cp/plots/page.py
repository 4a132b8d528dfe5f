"""Write the curves of one or more runs as one HTML page that a browser shows without fetching anything.

Panels zoom together along their common axis: iterations, tokens or hours.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any, NamedTuple

from megatron_cp.plots.timeline import COLOURS
from megatron_cp.report import LOSS, STEP, Points, panels, top_of

COLUMNS = 2
ROW_PIXELS = 300
DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot")
RUN_COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b", "#bab0ac")
LOST = {"skipped": COLOURS["W"], "NaN": "#d62728"}
MOST_DIFFERENT = 60
MOST_NAMED = 8
MOST_POINTS = 5000


class ShownRun(NamedTuple):
    """One run on a page.

    tokens, hours: seen up to each iteration; empty where they are unknown
    lost:          iterations by what happened to them
    predicted:     seconds of a step; None without a prediction
    rows:          of the table
    said:          lines of its log
    arguments:     those that Megatron printed
    """

    curves: Mapping[str, Points]
    tokens: Points
    hours: Points
    lost: Mapping[str, Sequence[int]]
    predicted: float | None
    rows: Mapping[str, str]
    said: Sequence[str]
    arguments: Mapping[str, str]


def page(runs: Mapping[str, ShownRun], title: str, refresh: float | None = None) -> str:
    """Return the page; with `refresh` it loads itself again after so many seconds."""
    from plotly.offline import get_plotlyjs

    longest = max((len(points) for run in runs.values() for points in run.curves.values()), default=0)
    apart = -(-longest // MOST_POINTS)
    drawn = json.dumps(_figure(runs), allow_nan=False).replace("<", "\\u003c")
    again = f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else ""
    return _PAGE.format(
        title=escape(title),
        again=again,
        note=f"<p>One of {apart} iterations is drawn.</p>" if apart > 1 else "",
        rows="\n".join(_rows(runs)),
        details="\n".join(_details(runs)),
        library=get_plotlyjs(),
        figure=drawn,
    )


def _rows(runs: Mapping[str, ShownRun]) -> Iterator[str]:
    if len(runs) > 1:
        yield _row("", runs, "th")
    for label in dict.fromkeys(label for run in runs.values() for label in run.rows):
        yield _row(label, [run.rows.get(label, "") for run in runs.values()])


def _row(label: str, cells: "Sequence[str] | Mapping[str, ShownRun]", kind: str = "td") -> str:
    filled = "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells)
    return f"<tr><th>{escape(label)}</th>{filled}</tr>"


def _details(runs: Mapping[str, ShownRun]) -> Iterator[str]:
    names = dict.fromkeys(name for run in runs.values() for name in run.arguments)
    values = {name: [run.arguments.get(name, "") for run in runs.values()] for name in names}
    differing = {name: cells for name, cells in values.items() if len(set(cells)) > 1}
    if differing:
        rows = [_row("", runs, "th"), *(_row(name, cells) for name, cells in [*differing.items()][:MOST_DIFFERENT])]
        left = len(differing) - MOST_DIFFERENT
        more = f"<p>and {left} more</p>" if left > 0 else ""
        yield _folded(f"arguments that differ: {len(differing)}", f"<table>{''.join(rows)}</table>{more}")
    for name, run in runs.items():
        of = f" of {name}" if len(runs) > 1 else ""
        if run.said:
            yield _folded(f"what megatron-cp said{of}", f"<pre>{escape(chr(10).join(run.said))}</pre>")
        if run.arguments:
            lines = "\n".join(f"{key} = {value}" for key, value in sorted(run.arguments.items()))
            yield _folded(f"{len(run.arguments)} arguments{of}", f"<pre>{escape(lines)}</pre>")


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _figure(runs: Mapping[str, ShownRun]) -> dict[str, Any]:
    """Return data and layout in plotly's own terms."""
    titles = panels(dict.fromkeys(label for run in runs.values() for label in run.curves))
    axes = {title: str(number) if number > 1 else "" for number, title in enumerate(titles, 1)}
    traces = [trace for name in runs for trace in _traces(name, runs, titles, axes)]
    data = [trace | {"x": trace["x"]["iteration"]} for trace in traces]
    layout = _layout(traces, axes)
    for title, labels in titles.items():
        curves = [run.curves[label] for run in runs.values() for label in labels if label in run.curves]
        if top := top_of(title, curves):
            predicted = [run.predicted or 0.0 for run in runs.values()] if title == STEP else [0.0]
            layout[f"yaxis{axes[title]}"]["range"] = [0, max(top, *(1.2 * seconds for seconds in predicted))]
    return {"data": data, "layout": layout}


def _traces(
    name: str, runs: Mapping[str, ShownRun], titles: Mapping[str, Sequence[str]], axes: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run, each with its places on every axis that may be chosen."""
    run, place = runs[name], [*runs].index(name)
    for title, labels in titles.items():
        here = {"type": "scatter", "xaxis": f"x{axes[title]}", "yaxis": f"y{axes[title]}"}
        # a click on a run hides all of its curves
        here |= {"legendgroup": name} if len(runs) > 1 else {}
        for index, label in enumerate(labels):
            points = run.curves.get(label)
            if not points:
                continue
            numbers = _thinned(points)
            # one run has a colour for each curve of a panel, several have one each
            colour, dash = (place, index) if len(runs) > 1 else (index, 0)
            part = label.removesuffix(title).strip(" :")
            yield here | {
                "name": " ".join(filter(None, (name if len(runs) > 1 else "", part))) or "training",
                "showlegend": title == next(iter(titles)) or (bool(part) and len(labels) <= MOST_NAMED),
                "x": _places(run, numbers),
                "y": [_number(points[number]) for number in numbers],
                "mode": "lines+markers" if len(points) < 20 else "lines",
                "line": {
                    "color": RUN_COLOURS[colour % len(RUN_COLOURS)],
                    "dash": DASHES[dash % len(DASHES)],
                    "width": 1.5,
                },
            }
        if title == STEP and run.predicted is not None:
            ends = sorted(run.curves[STEP])[:: max(1, len(run.curves[STEP]) - 1)] if STEP in run.curves else []
            yield here | {
                "name": f"{name}: predicted" if len(runs) > 1 else "predicted step time",
                "x": _places(run, ends),
                "y": [run.predicted] * len(ends),
                "mode": "lines",
                "line": {"color": "#000000", "dash": "dash", "width": 1},
            }
    if LOSS in titles:
        group = {"legendgroup": name} if len(runs) > 1 else {}
        yield from (trace | group for trace in _lost(run, axes[LOSS]))


def _lost(run: ShownRun, axis: str) -> Iterator[dict[str, Any]]:
    """Yield crosses at the losses before the iterations that were lost."""
    losses = {number: loss for number, loss in run.curves.get(LOSS, {}).items() if isfinite(loss)}
    for what, numbers in run.lost.items():
        if numbers and losses:
            yield {
                "type": "scatter",
                "xaxis": f"x{axis}",
                "yaxis": f"y{axis}",
                "name": f"{what} iterations",
                "x": _places(run, numbers),
                "y": _before(losses, numbers),
                "mode": "markers",
                "marker": {"symbol": "x", "color": LOST.get(what, "#000000"), "size": 8},
            }


def _places(run: ShownRun, numbers: Sequence[int]) -> dict[str, list[float | None]]:
    return {
        "iteration": [*numbers],
        "tokens": _before(run.tokens, numbers),
        "hours of training": _before(run.hours, numbers),
    }


def _before(points: Points, numbers: Sequence[int]) -> list[float | None]:
    """Return for each iteration the last value up to it, or the first one there is."""
    known = sorted(points)
    return [points[known[max(0, bisect_right(known, number) - 1)]] if known else None for number in numbers]


def _thinned(numbers: Iterable[int]) -> list[int]:
    """Return iterations in order, at most as many as a curve shows."""
    known = sorted(numbers)
    return known[:: -(-len(known) // MOST_POINTS)] if known else []


def _number(value: float) -> float | None:
    return value if isfinite(value) else None


def _layout(traces: Sequence[Mapping[str, Any]], axes: Mapping[str, str]) -> dict[str, Any]:
    rows = -(-len(axes) // COLUMNS)
    layout: dict[str, Any] = {
        "grid": {"rows": rows, "columns": COLUMNS, "pattern": "independent", "xgap": 0.16, "ygap": 0.3},
        "height": 120 + ROW_PIXELS * rows,
        "margin": {"l": 70, "r": 20, "t": 80, "b": 60},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
    }
    for title, number in axes.items():
        line = {"gridcolor": "#e5e5e5", "zerolinecolor": "#c8c8c8", "automargin": True}
        matched = {"matches": "x"} if number else {}
        layout[f"xaxis{number}"] = {**line, **matched, "title": {"text": "iteration"}}
        layout[f"yaxis{number}"] = {**line, "title": {"text": title, "standoff": 8}}
        if title == "learning rate":
            layout[f"yaxis{number}"]["exponentformat"] = "e"
    choices = [
        what
        for what in ("iteration", "tokens", "hours of training")
        if any(value is not None for trace in traces for value in trace["x"][what])
    ]
    if len(choices) > 1:
        buttons = [
            {
                "label": what,
                "method": "update",
                "args": [
                    {"x": [trace["x"][what] for trace in traces]},
                    {f"xaxis{number}.title.text": what for number in axes.values()}
                    | {f"xaxis{number}.autorange": True for number in axes.values()},
                ],
            }
            for what in choices
        ]
        place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
        layout["updatemenus"] = [{"type": "buttons", "direction": "right", "buttons": buttons, **place}]
    return layout


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>{again}
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<style>
body {{ font: 15px sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }}
th, td {{ text-align: left; padding-right: 2em; vertical-align: top; overflow-wrap: anywhere }}
th {{ font-weight: normal; color: #555; white-space: nowrap }}
tr > th ~ th {{ color: #000; font-weight: bold }}
summary {{ margin-top: 0.6em; cursor: pointer }}
pre {{ font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head>
<body><h1>{title}</h1>
<table>
{rows}
</table>
{details}
{note}
<div id="curves"></div>
<noscript>The curves are drawn by a script; the picture beside this page has them too.</noscript>
<script>{library}</script>
<script>
const figure = {figure};
Plotly.newPlot("curves", figure.data, figure.layout, {{responsive: true, displaylogo: false}})
  .then(() => document.body.dataset.drawn = document.querySelectorAll("#curves .cartesianlayer .subplot").length);
</script>
</body></html>
"""
