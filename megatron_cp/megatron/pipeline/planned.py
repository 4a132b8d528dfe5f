"""Run training steps whose microbatches a plan makes, in the place of those that Megatron counts.

The data iterator of such a run gives one step at a time. All ranks compare their steps first; after that no rank waits
for another that runs something else.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_cp.comm import Fabric, GroupFabric, texts_of_all, values_of_all, word_of
from megatron_cp.errors import Refused

TEXT = 512
"""Bytes in which a rank describes its step, once the ranks know that their steps differ."""


class PlannedStep(Protocol):
    """A step as the data iterator of every model chunk gives it.

    text:      equal on two ranks if and only if they run the same step
    refusal:   one line where this rank cannot plan the step
    tokens_of: this rank's tokens of each microbatch, as they pass between pipeline stages
    """

    text: str
    refusal: str

    @property
    def tokens_of(self) -> Sequence[int]: ...

    def microbatches(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's part of each microbatch."""
        ...


@dataclass(frozen=True)
class PlannedRun:
    """A forward-backward function for Megatron that takes the microbatches of every step from its plan.

    run:      Megatron's function, or a pipeline of ours
    pipeline: True if `run` is ours, and takes microbatches of several lengths
    """

    run: Callable[..., list[Any]]
    pipeline: bool

    def __call__(self, *, data_iterator: Any, num_microbatches: int, **rest: Any) -> list[Any]:
        """Run the next step, or with `forward_only` the next batch of an evaluation.

        Raises ValueError on every rank, before any other communication, where a rank has no plan or another one.
        """
        feeds = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        chunks: list[PlannedStep] = [next(feed) for feed in feeds]
        step = chunks[0]
        everyone = torch.distributed.group.WORLD
        assert everyone, "Megatron has made the groups"
        compare(step, GroupFabric(everyone), torch.device(torch.cuda.current_device()))
        if self.pipeline:
            rest["tokens_of"] = step.tokens_of
        parts = [chunk.microbatches() for chunk in chunks]
        data = parts if isinstance(data_iterator, list) else parts[0]
        return self.run(data_iterator=data, num_microbatches=len(step.tokens_of), **rest)


def compare(step: PlannedStep, fabric: Fabric, device: torch.device) -> None:
    """Raise ValueError on every rank where ranks would run different steps, or one has no plan."""
    words = values_of_all(fabric, device, [word_of(step.refusal or step.text), bool(step.refusal)])
    if len(set(words)) == 1:
        if step.refusal:
            raise Refused(step.refusal)
        return
    texts = texts_of_all(fabric, device, step.refusal or step.text, TEXT)
    kind = "cannot be planned" if any(refused for _, refused in words) else "differs between ranks"
    said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
    raise Refused(
        f"the step {kind}: {said}; give all ranks the same corpus, the same flags and the same --cp-cluster file"
    )
