"""Executors of all ranks in one process, a thread each, over channels that follow NCCL's rules for messages."""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from megatron_cp.pipeline.action import MOVES, Action, flat
from megatron_cp.pipeline.channels import Channels, communicators
from megatron_cp.pipeline.execute import BackwardOf, Carried, Executor, ForwardOf
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.saved import HostMover, PeerMover, SavedActivations, storages_of
from megatron_cp.pipeline.schedule import PEER, Schedule
from megatron_cp.pipeline.schedules.pipedream import Delay
from megatron_cp.pipeline.vocabulary_embedding import VocabularyEmbedding
from megatron_cp.pipeline.vocabulary_head import VocabularyHead

WIDTH = 4
PATIENCE = 20.0


class Exchange:
    """Messages of all communicators. A send is over when its receive has been posted, in the order of each side.

    met: the ranks that have come to their first message of a communicator and pair; the first one waits for the second
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.met: dict[Hashable, set[int]] = defaultdict(set)
        self.sent: dict[Hashable, list[Tensor]] = defaultdict(list)
        self.posted: dict[Hashable, int] = defaultdict(int)
        self.failed: BaseException | None = None

    def wait(self, true, what: str) -> None:
        if not self.changed.wait_for(lambda: true() or self.failed, timeout=PATIENCE):
            raise TimeoutError(what)
        if not true():
            raise RuntimeError(f"another rank failed while waiting for {what}") from self.failed


class Peer:
    """One rank's end of one communicator."""

    def __init__(self, exchange: Exchange, number: int, rank: int) -> None:
        self._exchange, self._number, self._rank = exchange, number, rank

    def send(self, tensor: Tensor, peer: int) -> "Message":
        channel = self._first_use(self._rank, peer)
        with self._exchange.changed:
            self._exchange.sent[channel].append(tensor.detach().clone())
            self._exchange.changed.notify_all()
            return Message(self._exchange, channel, len(self._exchange.sent[channel]), None)

    def receive(self, buffer: Tensor, peer: int) -> "Message":
        channel = self._first_use(peer, self._rank)
        with self._exchange.changed:
            self._exchange.posted[channel] += 1
            self._exchange.changed.notify_all()
            return Message(self._exchange, channel, self._exchange.posted[channel], buffer)

    def _first_use(self, source: int, target: int) -> Hashable:
        """The channel, once both of its ranks have come to their first message: the host waits for the other side."""
        channel = (self._number, source, target)
        with self._exchange.changed:
            met = self._exchange.met[channel]
            met.add(self._rank)
            self._exchange.changed.notify_all()
            self._exchange.wait(lambda: len(met) == 2, f"rank {self._rank} at its first message of {channel}")
        return channel


class Message:
    """The n-th message of a channel, as seen by one side."""

    def __init__(self, exchange: Exchange, channel: Hashable, number: int, buffer: Tensor | None) -> None:
        self._exchange, self._channel, self._number, self._buffer = exchange, channel, number, buffer

    def done(self) -> bool:
        exchange = self._exchange
        return min(len(exchange.sent[self._channel]), exchange.posted[self._channel]) >= self._number

    def wait(self) -> None:
        with self._exchange.changed:
            self._exchange.wait(self.done, f"message {self._number} of {self._channel}")
        if self._buffer is not None:
            sent = self._exchange.sent[self._channel][self._number - 1]
            assert (sent.shape, sent.dtype) == (self._buffer.shape, self._buffer.dtype)
            self._buffer.copy_(sent)


