"""Report on a finished run as one page, from our log, Megatron's own output, or TensorBoard's event files."""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from statistics import median
from typing import NamedTuple

from megatron_cp import runlog

TEXTS = ("*.log", "*.out")
EVENTS = "events.out.tfevents.*"
SECONDS = "iteration-time"
STEP_TIME = "elapsed time per iteration (ms)"
THROUGHPUT = "throughput per GPU (TFLOP/s/GPU)"
MEMORY = "memory (MB)"
SKIPPED, NAN = "number of skipped iterations", "number of nan iterations"
# TensorBoard's tags, with the log line's name for each and the factor between the two
TAGS = {
    "lm loss": ("lm loss", 1.0),
    "grad-norm": ("grad norm", 1.0),
    "batch-size": ("global batch size", 1.0),
    SECONDS: (STEP_TIME, 1e3),
    "throughput": (THROUGHPUT, 1.0),
    "mem-max-allocated-bytes": (MEMORY, 1 / 2**20),
}

_MEMORY = re.compile(r"^\[Rank \d+\] \(.*?\b(\d{1,18})(?: iterations)?\) memory \(MB\) .*?max allocated: ([\d.]+)")
_ARGUMENT = re.compile(r"^\s+(seq_length|world_size) \.+ (\d{1,18})\s*$")


Points = dict[int, float]


class TrainingRun(NamedTuple):
    """A run's iterations in order, with Megatron's names for their fields, and the arguments that it printed."""

    steps: list[runlog.Iteration]
    arguments: dict[str, int]
    sources: list[str]


class Reference(NamedTuple):
    """Expected figures to compare a run with; None where they are unknown.

    step_seconds:  predicted for a step
    flops:         the model's operations in a step, per rank, as Megatron counts them
    peak:          operations per second of a rank
    seq:           tokens of a sequence
    left_out:      flags that the prediction does not model
    """

    step_seconds: float | None = None
    flops: float | None = None
    peak: float | None = None
    seq: int | None = None
    left_out: tuple[str, ...] = ()


