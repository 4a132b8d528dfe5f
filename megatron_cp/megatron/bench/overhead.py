"""Compare the executor, with v modules on one rank, with Megatron's loop without a pipeline."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.pipeline import ActionRecorder, GptSize, TimedAction
from megatron_cp.megatron.bench.model import VOCABULARY, config_of, pipeline_of
from megatron_cp.pipeline.action import FORWARD, FULL, Action
from megatron_cp.pipeline.channels import Channels
from megatron_cp.pipeline.execute import Executor, Observe
from megatron_cp.pipeline.placement import Placement


class Overhead(NamedTuple):
    """Medians in milliseconds.

    forward, backward: of one action
    ours, baseline:    of a step of the executor, and of Megatron's loop
    ratios:            of each pair of steps, the executor's over Megatron's
    core_share:        share of its core that this process got while it computed
    """

    v: int
    micros: int
    forward: float
    backward: float
    ours: float
    baseline: float
    ratios: list[float]
    core_share: float

    @property
    def overhead(self) -> float:
        return median(self.ratios) - 1


class Modules:
    """Consecutive modules as the stages of an executor; the last one's output is the loss."""

    def __init__(self, modules: Sequence[Any], batches: Tensor) -> None:
        self._modules, self._batches = modules, batches
        self.losses: list[float] = []

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        self._modules[stage].set_input_tensor(given)
        output = _call(self._modules[stage], self._batches[micro])
        if stage < len(self._modules) - 1:
            return output
        loss = output.mean()
        self.losses.append(float(loss))
        return loss / len(self._batches)

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        torch.autograd.backward(made, gradient)
        return None if given is None else given.grad

    def weight(self, stage: int, micro: int) -> None:
        raise NotImplementedError("the table has whole backwards only")

    def reduce(self, stage: int) -> None: ...

    def buffer(self, micro: int) -> Tensor:
        raise NotImplementedError("one rank receives nothing")

    def shrink(self, made: Tensor) -> None: ...


class Chain(MegatronModule):
    """Consecutive modules as one model."""

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__(modules[0].config)
        self.model_type = ModelType.encoder_or_decoder
        self.chain = torch.nn.ModuleList(modules)

    def set_input_tensor(self, tensor: Tensor | None) -> None: ...

    def forward(self, batch: Tensor) -> Tensor:
        output, chain = None, cast(list[Any], self.chain)
        for module in chain:
            module.set_input_tensor(output)
            output = _call(module, batch)
        assert output is not None
        return output


def _call(module: Any, batch: Tensor) -> Tensor:
    tokens = batch[None]
    positions = torch.arange(len(batch) - 1, device=batch.device)[None]
    output: Tensor = module(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    return output


def measure(device: torch.device, v: int, m: int, hidden: int, seq: int, rounds: int) -> Overhead:
    """Measure one layer per module, fp32; raises WrongResultError when losses or gradients are not Megatron's bits."""
    with pipeline_of(1):
        config = config_of(GptSize(1, 1, hidden, seq), 1)
        spec = get_gpt_layer_local_spec()
        modules = [
            GPTModel(config, spec, VOCABULARY, seq, pre_process=stage == 0, post_process=stage == v - 1).to(device)
            for stage in range(v)
        ]
        batches = torch.randint(VOCABULARY, (m, seq + 1), generator=torch.Generator().manual_seed(0)).to(device)
        chain, recorder = Chain(modules), ActionRecorder(torch.cuda.synchronize)
        baseline, ours = _baseline(chain, batches), _executor(modules, batches)
        _check(chain, baseline, _executor(modules, batches, recorder.observe))
        actions = recorder.take()
        # in turns, the other way round every other time
        pairs = [
            [_timed_step(chain, step) for step in ((ours, baseline) if turn % 2 else (baseline, ours))][
                :: 1 if turn % 2 else -1
            ]
            for turn in range(rounds)
        ]
    mine, theirs = ([step.seconds for step in column] for column in zip(*pairs, strict=True))
    return Overhead(
        v=v,
        micros=m,
        forward=_median(actions, FORWARD),
        backward=_median(actions, FULL),
        ours=1e3 * median(mine),
        baseline=1e3 * median(theirs),
        ratios=[one / other for one, other in zip(mine, theirs, strict=True)],
        core_share=median(step.core_share for pair in pairs for step in pair),
    )


def _baseline(chain: Chain, batches: Tensor) -> Callable[[], list[float]]:
    def forward_step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        return model(next(iterator)), lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    def step() -> list[float]:
        losses = schedules.forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=chain,
            num_microbatches=len(batches),
            seq_length=batches.shape[1] - 1,
            micro_batch_size=1,
        )
        return [float(part["loss"]) for part in losses]

    return step


def _executor(
    modules: Sequence[Any], batches: Tensor, observe: Observe = lambda _: nullcontext()
) -> Callable[[], list[float]]:
    v, placement = len(modules), Placement("one rank", (0,) * len(modules))
    table = [
        action
        for micro in range(len(batches))
        for action in (
            *(Action(stage, FORWARD, micro) for stage in range(v)),
            *(Action(stage, FULL, micro) for stage in reversed(range(v))),
        )
    ]

    def step() -> list[float]:
        stages = Modules(modules, batches)
        Executor(placement, 0, stages, Channels(placement, 0, []), observe=observe).run(table)
        return stages.losses

    return step


def _check(chain: Chain, baseline: Callable[[], list[float]], ours: Callable[[], list[float]]) -> None:
    found = []
    for step in (baseline, ours):
        chain.zero_grad()
        losses = step()
        found.append((losses, [weight.grad.clone() for weight in chain.parameters() if weight.grad is not None]))
    (losses, gradients), (our_losses, our_gradients) = found
    if losses != our_losses or not all(map(torch.equal, gradients, our_gradients)):
        raise WrongResultError("losses or gradients of the executor differ from those of Megatron's loop")


class _Step(NamedTuple):
    seconds: float
    core_share: float


def _timed_step(chain: Chain, step: Callable[[], list[float]]) -> _Step:
    chain.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    wall, core = time.perf_counter(), time.process_time()
    step()
    torch.cuda.synchronize()
    wall, core = time.perf_counter() - wall, time.process_time() - core
    return _Step(wall, core / wall)


def _median(line: Sequence[TimedAction], kind: str) -> float:
    return median(timed.end - timed.start for timed in line if timed.action.kind == kind)
