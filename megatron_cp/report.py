"""Read what a run left behind: our logs, Megatron's own output, TensorBoard's event files; curves and a table of it."""

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite
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
SAMPLES = "consumed samples"
# what --save-tokens-per-expert-interval writes, beside the checkpoints
EXPERT_FILES = "tokens_per_expert/rank*.jsonl"
RANK_FILE = re.compile(r"rank(\d{1,9})\.jsonl")
LOSS, MFU, STEP = "loss, nats per token", "MFU, %", "step time, s"
BUSIEST = "busiest expert, times the mean"
DROPPED = "choices of experts dropped, %"
# quantities whose first values may set the scale
FREE = (LOSS, "gradient norm", "learning rate")
MOST_SAID = 40
SKIPPED, NAN = "number of skipped iterations", "number of nan iterations"
# TensorBoard's tags, with the log line's name for each and the factor between the two
TAGS = {
    "lm loss": ("lm loss", 1.0),
    "lm loss validation": ("validation loss", 1.0),
    "learning-rate": ("learning rate", 1.0),
    "grad-norm": ("grad norm", 1.0),
    "batch-size": ("global batch size", 1.0),
    SECONDS: (STEP_TIME, 1e3),
    "throughput": (THROUGHPUT, 1.0),
    "mem-max-allocated-bytes": (MEMORY, 1 / 2**20),
}

_MEMORY = re.compile(r"^\[Rank \d+\] \(.*?\b(\d{1,18})(?: iterations)?\) memory \(MB\) .*?max allocated: ([\d.]+)")
_ARGUMENT = re.compile(r"^\s+(\w+) \.+ (.*\S)\s*$")
_SAID = re.compile(r"^\[megatron-cp\] (?!summary )(.*\S)")


Points = dict[int, float]


class NoIteration(ValueError):
    """A folder without any iteration in its logs."""


class TrainingRun(NamedTuple):
    """A run's iterations in order, with Megatron's names for their fields, and what it said of itself.

    arguments: those that Megatron printed
    sources:   kinds of files that were read
    facts:     of its last start, from `megatron-cp train`
    said:      lines of megatron-cp in the logs
    experts:   per layer and iteration, the tokens of each expert
    choices:   per layer and iteration, what tokens chose and what of it experts got
    planned:   iterations of the whole run; None where no log says
    """

    steps: list[runlog.Iteration]
    arguments: dict[str, str]
    sources: list[str]
    facts: dict[str, str]
    said: list[str]
    experts: dict[str, dict[int, list[int]]]
    choices: dict[str, dict[int, runlog.ExpertChoices]]
    planned: int | None

    @property
    def done(self) -> bool:
        """True if no iteration is to come."""
        return self.planned is not None and self.steps[-1].number >= self.planned

    def number(self, argument: str) -> int | None:
        """Return a whole number that Megatron printed; None without it."""
        text = self.arguments.get(argument, "")
        return int(text) if re.fullmatch(r"\d{1,18}", text) else None


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
    arguments: dict[str, str] = {}
    said: dict[str, None] = {}
    sources = []
    ours = runlog.read(folder / runlog.LOG_NAME)
    texts = {path for pattern in TEXTS for path in folder.rglob(pattern) if path.is_file()}
    for name, found in (
        (EVENTS, _events(folder)),
        ("Megatron's log", _texts(sorted(texts, key=lambda path: (path.stat().st_mtime, path)), arguments, said)),
        (runlog.LOG_NAME, ((step.number, step.fields) for step in ours)),
    ):
        before = sum(map(len, fields.values()))
        for number, values in found:
            fields.setdefault(number, {}).update(values)
        sources += [name] if sum(map(len, fields.values())) > before else []
    if not fields:
        _nothing(folder)
    last = max(fields)
    starts, choices = runlog.starts(folder), runlog.experts(folder)
    planned = arguments.get("train_iters", "")
    return TrainingRun(
        steps=[runlog.Iteration(number, last, fields[number]) for number in sorted(fields)],
        arguments=arguments,
        sources=sources,
        facts=starts[-1] if starts else {},
        said=list(said)[:MOST_SAID],
        # Megatron numbers layers from the first of their rank
        experts={layer: {number: one.tokens for number, one in numbers.items()} for layer, numbers in choices.items()}
        or _experts(folder),
        choices=choices,
        planned=ours[-1].of if ours else int(planned) if planned.isdecimal() else None,
    )


def _nothing(folder: Path) -> None:
    if any(folder.rglob(EVENTS)) and not has_tensorboard():
        raise RuntimeError(
            f"{folder} has TensorBoard's event files only, and the package tensorboard reads them; "
            "pip install 'megatron-cp[report]'"
        )
    raise NoIteration(f"no iteration in {folder}; looked into {runlog.LOG_NAME}, {', '.join(TEXTS)} and {EVENTS}")


def has_tensorboard() -> bool:
    """True if event files can be read here."""
    return importlib.util.find_spec("tensorboard") is not None