def read(folder: Path) -> TrainingRun:
    """Read all logs in a run's folder; the later record of a repeated iteration counts.

    Raises ValueError for a folder without any iteration, RuntimeError for event files alone without tensorboard.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; name the one that a run saved to or logged in")
    fields: dict[int, dict[str, float]] = {}
    arguments: dict[str, int] = {}
    sources = []
    texts = {path for pattern in TEXTS for path in folder.rglob(pattern) if path.is_file()}
    for name, found in (
        (EVENTS, _events(folder)),
        ("Megatron's log", _texts(sorted(texts, key=lambda path: (path.stat().st_mtime, path)), arguments)),
        (runlog.LOG_NAME, ((step.number, step.fields) for step in runlog.read(folder / runlog.LOG_NAME))),
    ):
        before = sum(map(len, fields.values()))
        for number, values in found:
            fields.setdefault(number, {}).update(values)
        sources += [name] if sum(map(len, fields.values())) > before else []
    if not fields:
        _nothing(folder)
    last = max(fields)
    return TrainingRun(
        [runlog.Iteration(number, last, fields[number]) for number in sorted(fields)], arguments, sources
    )


def _nothing(folder: Path) -> None:
    if any(folder.rglob(EVENTS)) and not has_tensorboard():
        raise RuntimeError(
            f"{folder} has TensorBoard's event files only, and the package tensorboard reads them; "
            "pip install 'megatron-cp[report]'"
        )
    raise ValueError(f"no iteration in {folder}; looked into {runlog.LOG_NAME}, {', '.join(TEXTS)} and {EVENTS}")


def has_tensorboard() -> bool:
    """True if event files can be read here."""
    return importlib.util.find_spec("tensorboard") is not None


def _texts(files: Iterable[Path], arguments: dict[str, int]) -> Iterator[tuple[int, dict[str, float]]]:
    fullest: Points = {}
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if step := runlog.read_iteration(line):
                    yield step.number, step.fields
                elif match := _MEMORY.search(line):
                    # each rank prints its own
                    number = int(match[1])
                    fullest[number] = max(fullest.get(number, 0.0), float(match[2]))
                    yield number, {MEMORY: fullest[number]}
                elif match := _ARGUMENT.match(line):
                    arguments[match[1]] = int(match[2])


def _events(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    files = sorted(folder.rglob(EVENTS))
    if not files or not has_tensorboard():
        return
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    for where in sorted({file.parent for file in files}):
        # 0 keeps all of them
        events = EventAccumulator(str(where), size_guidance={SCALARS: 0}).Reload()
        for tag in TAGS.keys() & set(events.Tags()[SCALARS]):
            name, factor = TAGS[tag]
            for event in events.Scalars(tag):
                yield event.step, {name: event.value * factor}


def curves(run: TrainingRun, against: Reference) -> dict[str, Points]:
    """Return the curves of the page by their labels, without empty ones."""
    seq = against.seq or run.arguments.get("seq_length")
    seconds = {number: time / 1e3 for number, time in _field(run, STEP_TIME).items()}
    samples = _field(run, "global batch size")
    rates = {number: samples[number] / seconds[number] for number in seconds if number in samples}
    rate = {"tokens/s": {number: value * seq for number, value in rates.items()}} if seq else {"samples/s": rates}
    found = {
        "loss": _field(run, "lm loss"),
        "gradient norm": _field(run, "grad norm"),
        "step time, s": seconds,
        **rate,
        **_operations(run, against, seconds),
        "memory, MB": _field(run, MEMORY),
    }
    return {label: points for label, points in found.items() if points}


def _operations(run: TrainingRun, against: Reference, seconds: Points) -> dict[str, Points]:
    logged = {number: value * 1e12 for number, value in _field(run, THROUGHPUT).items()}
    if not any(logged.values()):
        # Megatron prints one decimal, and nothing without --log-throughput
        logged = {number: against.flops / time for number, time in seconds.items()} if against.flops else {}
    if against.peak:
        return {"MFU": {number: value / against.peak for number, value in logged.items()}}
    return {"TFLOP/s per rank": {number: value / 1e12 for number, value in logged.items()}}


def _field(run: TrainingRun, name: str) -> Points:
    return {step.number: step.fields[name] for step in run.steps if name in step.fields}


def lost(run: TrainingRun) -> dict[str, list[int]]:
    """Return the iterations whose update was skipped, and those with a loss or gradient that is not finite."""
    no_number = {
        step.number
        for step in run.steps
        if step.fields.get(NAN) or not all(isfinite(step.fields.get(name, 0)) for name in ("lm loss", "grad norm"))
    }
    return {"skipped": [step.number for step in run.steps if step.fields.get(SKIPPED)], "NaN": sorted(no_number)}


def table(run: TrainingRun, drawn: Mapping[str, Points], against: Reference) -> dict[str, str]:
    """Return the page's table, with medians that leave out the first iteration because it includes the start."""
    rows = {"iterations": f"{len(run.steps)}, {run.steps[0].number} to {run.steps[-1].number}"}
    rows["read from"] = ", ".join(run.sources)
    for label, points in drawn.items():
        values = [points[number] for number in sorted(points)]
        if label == "loss":
            rows[label] = f"{values[0]:.4f} to {values[-1]:.4f}"
        elif label == "memory, MB":
            rows[label] = f"{max(values):,.0f} at most"
        else:
            rows[label] = f"{steady(points):.1%}" if label == "MFU" else f"{steady(points):,.5g}"
    if against.step_seconds is not None:
        rows["predicted step time, s"] = _predicted(against.step_seconds, drawn.get("step time, s"))
    if against.left_out:
        rows["not in the estimate"] = ", ".join(against.left_out)
    for what, numbers in lost(run).items():
        rows[f"{what} iterations"] = _listed(numbers)
    return rows


def steady(points: Points) -> float:
    """Return the median of all points but the first."""
    values = [points[number] for number in sorted(points)]
    return median(values[1:] or values)


def _predicted(seconds: float, measured: Points | None) -> str:
    if not measured:
        return f"{seconds:.5g}"
    return f"{seconds:.5g}, {seconds / steady(measured) - 1:+.1%} of the measured"


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"{len(numbers)}: {shown}{more}" if numbers else "none"


def page(title: str, rows: Mapping[str, str], picture: bytes) -> str:
    """Return one HTML file that contains the table and the picture (PNG)."""
    from base64 import b64encode
    from html import escape

    cells = "\n".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in rows.items())
    return _PAGE.format(title=escape(title), cells=cells, picture=b64encode(picture).decode())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em auto; max-width: 1100px }}
img {{ width: 100% }}
th {{ text-align: left; font-weight: normal; color: #555; padding-right: 2em }}
</style></head>
<body><h1>{title}</h1>
<table>
{cells}
</table>
<img alt="curves over the iterations" src="data:image/png;base64,{picture}">
</body></html>
"""
