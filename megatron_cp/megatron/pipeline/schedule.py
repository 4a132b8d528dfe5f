"""Run Megatron's training step in the order of one of our schedules.

`Pipeline` replaces Megatron's own drivers. It keeps their signature, their work around a step and their building blocks
for one forward and one backward; the schedule decides the order, the transfers and the start of reductions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_cp.comm import wires
from megatron_cp.context.slices import SlicesInFlight
from megatron_cp.errors import Refused
from megatron_cp.megatron.pipeline.combined import CombinedStages
from megatron_cp.megatron.pipeline.slices import SlicedData, attach, in_slices, weighted
from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.megatron.pipeline.stages import Call, ModelStages, listed
from megatron_cp.megatron.pipeline.tables import Tables, profile_of
from megatron_cp.megatron.pipeline.te_weight_gradients import watch
from megatron_cp.megatron.pipeline.two_way import TwoWay
from megatron_cp.megatron.pipeline.v_placement import OnLoop, OnV
from megatron_cp.megatron.pipeline.vocabulary_step import PipelineCollectives, embedding_of, head_of
from megatron_cp.megatron.pipeline.without_flush import WithoutFlush
from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import BACKWARD, FORWARD, INPUT, LENDERS, MOVES, Action, flat
from megatron_cp.pipeline.build import place
from megatron_cp.pipeline.channels import Channels, communicators
from megatron_cp.pipeline.execute import Executor, Observe
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.saved import HostMover, PeerMover, SavedActivations, storages_of
from megatron_cp.pipeline.schedules.pipedream import USUAL
from megatron_cp.pipeline.split_backward import WeightQueue
from megatron_cp.pipeline.vocabulary_head import VocabularyHead


def left_to_megatron(
    pp_size: int | None = None, vp_size: int | None = None, schedule_pg_collection: Any = None
) -> bool:
    """True if a call of Megatron's getter is about one rank, or about modules with pipelines of their own."""
    return isinstance(schedule_pg_collection, MultiModuleProcessGroupCollection) or pp_size == 1


class Pipeline:
    """A forward-backward function for Megatron that runs one schedule.

    settings: of the run; without them stages are on the loop, and their costs are taken to be equal
    """

    def __init__(
        self, name: str, settings: Settings | None = None, observe: Observe = lambda action: nullcontext()
    ) -> None:
        self._rule = SCHEDULES.get(name)
        self.settings = settings or Settings()
        self._placed = _placed(self.settings)
        self._observe = observe
        self._channels: Channels | None = None
        self._tables: Tables
        self._saved: SavedActivations | None = None
        self._collectives: PipelineCollectives | None = None
        self._checked = False
        self._queue: WeightQueue | None = None
        self._delayed = False
        self.unflushed: WithoutFlush | None = None
        self.slices = SlicesInFlight(self.settings.slice_lengths) if self.settings.slice_lengths else None

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Any = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
        tokens_of: Sequence[int] | None = None,
    ) -> list[Any]:
        """Run one step, or with `forward_only` one batch of an evaluation, as Megatron's drivers do.

        tokens_of: each microbatch in what passes between stages, where these are not of one shape
        """
        if adjust_tensor_shapes_fn is not None:
            raise Refused(f"--pp-schedule {self._rule.name} does not do adjusted tensor shapes (distillation)")
        groups = schedules._build_default_pg_collection() if pg_collection is None else pg_collection
        chunks = model if isinstance(model, list) else [model]
        config = get_model_config(chunks[0])
        (shape,) = schedules.get_tensor_shapes(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            config=config,
            tp_group=groups.tp,
            cp_group=groups.cp,
        )
        call = Call(
            forward_step_func=forward_step_func,
            data_iterator=self._placed.feed(
                data_iterator if isinstance(data_iterator, list) else [data_iterator], chunks, num_microbatches
            ),
            model=chunks,
            micros=num_microbatches,
            config=config,
            groups=groups,
            shape=shape,
            tokens_of=tokens_of,
            training=not forward_only,
            collect_non_loss_data=collect_non_loss_data,
            first_val_step=first_val_step,
            force_all_reduce=bool(force_all_reduce),
            tokens=torch.zeros([], dtype=torch.int, device="cuda"),
        )
        with _timed(config):
            self._run(call)
            if call.training:
                self._finalize(call)
        return self._placed.to_last_rank(call.store, groups.pp, call.micros if call.training else None)

    @property
    def moved(self) -> int:
        """Bytes of activations that left this rank in the last step."""
        return self._saved.moved if self._saved else 0

    def _run(self, call: Call) -> None:
        settings = self.settings
        placement = place(
            self._rule, call.groups.pp.size(), len(call.model) // self._placed.pipes, settings.pipeline.placement
        )
        if self._channels is None:
            # the first step: sizes of the pipeline and the model are known only now
            lends = settings.pipeline.lends or self._rule.lends
            self._channels = connect(call.groups.pp, placement, settings.timeout_minutes, lends)
            if settings.pipeline.moves_activations or self._rule.lends:
                self._saved = saved_activations(call, self._channels, lends)
            self._queue = bound_queue()
            profile = profile_of(call.model, settings, self._queue, self._saved)
            self._tables = Tables(self._rule, placement, settings, profile)
            self._delayed = watch(call.model, self._queue)
            if self.slices:
                attach(call.model, self.slices)
            if settings.pipeline.vocab_parallel:
                self._collectives = PipelineCollectives(call.groups.pp, settings.timeout_minutes)
        if self.slices:
            cut_data(call, self.slices)
        rank, observe = call.groups.pp.rank(), self._observe
        unflushed = self._begin(call, placement) if call.training else None
        if call.training:
            # a new table after the last measured step; all ranks come to the same one
            self._tables.learn(self._channels, rank, call.buffer, self._saved)
            observe = self._tables.observing(observe)
        schedule = self._tables.lowered(
            call.micros, call.training, unflushed.begin(call.micros) if unflushed else USUAL
        )
        actions = tuple(flat(schedule.table[rank]))
        call.window = most_in_flight(actions, sum(len(schedule.begun(stage)) for stage in placement.of_rank[rank]))
        puts_off = self._delayed or any(action.kind == INPUT for action in actions)
        assert self._queue or not puts_off, "the hook weight-queue is not in force"
        queue = self._queue if puts_off else None
        combines = call.training and settings.combines
        kind = CombinedStages if combines else ModelStages
        stages = kind(call, self._placed, placement.of_rank[rank], placement.last, queue)
        moving = call.training and any(action.kind in (*MOVES, *LENDERS.values()) for action in actions)
        saved = self._saved if moving else None
        carried = unflushed.carried if unflushed else None
        head = self._head(call, placement)
        embedding = embedding_of(call, self._collectives) if self._collectives else None
        executor = Executor(
            placement, rank, stages, self._channels, call.training, observe, saved, carried, head, embedding
        )
        with _without_reductions(call), queue.step() if queue else nullcontext():
            _prefetch_first_chunks(call)
            executor.run(schedule.table[rank])
        if unflushed:
            unflushed.end(executor)
        if self.slices:
            self.slices.finish()

    def _head(self, call: Call, placement: Placement) -> VocabularyHead | None:
        """Return the rank's share of the output layer, where it lies on all ranks."""
        barriers = self.settings.pipeline.vocab_parallel
        if barriers is None or self._collectives is None:
            return None
        check = call.training and not self._checked
        call.headless, self._checked = True, self._checked or check
        return head_of(call, placement.rank_of[-1], barriers, self._collectives, check)

    def _begin(self, call: Call, placement: Placement) -> WithoutFlush | None:
        """Return what the steps before left, where the schedule has no flush between steps."""
        if self._rule.delay is None:
            return None
        if self.unflushed is None:
            delay = self._rule.delay(placement.ranks, call.micros)
            self.unflushed = WithoutFlush(delay, call.groups.pp.rank(), call.model, call.micros, self.settings)
        call.show = self.unflushed.show
        return self.unflushed

    def _finalize(self, call: Call) -> None:
        config = call.config
        if config.finalize_model_grads_func is not None:
            if config.calculate_per_token_loss:
                self._placed.add_tokens(call.tokens, call.groups.pp)
            config.finalize_model_grads_func(
                call.model,
                call.tokens if config.calculate_per_token_loss else None,
                pg_collection=self._placed.groups_to_finalize(call.groups, call.model),
                force_all_reduce=call.force_all_reduce,
            )
            self._placed.add_gradients(call.model, call.groups.pp, call.force_all_reduce)