def _texts(
    files: Iterable[Path], arguments: dict[str, str], said: dict[str, None]
) -> Iterator[tuple[int, dict[str, float]]]:
    fullest: Points = {}
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if step := runlog.read_iteration(line):
                    arguments["train_iters"] = str(step.of)
                    yield step.number, step.fields
                elif evaluated := runlog.read_evaluation(line):
                    yield evaluated
                elif match := _MEMORY.search(line):
                    # each rank prints its own
                    number = int(match[1])
                    fullest[number] = max(fullest.get(number, 0.0), float(match[2]))
                    yield number, {MEMORY: fullest[number]}
                elif match := _ARGUMENT.match(line):
                    arguments[match[1]] = match[2]
                elif match := _SAID.match(line):
                    said[match[1]] = None


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


class _Counted(NamedTuple):
    """Tokens of a rank's experts in an iteration of a layer."""

    rank: int
    layer: str
    iteration: int
    tokens: list[int]


def _counted(folder: Path) -> Iterator[_Counted]:
    """Yield what Megatron wrote of experts, rank by rank, each of which has a file of its own."""
    named = ((RANK_FILE.fullmatch(file.name), file) for file in folder.rglob(EXPERT_FILES))
    for rank, file in sorted((int(found[1]), file) for found, file in named if found):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    found = json.loads(line)
                    micros = [[int(count) for count in micro] for micro in found["tpe"]]
                    layer, number = f"{found['block']} layer {found['layer']}", int(found["iter"])
                except (ValueError, TypeError, KeyError, RecursionError):
                    # the last line may be half written
                    continue
                yield _Counted(rank, layer, number, [sum(counts) for counts in zip(*micros, strict=False)])


def _experts(folder: Path) -> dict[str, dict[int, list[int]]]:
    """Return the tokens of each rank's experts per layer and iteration, from the files that Megatron wrote."""
    layers: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for one in _counted(folder):
        layers[one.layer][one.iteration] += one.tokens
    return {layer: dict(numbers) for layer, numbers in layers.items()}


def expert_loads(folder: Path, ranks: int, neighbours: int = 1) -> dict[str, list[int]]:
    """Return the tokens of each expert of each layer when they were last logged, or when all ranks last wrote them.

    ranks:      that share the experts of a layer, of expert parallelism
    neighbours: that share each of them, of expert tensor parallelism
    Raises ValueError for a folder where no layer has such an iteration.
    """
    if noted := runlog.experts(folder):
        return {layer: numbers[max(numbers)].tokens for layer, numbers in noted.items()}
    layers: dict[str, dict[int, dict[int, list[int]]]] = defaultdict(lambda: defaultdict(dict))
    for one in _counted(folder):
        of_ranks, place = layers[one.layer][one.iteration], one.rank // neighbours % ranks
        before = of_ranks.get(place, [0] * len(one.tokens))
        of_ranks[place] = [first + second for first, second in zip(before, one.tokens, strict=False)]
    found = {}
    for layer, numbers in layers.items():
        if whole := [number for number, of_ranks in numbers.items() if len(of_ranks) == ranks]:
            last = numbers[max(whole)]
            found[layer] = [count for place in range(ranks) for count in last[place]]
    if not found:
        raise ValueError(
            f"{folder} has no load of experts that {ranks} ranks wrote; train with our layers and --save, or name "
            "another number of ranks"
        )
    return found


def curves(run: TrainingRun, against: Reference) -> dict[str, Points]:
    """Return the curves of the page by their labels, without empty ones."""
    seq = against.seq or run.number("seq_length")
    seconds = {number: time / 1e3 for number, time in _field(run, STEP_TIME).items()}
    samples = _field(run, "global batch size")
    rates = {number: samples[number] / seconds[number] for number in seconds if number in samples}
    rate = {"tokens/s": {number: value * seq for number, value in rates.items()}} if seq else {"samples/s": rates}
    names = dict.fromkeys(name for step in run.steps for name in step.fields if name.lower().endswith("loss"))
    evaluated = [name for name in names if name.startswith(("validation", "test"))]
    found = {
        LOSS: _field(run, "lm loss"),
        **{name.removesuffix("loss") + LOSS: _field(run, name) for name in evaluated},
        "learning rate": _field(run, "learning rate"),
        "gradient norm": _field(run, "grad norm"),
        STEP: seconds,
        **rate,
        **_operations(run, against, seconds),
        "memory, MB": _field(run, MEMORY),
        **{name: _field(run, name) for name in names if name not in ("lm loss", *evaluated)},
        **{f"{layer}: {BUSIEST}": _busiest(numbers) for layer, numbers in run.experts.items()},
        f"all layers: {DROPPED}": _field(run, runlog.DROPPED),
        **{f"{layer}: {DROPPED}": _dropped(numbers) for layer, numbers in run.choices.items()},
    }
    return {label: points for label, points in found.items() if points}


def panel_of(label: str) -> str:
    """Return the title of the panel that a curve is drawn in."""
    return next((title for title in (LOSS, BUSIEST, DROPPED) if label.endswith(title)), label)


