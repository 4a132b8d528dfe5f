"""Run a schedule: one loop over one rank's lowered actions, whatever rule they come from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from megatron_cp.comm import Transfer
from megatron_cp.pipeline.action import (
    EVICT,
    FORWARD,
    FULL,
    GIVE,
    HOLD,
    INPUT,
    LOAD,
    LOGITS,
    LOGITS_BACK,
    RECV_B,
    RECV_F,
    REDUCE,
    SEND_B,
    SEND_F,
    SHARE,
    SHARE_E,
    SUM_E,
    SUM_S,
    SUM_T,
    WEIGHT,
    Action,
    Cell,
    Overlap,
    forward,
    halves,
)
from megatron_cp.pipeline.channels import Channels
from megatron_cp.pipeline.passes import add_reductions, add_transfers, merge
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.receive_early import receive_early
from megatron_cp.pipeline.saved import SavedActivations
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.schedules.order import in_groups
from megatron_cp.pipeline.vocabulary_embedding import VocabularyEmbedding
from megatron_cp.pipeline.vocabulary_head import VocabularyHead
from megatron_cp.pipeline.vocabulary_order import evaluated
from megatron_cp.pipeline.vocabulary_sums import add_sums

StageMicro = tuple[int, int]


class Stages(Protocol):
    """The computation of this rank's stages. `given` and `made` are a stage's input and output for one microbatch."""

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        """Return the stage's output for a microbatch."""
        ...

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        """Return the gradient of `given`; with `split` weight gradients wait for `weight`."""
        ...

    def weight(self, stage: int, micro: int) -> None:
        """Compute the weight gradients that `backward` with `split` left."""
        ...

    def reduce(self, stage: int) -> None:
        """Start the reduction of the stage's gradients, to which every microbatch has been added."""
        ...

    def buffer(self, micro: int) -> Tensor:
        """Return an empty tensor for a microbatch's activation, or its gradient, that passes between stages."""
        ...

    def shrink(self, made: Tensor) -> None:
        """Free the values of an output that the next stage has; its graph stays."""
        ...


class ForwardOf(NamedTuple):
    """The arguments of `Stages.forward`."""

    stage: int
    micro: int
    given: Tensor | None


class BackwardOf(NamedTuple):
    """The arguments of `Stages.backward`."""

    stage: int
    micro: int
    given: Tensor | None
    made: Tensor
    gradient: Tensor | None
    split: bool


@runtime_checkable
class Overlapping(Protocol):
    """Stages that run the two halves of an overlap at the same time."""

    def overlap(self, forward: ForwardOf, backward: BackwardOf) -> tuple[Tensor, Tensor | None]:
        """Return the output of a forward, and the gradient of what the backward of another stage was given."""
        ...


Observe = Callable[[Action], AbstractContextManager[object]]


def lower(schedule: Schedule) -> Schedule:
    """Return the compute table as an executor runs it: adjacent I and W merged, reductions and transfers added."""
    return complete(merge(schedule))


def complete(schedule: Schedule) -> Schedule:
    """Return the compute table with reductions and transfers, and receives posted early."""
    return receive_early(add_transfers(add_sums(add_reductions(schedule))))


def forward_only(placement: Placement, m: int, barriers: int = 0) -> Schedule:
    """Return the lowered table of an evaluation: forwards in groups of p microbatches through a rank's stages.

    With several pipes they go in order of the stages they have behind them and their place in their pipe.
    barriers: of an LM head over all ranks, whose S then follow the forwards
    """
    p = placement.ranks
    if placement.pipes > 1:
        return receive_early(add_transfers(_forward_both_ways(placement, m)))
    table = tuple(tuple(in_groups(stages, m, p, split=False)[0]) for stages in placement.of_rank)
    schedule = Schedule("forward only", placement, m, table)
    return receive_early(add_transfers(add_sums(evaluated(schedule) if barriers else schedule)))


def _forward_both_ways(placement: Placement, m: int) -> Schedule:
    empty = Schedule("forward only", placement, m, ())

    def step(action: Action) -> int:
        # one more than that of the stage before, so that no ranks wait for each other
        return (action.micro or 0) - empty.micros_of(action.stage).start + action.stage % placement.length

    table = (
        sorted((forward(stage, micro) for stage in stages for micro in empty.micros_of(stage)), key=step)
        for stages in placement.of_rank
    )
    return replace(empty, table=tuple(map(tuple, table)))


class _InFlight(NamedTuple):
    handle: Transfer
    tensor: Tensor


@dataclass(frozen=True)
class Carried:
    """Inputs and outputs of forwards, and messages that have been asked for, which a step leaves to the next one.

    Keys are stage and microbatch, counted from the first microbatch of the next step on.
    """

    given: dict[StageMicro, Tensor] = field(default_factory=dict)
    made: dict[StageMicro, Tensor] = field(default_factory=dict)
    arriving: dict[tuple[str, int, int], _InFlight] = field(default_factory=dict)