def _placed(settings: Settings) -> OnLoop:
    if settings.pipeline.two_copies:
        return TwoWay()
    return OnV() if settings.pipeline.on_v else OnLoop()


def cut_data(call: Call, slices: SlicesInFlight) -> None:
    """Let a call run slices: its data in slices, and losses that add up to those of whole sequences."""
    call.slices = slices
    call.data_iterator = [feed and SlicedData(feed, slices.tokens) for feed in call.data_iterator]
    call.forward_step_func = in_slices(call.forward_step_func, slices)
    if not call.config.calculate_per_token_loss:
        call.forward_step_func = weighted(call.forward_step_func, call.groups.tp)


def connect(group: Any, placement: Placement, minutes: int | None, lends: bool = False) -> Channels:
    """Make the communicators of this rank's pipeline, with this timeout; all ranks of the run connect together.

    lends: True if activations move between ranks too
    """
    timeout = timedelta(minutes=minutes) if minutes else None
    peers = wires(group, len(communicators(placement, lends)), timeout)
    channels = Channels(placement, group.rank(), peers, lends)
    channels.meet(torch.zeros(1, device=torch.cuda.current_device()))
    return channels


def saved_activations(call: Call, channels: Channels, lends: bool) -> SavedActivations:
    """Return what moves activations of this rank: to its peer in the pipeline, or to the host."""
    device, group = call.tokens.device, call.groups.pp
    mover = PeerMover(channels, group.rank(), group.size(), device) if lends else HostMover(device)
    return SavedActivations(mover, device, lambda: storages_of([w for chunk in call.model for w in chunk.parameters()]))


def most_in_flight(actions: Iterable[Action], before: int = 0) -> int:
    """Return the most microbatches, over all chunks, between forward and backward; `before` are so at the start."""
    alive = most = before
    for action in actions:
        alive += (action.kind == FORWARD) - (action.kind in BACKWARD)
        most = max(most, alive)
    return most


@contextmanager
def _timed(config: Any) -> Iterator[None]:
    # evaluation takes the timers away
    if config.timers is None:
        yield
        return
    config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    yield
    config.timers("forward-backward").stop()


@contextmanager
def _without_reductions(call: Call) -> Iterator[None]:
    """Keep gradient reductions from starting by themselves: a bucket would be complete before its last W."""
    functions = call.config.no_sync_func
    with ExitStack() as stack:
        for function in functions if isinstance(functions, list) else [functions]:
            if function is not None:
                stack.enter_context(function())
        yield


def _prefetch_first_chunks(call: Call) -> None:
    functions = call.config.param_sync_func
    if functions is None or not call.training:
        return
    for function, chunk in list(zip(listed(functions, call.model), call.model, strict=True))[:2]:
        function(chunk.parameters())