class Layers:
    """A rank's stages, one small linear layer each; the output of a pipe's last one is the loss of a microbatch.

    length: stages of a pipe; those of several pipes are copies of the same layers
    """

    has_head = True

    def __init__(self, stages: tuple[int, ...], length: int, inputs: Tensor) -> None:
        self._length, self._inputs = length, inputs
        self.weights = {stage: weight_of(stage % length) for stage in stages}
        self.gradients = {stage: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for stage in stages}
        self.losses: dict[int, float] = {}
        self.ran: list[Action] = []
        self._waiting: dict[tuple[int, int], Tensor] = {}

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        self.ran.append(Action(stage, "F", micro))
        made = layer(self._inputs[micro] if given is None else given, self.weights[stage])
        if (stage + 1) % self._length or not self.has_head:
            return made
        loss = made.square().sum()
        self.losses[micro] = loss.item()
        return loss

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        self.ran.append(Action(stage, "I" if split else "B", micro))
        weight = self.weights[stage]
        before = [weight] if given is None else [weight, given]
        found = torch.autograd.grad(made, before, gradient)
        self._waiting[stage, micro] = found[0]
        if not split:
            self._add(stage, micro)
        return found[1] if given is not None else None

    def weight(self, stage: int, micro: int) -> None:
        self.ran.append(Action(stage, "W", micro))
        self._add(stage, micro)

    def _add(self, stage: int, micro: int) -> None:
        self.gradients[stage] += self._waiting.pop((stage, micro))

    def reduce(self, stage: int) -> None: ...

    def buffer(self, micro: int) -> Tensor:
        return torch.empty_like(self._inputs[0])

    def shrink(self, made: Tensor) -> None: ...


class OverlappingLayers(Layers):
    """Layers that run the halves of an overlap as one: the backward begins, the forward runs, the backward ends."""

    def __init__(self, stages: tuple[int, ...], length: int, inputs: Tensor) -> None:
        super().__init__(stages, length, inputs)
        self.overlaps: list[tuple[Action, Action]] = []

    def overlap(self, forward: ForwardOf, backward: BackwardOf) -> tuple[Tensor, Tensor | None]:
        weight = self.weights[backward.stage]
        leaves = [weight] if backward.given is None else [weight, backward.given]
        found = torch.autograd.grad(backward.made, leaves, backward.gradient)
        made = self.forward(*forward)
        self.gradients[backward.stage] += found[0]
        self.ran.append(Action(backward.stage, "B", backward.micro))
        self.overlaps.append((self.ran[-2], self.ran[-1]))
        return made, None if backward.given is None else found[1]


def weight_of(stage: int) -> Tensor:
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def layer(given: Tensor, weight: Tensor) -> Tensor:
    # scaled, so that autograd saves more than what the stage hands on
    return torch.tanh(given @ weight) * 1.5


def inputs_of(micros: int) -> Tensor:
    return torch.randn(micros, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(99))


def execute(
    lowered: Schedule,
    meet: bool = True,
    training: bool = True,
    steps: int = 1,
    saved: list[SavedActivations] | None = None,
    head: "Callable[[Exchange, int], VocabularyHead] | None" = None,
    inputs: Tensor | None = None,
    embedding: "Callable[[Exchange, int], VocabularyEmbedding] | None" = None,
    kind: type[Layers] = Layers,
) -> list[Layers]:
    """Run the lowered schedule on all ranks; return each rank's layers after the steps.

    saved:     filled with every rank's activations, where the table moves some
    head:      returns a rank's share of an LM head, where the table has S and T
    inputs:    (m, tokens, width), those of `inputs_of` where they are left out
    embedding: returns a rank's share of what the first stage is given, where the table has S and T
    kind:      of the layers
    """
    placement, exchange, lends = lowered.placement, Exchange(), lowered.to == PEER
    moves = any(action.kind in MOVES for cells in lowered.table for action in flat(cells))
    activations: list[SavedActivations | None] = [None] * placement.ranks
    inputs = inputs_of(lowered.micros) if inputs is None else inputs
    ranks = [kind(stages, placement.length, inputs) for stages in placement.of_rank]

    def run(rank: int) -> None:
        peers = [Peer(exchange, number, rank) for number in range(len(communicators(placement, lends)))]
        channels = Channels(placement, rank, peers, lends)
        if moves:
            device = torch.device("cpu")
            mover = PeerMover(channels, rank, placement.ranks, device) if lends else HostMover(device)
            weights = list(ranks[rank].weights.values())
            activations[rank] = SavedActivations(mover, device, lambda: storages_of(weights))
        try:
            if meet:
                channels.meet(torch.zeros(1))
            with torch.set_grad_enabled(training):
                own = head(exchange, rank) if head else None
                looked_up = embedding(exchange, rank) if embedding else None
                if own:
                    ranks[rank].has_head = False
                for _ in range(steps):
                    executor = Executor(
                        placement,
                        rank,
                        ranks[rank],
                        channels,
                        training,
                        saved=activations[rank],
                        head=own,
                        embedding=looked_up,
                    )
                    executor.run(lowered.table[rank])
        except BaseException as error:
            with exchange.changed:
                exchange.failed = exchange.failed or error
                exchange.changed.notify_all()
            raise

    with ThreadPoolExecutor(placement.ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(placement.ranks)]
    if exchange.failed:
        raise exchange.failed
    for future in futures:
        future.result()
    if saved is not None:
        saved += [each for each in activations if each]
    return ranks