def panels(labels: Iterable[str]) -> dict[str, list[str]]:
    """Return the curves of each panel."""
    found: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        found[panel_of(label)].append(label)
    return dict(found)


def top_of(panel: str, curves: Iterable[Points]) -> float | None:
    """Return where the axis of a panel ends that begins at 0; None where it has all values."""
    # the first iterations include the start and must not set the scale
    tops = [max(1.5 * steady(points), *[points[number] for number in sorted(points)][2:] or [0.0]) for points in curves]
    highest = max(tops, default=0.0)
    return highest if panel not in FREE and 0 < highest < inf else None


def _busiest(numbers: Mapping[int, Sequence[int]]) -> Points:
    return {number: max(counts) * len(counts) / sum(counts) for number, counts in numbers.items() if sum(counts)}


def _dropped(numbers: Mapping[int, runlog.ExpertChoices]) -> Points:
    return {number: 100 * one.dropped / one.made for number, one in numbers.items() if not one.dropless}


def tokens_at(run: TrainingRun, against: Reference) -> Points:
    """Return the tokens that the run had seen at each iteration; empty where no log says."""
    seq = against.seq or run.number("seq_length")
    return {number: samples * seq for number, samples in _field(run, SAMPLES).items()} if seq else {}


def hours_at(run: TrainingRun) -> Points:
    """Return the hours of training up to each iteration, by its step times."""
    times = _field(run, STEP_TIME)
    # a line is the mean since the one before it
    since = [
        (number - before) * times[number] / 3.6e6 for before, number in pairwise([min(times, default=1) - 1, *times])
    ]
    return dict(zip(times, accumulate(since), strict=True))


def _operations(run: TrainingRun, against: Reference, seconds: Points) -> dict[str, Points]:
    logged = {number: value * 1e12 for number, value in _field(run, THROUGHPUT).items()}
    if not any(logged.values()):
        # Megatron prints one decimal, and nothing without --log-throughput
        logged = {number: against.flops / time for number, time in seconds.items()} if against.flops else {}
    if against.peak:
        return {MFU: {number: 100 * value / against.peak for number, value in logged.items()}}
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
    of = f" of {run.planned}" if run.planned else ""
    rows = {"iterations": f"{len(run.steps)}{of} ({run.steps[0].number} to {run.steps[-1].number})"}
    if tokens := tokens_at(run, against):
        rows["tokens seen"] = f"{max(tokens.values()):,.0f}"
    rows["read from"] = ", ".join(run.sources)
    rows |= {label: _summed_up(label, points) for label, points in drawn.items()}
    if any(one.dropless for numbers in run.choices.values() for one in numbers.values()):
        rows[DROPPED] = "0, dropless: no expert has a capacity"
    if against.step_seconds is not None:
        rows["predicted step time, s"] = _predicted(against.step_seconds, drawn.get(STEP))
    if against.left_out:
        rows["not in the estimate"] = ", ".join(against.left_out)
    for what, numbers in lost(run).items():
        rows[f"{what} iterations"] = _listed(numbers)
    return rows


def _summed_up(label: str, points: Points) -> str:
    values = [points[number] for number in sorted(points)]
    if panel_of(label) == LOSS:
        return " to ".join(f"{value:.4f}" for value in dict.fromkeys((values[0], values[-1])))
    if label == "learning rate":
        return f"{max(values):.3g} at most, {values[-1]:.3g} at the end"
    if label == "memory, MB":
        return f"{max(values):,.0f} at most"
    return f"{steady(points):.1f}" if label == MFU else f"{steady(points):,.5g}"


def about(run: TrainingRun) -> dict[str, str]:
    """Return how the run was started: recipe, command, versions, host, sizes, where the logs have them."""
    sizes = {
        short: run.number(f"{long}_parallel_size")
        for short, long in (
            ("TP", "tensor_model"),
            ("PP", "pipeline_model"),
            ("CP", "context"),
            ("EP", "expert_model"),
            ("DP", "data"),
        )
    }
    shown = ", ".join(f"{short} {size}" for short, size in sizes.items() if size is not None)
    batch = [run.arguments.get(name) for name in ("global_batch_size", "micro_batch_size", "seq_length")]
    rows = dict(run.facts)
    if shown:
        rows["processes"] = f"{run.arguments.get('world_size', '?')}: {shown}"
    if all(batch):
        rows["batch"] = f"{batch[0]} sequences, {batch[1]} in a microbatch, of {batch[2]} tokens"
    return rows


def steady(points: Points) -> float:
    """Return the median of all points but the first."""
    values = [points[number] for number in sorted(points)]
    return median(values[1:] or values)


def _predicted(seconds: float, measured: Points | None) -> str:
    if not measured:
        return f"{seconds:.5g}"
    apart = seconds / steady(measured) - 1
    return f"{seconds:.5g}, {abs(apart):.1%} {'below' if apart < 0 else 'above'} the measured"


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"{len(numbers)}: {shown}{more}" if numbers else "none"
