"""Keep a log of a run's iterations beside its checkpoints, so that it continues when the run is resumed."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

LOG_NAME = "iterations.jsonl"
TEXT_NAME = "megatron.log"
STARTS_NAME = "starts.jsonl"
EXPERTS_NAME = "experts.jsonl"
SUMMARY_MARK = "[megatron-cp] summary "

DROPPED = "choices of experts dropped (%)"
"""Field of Megatron's log lines: of all layers and ranks, since the line before."""

_ITERATION = re.compile(r"\biteration\s+(\d{1,18})\s*/\s*(\d{1,18})\s*\|")
_EVALUATION = re.compile(r"\bvalidation(-\S+)? loss at iteration (\d{1,18})(?: on (\w+) set)? \|(.*)")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)")


class Iteration(NamedTuple):
    """One of Megatron's iteration lines; `fields` are its other numbers under Megatron's own names."""

    number: int
    of: int
    fields: dict[str, float]

    @property
    def loss(self) -> float | None:
        return self.fields.get("lm loss")


class Pace(NamedTuple):
    """Median speed of a run, without its first iteration, which includes the start."""

    milliseconds: float
    tokens_per_second: float


def read_iteration(line: str) -> Iteration | None:
    """Return the iteration that a line of Megatron's log reports, None for any other line."""
    match = _ITERATION.search(line)
    if match is None:
        return None
    return Iteration(int(match[1]), int(match[2]), _fields(line[match.end() :]))


def _fields(text: str) -> dict[str, float]:
    fields = {}
    for part in text.split("|"):
        name, colon, value = part.rpartition(":")
        if colon and _NUMBER.fullmatch(value.strip()):
            fields[name.strip()] = float(value)
    return fields


def read_evaluation(line: str) -> tuple[int, dict[str, float]] | None:
    """Return the iteration and the loss that a line of Megatron's evaluation reports, None for any other line.

    The loss is named `validation loss`, with a set's own name `validation-NAME loss`; of the test set, `test loss`.
    """
    match = _EVALUATION.search(line)
    if match is None:
        return None
    value = _fields(match[4]).get("lm loss value")
    name = f"{'test' if match[3] == 'test' else 'validation'}{match[1] or ''} loss"
    return None if value is None else (int(match[2]), {name: value})


def read_summary(line: str) -> dict[str, Any] | None:
    """Return the trainer's summary from its last line, None for any other line."""
    _, mark, text = line.partition(SUMMARY_MARK)
    if not mark:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def append(log: Path, iteration: Iteration) -> None:
    """Add one iteration to the log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"iteration": iteration.number, "of": iteration.of, **iteration.fields}) + "\n")


def read(log: Path) -> list[Iteration]:
    """Return the run's iterations in order; the last record counts of iterations that a resumed run repeated."""
    if not log.is_file():
        return []
    latest: dict[int, Iteration] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if step := _logged(line):
            latest[step.number] = step
    return [latest[number] for number in sorted(latest)]


def note_start(folder: Path, facts: Mapping[str, str]) -> None:
    """Add what starts now to the list of a run's starts in its folder."""
    with (folder / STARTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(facts)) + "\n")


def starts(folder: Path) -> list[dict[str, str]]:
    """Return what was noted of every start of a run, in order; lines that are none are left out."""
    file = folder / STARTS_NAME
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(facts, dict):
            found.append({name: str(value) for name, value in facts.items()})
    return found


class ExpertChoices(NamedTuple):
    """Choices of experts in a layer, of all ranks, since the record before.

    made:     by all tokens, as many of each as --moe-router-topk
    tokens:   of each expert that it has got
    dropless: no expert has a capacity
    """

    made: int
    tokens: list[int]
    dropless: bool

    @property
    def dropped(self) -> int:
        return self.made - sum(self.tokens)


def note_experts(folder: Path, iteration: int, layers: Mapping[str, ExpertChoices]) -> None:
    """Add the choices of each layer of experts, by its name, to the log in a run's folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EXPERTS_NAME).open("a", encoding="utf-8") as file:
        for name, layer in layers.items():
            file.write(json.dumps({"iteration": iteration, "layer": name, **layer._asdict()}) + "\n")


def experts(folder: Path) -> dict[str, dict[int, ExpertChoices]]:
    """Return what was noted of each layer of experts by iteration, the last record of each."""
    file = folder / EXPERTS_NAME
    if not file.is_file():
        return {}
    found: dict[str, dict[int, ExpertChoices]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if noted := _noted(line):
            layer, number, choices = noted
            found.setdefault(layer, {})[number] = choices
    return found


def _noted(line: str) -> tuple[str, int, ExpertChoices] | None:
    """Read one line of the choices of experts, as `_logged` does: layer, iteration and what was chosen."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("layer")) is not str or type(record.get("dropless")) is not bool:
        return None
    number, made, tokens = (record.get(name) for name in ("iteration", "made", "tokens"))
    if type(number) is not int or type(made) is not int or not isinstance(tokens, list) or made < 1:
        return None
    if not all(type(count) is int and count >= 0 for count in tokens):
        return None
    return record["layer"], number, ExpertChoices(made, tokens, record["dropless"])


def _logged(line: str) -> Iteration | None:
    """Read one line of the log; a run that was killed while it wrote leaves half a line, a disk worse."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not all(type(fields.get(name)) is int for name in ("iteration", "of")):
        return None
    numbers = {name: value for name, value in fields.items() if type(value) in (int, float)}
    return Iteration(numbers.pop("iteration"), numbers.pop("of"), numbers)


def pace(iterations: Sequence[Iteration], tokens_per_sequence: int) -> Pace | None:
    """Return the median step time and tokens per second of all ranks together; None without a timed step."""
    steady: Iterable[Iteration] = iterations[1:] or iterations
    steps = [
        (step.fields["elapsed time per iteration (ms)"], step.fields["global batch size"] * tokens_per_sequence)
        for step in steady
        if {"elapsed time per iteration (ms)", "global batch size"} <= set(step.fields)
    ]
    if not steps:
        return None
    return Pace(median(time for time, _ in steps), median(1e3 * tokens / time for time, tokens in steps))


def checkpoint_iteration(folder: Path) -> int | None:
    """Return the iteration of the newest checkpoint in a --save folder, by its tracker file; None without one."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None