def sequential(placement: Placement, micros: int) -> tuple[dict[int, float], dict[int, Tensor]]:
    """The losses by microbatch and the gradients by stage, of one microbatch after another on one rank."""
    stages = range(placement.length)
    weights = [weight_of(stage) for stage in stages]
    totals = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in stages]
    losses = {}
    for micro, given in enumerate(inputs_of(micros)):
        made = given
        for weight in weights:
            made = layer(made, weight)
        loss = made.square().sum()
        losses[micro] = loss.item()
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient
    return losses, dict(enumerate(totals))


class Stale:
    """A run without a flush on all ranks in one process: every stage keeps all the weights that it has ever had.

    in_flight: forwards that each rank has in flight after each step
    """

    def __init__(self, delay: Delay, p: int, m: int, rate: float) -> None:
        self._delay, self._p, self._m, self._rate = delay, p, m, rate
        self._histories = [[weight_of(stage)] for stage in range(p)]
        self.in_flight: list[list[int]] = []

    def newest(self, stage: int) -> Tensor:
        """The stage's weights after the last update."""
        return self._histories[stage][-1]

    def _version(self, rank: int, step: int, micro: int) -> Tensor:
        batch = step + micro // self._m
        return self._histories[rank][max(batch - self._delay.behind[rank], 0)]

    def train(self, steps: list[Schedule]) -> dict[int, float]:
        """Run the lowered steps; return the losses, by the number of the microbatch in the whole run."""
        placement, exchange = steps[0].placement, Exchange()
        inputs, losses = inputs_of(len(steps) * self._m), {}
        self.in_flight = [[0] * self._p for _ in steps]

        def run(rank: int) -> None:
            peers = [Peer(exchange, number, rank) for number in range(len(communicators(placement)))]
            channels, carried = Channels(placement, rank, peers), Carried()
            try:
                channels.meet(torch.zeros(1))
                for number, step in enumerate(steps):
                    version = partial(self._version, rank, number)
                    layers = _Versioned((rank,), self._p, inputs[number * self._m :], version)
                    executor = Executor(placement, rank, layers, channels, carried=carried)
                    executor.run(step.table[rank])
                    carried = executor.leave(self._m)
                    self.in_flight[number][rank] = len(carried.made)
                    losses.update({number * self._m + micro: loss for micro, loss in layers.losses.items()})
                    newest = self.newest(rank).detach()
                    self._histories[rank].append((newest - self._rate * layers.gradients[rank]).requires_grad_())
            except BaseException as error:
                with exchange.changed:
                    exchange.failed = exchange.failed or error
                    exchange.changed.notify_all()
                raise

        with ThreadPoolExecutor(self._p) as pool:
            futures = [pool.submit(run, rank) for rank in range(self._p)]
        if exchange.failed:
            raise exchange.failed
        for future in futures:
            future.result()
        return losses


class _Versioned(Layers):
    """A rank's stage on the weights of each microbatch's batch."""

    def __init__(self, stages: tuple[int, ...], length: int, inputs: Tensor, version: Callable[[int], Tensor]) -> None:
        super().__init__(stages, length, inputs)
        self._version = version

    def forward(self, stage: int, micro: int, given: Tensor | None) -> Tensor:
        self._show(stage, micro)
        return super().forward(stage, micro, given)

    def backward(
        self, stage: int, micro: int, given: Tensor | None, made: Tensor, gradient: Tensor | None, split: bool
    ) -> Tensor | None:
        self._show(stage, micro)
        return super().backward(stage, micro, given, made, gradient, split)

    def _show(self, stage: int, micro: int) -> None:
        self.weights[stage] = self._version(micro)