class Executor:
    """One rank's part of one step.

    training: True if outputs are kept for a backward
    saved:    the rank's activations, where the table moves them
    carried:  what the step before left, used up by this one; None where steps leave nothing
    head:     the rank's share of the LM head, where the table has S and T; the last stage's output then goes into it
    embedding: the rank's share of the embedding, which the first stage is then given
    observe:  a context around every action, to measure it; waiting for another rank is outside of it
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        stages: Stages,
        channels: Channels,
        training: bool = True,
        observe: Observe = lambda action: nullcontext(),
        saved: SavedActivations | None = None,
        carried: Carried | None = None,
        head: VocabularyHead | None = None,
        embedding: VocabularyEmbedding | None = None,
    ) -> None:
        self._placement, self._rank_of, self._rank = placement, placement.rank_of, rank
        self._stages, self._channels, self._training, self._observe = stages, channels, training, observe
        self._saved, self._leaves, self._head, self._embedding = saved, carried is not None, head, embedding
        # what is recorded to be moved must be of one forward alone
        self._overlapping = stages if isinstance(stages, Overlapping) and not saved else None
        before = carried or Carried()
        # taken over, so that nothing else keeps what a backward has used
        self._given, self._made, self._arriving = before.given, before.made, before.arriving
        self._gradients: dict[StageMicro, Tensor] = {}
        self._sending: dict[tuple[str, int, int], _InFlight] = {}
        self._handlers: dict[str, Callable[[int, int], None]] = {
            FORWARD: self._forward,
            FULL: self._full,
            INPUT: self._input,
            WEIGHT: stages.weight,
            SEND_F: self._send_output,
            RECV_F: self._receive_input,
            SEND_B: self._send_gradient,
            RECV_B: self._receive_gradient,
            REDUCE: lambda stage, _: stages.reduce(stage),
        }
        if head:
            self._handlers |= {
                LOGITS: lambda _, micro: head.logits(micro),
                LOGITS_BACK: lambda _, micro: head.weights(micro),
                SHARE: self._share,
                SUM_S: lambda _, micro: head.sum_logits(micro),
                SUM_T: lambda _, micro: head.sum_gradients(micro),
            }
        if embedding:
            self._handlers |= {
                SUM_E: lambda _, micro: embedding.look_up(micro),
                SHARE_E: lambda _, micro: embedding.share(micro, self._gradients.pop((-1, micro), None)),
                REDUCE: self._reduce,
            }
        if saved:
            self._handlers |= {EVICT: saved.evict, LOAD: saved.load, HOLD: saved.hold, GIVE: saved.give}

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the rank's lowered cells in order.

        The halves of an overlap run at the same time where the stages can, otherwise the forward and then the backward.
        An error is marked with the rank and the action it came from.
        """
        if self._saved:
            self._saved.begin()
        for cell in cells:
            for action in halves(cell):
                with self._marking(action):
                    self._await(action)
            if isinstance(cell, Overlap) and self._overlapping:
                with self._marking(cell):
                    self._overlap(self._overlapping, cell)
                    self._settle_done()
                continue
            for action in halves(cell):
                with self._marking(action):
                    with self._observe(action):
                        self._handlers[action.kind](action.stage, action.micro or 0)
                    self._settle_done()
        self._finish()

    @contextmanager
    def _marking(self, cell: Cell) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            parts = " and ".join(f"stage {action.stage}, microbatch {action.micro}" for action in halves(cell))
            error.add_note(f"[megatron-cp] pipeline rank {self._rank} failed at {cell}: {parts}")
            raise

    def _settle_done(self) -> None:
        # without waiting for any of them
        self._settle([key for key, sent in self._sending.items() if sent.handle.done()])

    def leave(self, micros: int) -> Carried:
        """Return what is left to the next step, after one of so many microbatches."""
        left = Carried(
            {(stage, micro - micros): given for (stage, micro), given in self._given.items()},
            {(stage, micro - micros): made for (stage, micro), made in self._made.items()},
            {(kind, stage, micro - micros): message for (kind, stage, micro), message in self._arriving.items()},
        )
        assert all(key[-1] >= 0 for each in (left.given, left.made, left.arriving) for key in each), "of this step"
        return left

    def _finish(self) -> None:
        self._settle(list(self._sending))
        if self._saved:
            self._saved.finish()
        if self._head:
            self._head.finish()
        if self._embedding:
            self._embedding.finish()
        assert self._leaves or not self._arriving, "a message was received and not used"
        assert self._leaves or not (self._training and self._made), "outputs without a backward"

    def _await(self, action: Action) -> None:
        """Wait for the tensor that a compute action needs from another rank, before the action is observed."""
        kind, cell = FULL if action.kind == INPUT else action.kind, (action.stage, action.micro or 0)
        arrival = self._arriving.pop((kind, *cell), None)
        if arrival is None:
            return
        arrival.handle.wait()
        if kind == FORWARD:
            self._given[cell] = arrival.tensor.requires_grad_(self._training)
        else:
            self._gradients[cell] = arrival.tensor

    def _reduce(self, stage: int, _: int) -> None:
        assert self._embedding
        self._embedding.settle()
        self._stages.reduce(stage)

    def _overlap(self, stages: Overlapping, cell: Overlap) -> None:
        stage, _, micro = cell.forward
        forward_of = ForwardOf(stage, micro or 0, self._input_of(stage, micro or 0))
        stage, kind, micro = cell.backward
        backward_of = self._backward_of(stage, micro or 0, split=kind == INPUT)
        with self._observe(cell.forward), self._observe(cell.backward):
            made, before = stages.overlap(forward_of, backward_of)
        self._keep_output(*forward_of, made)
        self._keep_gradient(stage, micro or 0, before)

    def _input_of(self, stage: int, micro: int) -> Tensor | None:
        given = self._given.pop((stage, micro), None)
        if self._embedding and self._placement.first(stage):
            given = self._embedding.embedded(micro).requires_grad_(self._training)
        return given

    def _forward(self, stage: int, micro: int) -> None:
        given = self._input_of(stage, micro)
        if self._saved:
            with self._saved.recording(stage, micro) as chunk:
                made = self._stages.forward(stage, micro, given)
            chunk.stays(made)
        else:
            made = self._stages.forward(stage, micro, given)
        self._keep_output(stage, micro, given, made)

    def _keep_output(self, stage: int, micro: int, given: Tensor | None, made: Tensor) -> None:
        if self._training and given is not None:
            self._given[stage, micro] = given
        last = self._placement.last(stage)
        if not last and self._rank_of[stage + 1] == self._rank:
            self._given[stage + 1, micro] = made.detach().requires_grad_(self._training)
            self._stages.shrink(made)
        used = self._head if last else self._rank_of[stage + 1] != self._rank
        if self._training or used:
            self._made[stage, micro] = made

    def _full(self, stage: int, micro: int) -> None:
        self._backward(stage, micro, split=False)

    def _input(self, stage: int, micro: int) -> None:
        self._backward(stage, micro, split=True)

    def _backward(self, stage: int, micro: int, split: bool) -> None:
        self._keep_gradient(stage, micro, self._stages.backward(*self._backward_of(stage, micro, split)))

    def _backward_of(self, stage: int, micro: int, split: bool) -> BackwardOf:
        if (FORWARD, stage, micro) in self._sending:
            # the rank that sent the gradient back has received the output
            self._output_sent(stage, micro)
        if self._saved:
            self._saved.use(stage, micro)
        given, made = self._given.pop((stage, micro), None), self._made.pop((stage, micro))
        gradient = self._gradients.pop((stage, micro), None)
        if self._head and self._placement.last(stage):
            gradient = self._head.gradient(micro)
        return BackwardOf(stage, micro, given, made, gradient, split)

    def _keep_gradient(self, stage: int, micro: int, before: Tensor | None) -> None:
        if self._embedding or not self._placement.first(stage):
            assert before is not None, f"stage {stage} gave no gradient of its input"
            self._gradients[stage - 1, micro] = before

    def _share(self, _: int, micro: int) -> None:
        assert self._head
        last = self._placement.length - 1
        made = self._made.get((last, micro))
        self._head.share(micro, made)
        if made is None:
            return
        if self._training:
            self._stages.shrink(made)
        else:
            del self._made[last, micro]

    def _send_output(self, stage: int, micro: int) -> None:
        made = self._made[stage, micro] if self._training else self._made.pop((stage, micro))
        handle = self._channels.send(self._rank_of[stage + 1], FORWARD, made.detach().contiguous())
        self._sending[FORWARD, stage, micro] = _InFlight(handle, made)

    def _receive_input(self, stage: int, micro: int) -> None:
        buffer = self._stages.buffer(micro)
        handle = self._channels.receive(self._rank_of[stage - 1], FORWARD, buffer)
        self._arriving[FORWARD, stage, micro] = _InFlight(handle, buffer)

    def _send_gradient(self, stage: int, micro: int) -> None:
        gradient = self._gradients.pop((stage - 1, micro)).contiguous()
        handle = self._channels.send(self._rank_of[stage - 1], FULL, gradient)
        self._sending[FULL, stage, micro] = _InFlight(handle, gradient)

    def _receive_gradient(self, stage: int, micro: int) -> None:
        buffer = self._stages.buffer(micro)
        handle = self._channels.receive(self._rank_of[stage + 1], FULL, buffer)
        self._arriving[FULL, stage, micro] = _InFlight(handle, buffer)

    def _settle(self, keys: Iterable[tuple[str, int, int]]) -> None:
        """Free tensors once they have been sent."""
        for kind, stage, micro in keys:
            if kind == FORWARD:
                self._output_sent(stage, micro)
            else:
                self._sending.pop((kind, stage, micro)).handle.wait()

    def _output_sent(self, stage: int, micro: int) -> None:
        sent = self._sending.pop((FORWARD, stage, micro))
        sent.handle.wait()
        if self._training:
            self._stages.shrink(sent.tensor)
