"""State of a run between two steps, where they end without a flush."""

from pathlib import Path
from typing import Any

from megatron_cp.megatron.pipeline import earlier_weights
from megatron_cp.megatron.pipeline.versions import versions_of
from megatron_cp.megatron.run import Settings, say
from megatron_cp.pipeline.execute import Carried, Executor
from megatron_cp.pipeline.schedules.pipedream import Delay, StepOfRun


class WithoutFlush:
    """The steps of one run on one rank.

    versions: of the rank's weights
    carried:  forwards in flight, and messages on the way
    """

    def __init__(self, delay: Delay, rank: int, model: list[Any], micros: int, settings: Settings) -> None:
        self._ahead, self._micros, self._settings = max(delay.ahead), micros, settings
        self.done = settings.steps.start if settings.steps else 0
        self.versions = versions_of(model, delay.behind[rank], self.done)
        self.carried = Carried()
        self._first = True
        if settings.pipeline.free_running:
            say(
                "ranks run freely: they wait for each other only where the run logs (now every "
                f"{settings.log_interval} steps), evaluates or saves, and each time fill the pipeline again"
            )
        (chunk,) = model
        if self.done and settings.load:
            self._resume(chunk, settings.load)
        earlier_weights.save_too(chunk, self.versions)

    def _resume(self, chunk: Any, folder: str) -> None:
        saved = Path(folder) / f"iter_{self.done:07d}"
        if (saved / "metadata.json").is_file() and earlier_weights.load(chunk, self.versions, saved):
            say(f"earlier weights from {saved}")
        else:
            say(f"{folder} has no earlier weights: the first batches run on those of iteration {self.done}")

    def begin(self, micros: int) -> StepOfRun:
        """Return which step of the run begins."""
        assert micros == self._micros, "a forward ahead is of a batch of as many microbatches"
        self.versions.after_update()
        left = None if self._settings.steps is None else max(1, self._settings.steps.stop - self.done)
        # the last steps differ from those in the middle only where batches run out
        near = left is not None and (left - 1) * micros < self._ahead
        return StepOfRun(self._first, left if near else None)

    def show(self, micro: int) -> None:
        """Let the parameters have the values that a microbatch of the step runs with."""
        self.versions.show(self.versions.of_batch(self.done + micro // self._micros))

    def end(self, executor: Executor) -> None:
        """Take over what the step leaves, and make room for the update."""
        self.carried = executor.leave(self._micros)
        self.versions.before_update()
        self.done += 1
        self._first = False
