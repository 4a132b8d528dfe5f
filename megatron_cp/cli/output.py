"""Output of a training run: all of it in a log beside its checkpoints, and what is shown while it runs."""

import re
import sys
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self

from megatron_cp import runlog

OURS = "[megatron-cp] "
VALIDATION = " loss at "
LAST_LINES = 30
_REFUSAL = re.compile(r"(?:\[rank\d+\]: )?(?:\[megatron-cp\]|megatron-cp:) (.+)")
_EXCEPTION = re.compile(r"(\[rank\d+\]: )?((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Iteration)(?:: .*)?)")
# what torchrun itself raises after a rank has failed, or when it is told to stop
_TORCHRUNS = ("ChildFailedError", "SignalException")
_KILLED = re.compile(r"\s*traceback : (Signal .+)")
RECENT_STEPS = 20


class Shown(Protocol):
    """The way in which a run is shown: lines of its output and of its errors, and its iterations, as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def line(self, raw: bytes) -> None: ...

    def error(self, raw: bytes) -> None: ...

    def step(self, step: runlog.Iteration) -> None: ...

    def stops(self) -> None: ...

    def failed(self) -> None: ...


class EveryLine:
    """Everything that the run prints, unchanged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, raw: bytes) -> None:
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()

    def error(self, raw: bytes) -> None:
        sys.stderr.buffer.write(raw)
        sys.stderr.buffer.flush()

    def step(self, step: runlog.Iteration) -> None:
        pass

    def stops(self) -> None:
        pass

    def failed(self) -> None:
        pass


class ProgressLine:
    """One line of progress on a terminal, below our own lines and validation losses; after a failure the last lines.

    name: of the run
    seq:  tokens of a sequence
    """

    def __init__(self, name: str, seq: int, console: Any = None) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._seq = seq
        self._recent: deque[runlog.Iteration] = deque(maxlen=RECENT_STEPS)
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._refusals: list[str] = []
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(12),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._progress.add_task(name, total=None, figures="starts")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, raw: bytes) -> None:
        text = raw.decode(errors="replace").rstrip()
        self._last.append(text)
        if (OURS in text and runlog.SUMMARY_MARK not in text) or VALIDATION in text:
            self._print(text)

    def error(self, raw: bytes) -> None:
        text = raw.decode(errors="replace").rstrip()
        self._last.append(text)
        self._refusals += [text] if OURS in text else []

    def step(self, step: runlog.Iteration) -> None:
        self._recent.append(step)
        self._progress.update(
            self._task, completed=step.number, total=step.of, figures=progress([*self._recent], self._seq)
        )

    def stops(self) -> None:
        self._progress.update(self._task, figures="interrupted, stops")

    def failed(self) -> None:
        for text in self._refusals or self._last:
            self._print(text)

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress(recent: Sequence[runlog.Iteration], seq: int) -> str:
    """Return the last iteration's number and loss, tokens per second of all ranks, and the time left."""
    step = recent[-1]
    figures = [f"step {step.number}/{step.of}"]
    if step.loss is not None:
        figures.append(f"loss {step.loss:.4f}")
    if pace := runlog.pace(recent, seq):
        left = timedelta(seconds=round((step.of - step.number) * pace.milliseconds / 1e3))
        figures += [f"{pace.tokens_per_second:,.0f} tokens/s", f"{left} left"]
    return "  ".join(figures)


class Reason:
    """The reason of a failure, from the errors of all ranks and torchrun as they come."""

    def __init__(self) -> None:
        self._refusal = ""
        self._raised: dict[str, str] = {}
        self._killed = ""

    def error(self, text: str) -> None:
        """Take a line of the errors, without its end."""
        if found := _REFUSAL.fullmatch(text):
            self._refusal = self._refusal or found[1]
        elif (found := _EXCEPTION.fullmatch(text)) and not found[2].partition(":")[0].endswith(_TORCHRUNS):
            # the last error of a rank follows those that it was raised from
            self._raised[found[1] or ""] = f"{found[1] or ''}{found[2]}"
        elif found := _KILLED.fullmatch(text):
            self._killed = self._killed or found[1]

    @property
    def text(self) -> str:
        """The first refusal, else the error of the rank that failed first, else a rank's signal; empty without any."""
        return self._refusal or next(iter(self._raised.values()), self._killed)


class Record:
    """The record of a run in its folder: everything that it prints, its iterations, and the trainer's summary."""

    def __init__(self, folder: Path, shown: Shown) -> None:
        self.log = folder / runlog.TEXT_NAME
        self.steps: list[runlog.Iteration] = []
        self.summary: dict[str, Any] = {}
        self.reason = Reason()
        self._iterations = folder / runlog.LOG_NAME
        self._shown = shown
        # unbuffered: two threads write whole lines, and a killed run leaves all that it printed
        self._file = self.log.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def note(self, text: str) -> None:
        """Write a line of our own that is not shown."""
        self._file.write(f"{OURS}{text}\n".encode())

    def stops(self) -> None:
        """Show that the run is being stopped."""
        self._shown.stops()

    def line(self, raw: bytes) -> None:
        """Take a line of the run's output."""
        self._file.write(raw)
        self._shown.line(raw)
        text = raw.decode(errors="replace")
        if step := runlog.read_iteration(text):
            self.steps.append(step)
            runlog.append(self._iterations, step)
            self._shown.step(step)
        self.summary |= runlog.read_summary(text) or {}

    def error(self, raw: bytes) -> None:
        """Take a line of the run's errors."""
        self._file.write(raw)
        self.reason.error(raw.decode(errors="replace").rstrip())
        self._shown.error(raw)
