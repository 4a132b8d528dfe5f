"""The layer of experts that chooses in each step how tokens travel, and whether weights are gathered (Tutel)."""

import copy
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.func import functional_call

from megatron_cp.comm import GroupFabric, values_of_all
from megatron_cp.context.auto import default_cluster
from megatron_cp.experts import AUTO, TOKENS, WEIGHTS
from megatron_cp.experts.degree import MixtureSize, WeighedDispatch, ways, weighed_at_all
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch, ExpertRanks
from megatron_cp.experts.gathered_weights import GatheredWeights, ShardCut, gathered_here
from megatron_cp.experts.memo import DispatchMemo
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.experts.dispatcher import (
    ExchangingLayer,
    LoopDispatcher,
    PieceDispatcher,
    TwoHopDispatcher,
    compute_part,
    hops_differ,
)
from megatron_cp.megatron.experts.parameters import keep_gradients, splits_backwards, wait_for_weights
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.run import args_of_run, say


class TunedLayer(ExchangingLayer):
    """Megatron's layer of experts, whose exchange, pieces and gathers may change between steps.

    Parameters, optimizer and checkpoints are those of any other step. All ranks that hold one copy of the experts take
    the same choice, for the most tokens that one of them has in the first microbatch of a step.

    dispatchers: by the choices that have been taken
    gathered:    the weights, with the times and bytes that they have travelled
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stock: Any = self.token_dispatcher  # type: ignore[has-type]
        self.tuner: Tuner | None = None
        served = isinstance(stock, (MoEAlltoAllTokenDispatcher, LoopDispatcher))
        if not served or stock.ep_size * stock.tp_size == 1:
            return
        self._groups = kwargs.get("pg_collection") or get_default_pg_collection()
        ranks = ExpertRanks(stock.ep_size, stock.tp_size)
        flags, size = ExpertFlags.of(self.config), _size_of(self.config)
        self.tuner = tuner_of(Tuned(size, ranks, candidates(self.config, ranks), flags.cluster, flags.tries), self._all)
        self.way = self.tuner.tuned.candidates[0]
        if any(way.gather == WEIGHTS for way in self.tuner.tuned.candidates):
            self.gathered = _gathered_weights(self.experts, GroupFabric(self._groups.expt_tp))
        self.dispatchers = {self.way._replace(gather=TOKENS): stock}
        self._stock = stock
        self._step: int | None = None
        self._row: Tensor | None = None

    @property
    def _all(self) -> ProcessGroup:
        group: ProcessGroup = self._groups.tp_ep
        return group

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
        """Return what Megatron's layer does, with the dispatcher of the step."""
        if self.tuner:
            self._begin(self.tuner, hidden_states)
        return super().preprocess(hidden_states, probs, routing_map)

    def routed_experts_compute(self, hidden_states: Any, probs: Any) -> Any:
        """Return the experts' outputs and no bias; with pieces they have come home already."""
        if self.tuner is None or self.way.gather == TOKENS:
            return super().routed_experts_compute(hidden_states, probs)
        keep = keep_gradients if splits_backwards() else None
        shards, row, dispatcher = list(self.experts.parameters()), self._gather(), self.token_dispatcher
        here = partial(gathered_here, self.gathered, shards, row=row, keep=keep)
        if not isinstance(dispatcher, LoopDispatcher):
            tokens, whole = here(tokens=hidden_states)
            return compute_part(dispatcher, self._with(whole), tokens, probs), None
        first, whole = here(tokens=hidden_states[0])
        rows = [first, *hidden_states[1:]]
        if not whole.requires_grad:
            return dispatcher.through(self._with(whole), rows, probs, []), None
        # the graph of a piece ends at its own leaf
        leaf = whole.detach().requires_grad_()
        return dispatcher.through(self._with(leaf), rows, probs, [whole], leaf), None

    def describe(self) -> str:
        """Return the exchange and what is gathered, or the choices of a step."""
        assert self.tuner is not None, "one rank has nothing to choose"
        tuned = self.tuner.tuned
        if len(tuned.candidates) > 1:
            by = "measured steps" if tuned.tries else "costs"
            return f"{len(tuned.candidates)} choices for a step's tokens, by {by}, first {tuned.candidates[0]}"
        shared, own = tuned.ranks.tensor, self.num_local_experts
        dispatcher: Any = self.token_dispatcher
        how = dispatcher.describe() if tuned.ranks.sharing > 1 else "one group of ranks, which has all experts"
        if self.way.gather == TOKENS:
            return how
        return f"{how}; weights of {own} experts are gathered from {shared} ranks, and tokens stay"

    def _begin(self, tuner: "Tuner", hidden_states: Tensor) -> None:
        """Take the choice of a step in the first forward of training in it."""
        step = getattr(args_of_run(), "curr_iteration", None)
        if self.training and (step is None or step != self._step):
            self._step, self._row = step, None
            tokens = hidden_states.numel() // hidden_states.shape[-1]
            self.way = tuner.take(step, tokens, hidden_states.device)
        if self.way not in self.dispatchers:
            self.dispatchers[self.way] = self._dispatcher(self.way)
        self.token_dispatcher = self.dispatchers[self.way]

    def _dispatcher(self, way: Dispatch) -> Any:
        groups, config = self._groups, copy.copy(self.config)
        config.moe_comm_type, config.moe_pieces, config.moe_ranks_per_node = way.comm_type, way.pieces, way.per_node
        if way.gather == WEIGHTS:
            groups = copy.copy(groups)
            # tokens stay on their rank, as if no other shared its experts
            groups.expt_tp, groups.tp_ep = None, groups.ep
        kind = TwoHopDispatcher if groups.ep.size() > 1 else MoEAlltoAllTokenDispatcher
        made = partial(kind, self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups)
        parts = [made() for _ in range(way.pieces)]
        if len(parts) == 1:
            return parts[0]
        pieces = PieceDispatcher(parts, groups)
        # the model was wrapped with the first one
        pieces.priority = getattr(self._stock, "priority", None)
        return pieces

    def _gather(self) -> Tensor:
        """Return the weights of all shards: of the step, or those of now in an evaluation, which follows a change."""
        row = self._row if self.training else None
        if row is None:
            wait_for_weights(self.experts)
            row = self.gathered.gather(list(self.experts.parameters()))
        if self.training and self._step is not None:
            self._row = row
        return row

    def _with(self, row: Tensor) -> Any:
        names = [name for name, _ in self.experts.named_parameters()]
        return partial(_computed, self.experts, dict(zip(names, self.gathered.weights(row), strict=True)))


def tuning(mlp: Any, config: Any) -> Any:
    """Return what builds a layer of experts that chooses as the config asks; any other builder as it is."""
    flags = ExpertFlags.of(config)
    if not flags.tunes or flags.places or not isinstance(mlp, partial) or mlp.func is not ExchangingLayer:
        return mlp
    return partial(TunedLayer, *mlp.args, **mlp.keywords)


class Tuned(NamedTuple):
    """Choices and sizes that layers have in common.

    size:    of a layer, its tokens left out
    cluster: that is named; None for this machine's
    tries:   steps that are measured with each choice; 0 where costs choose
    """

    size: MixtureSize
    ranks: ExpertRanks
    candidates: tuple[Dispatch, ...]
    cluster: str | None
    tries: int


class Tuner:
    """The choice of each step, which its layers share."""

    def __init__(self, tuned: Tuned, group: ProcessGroup) -> None:
        self.tuned, self._fabric = tuned, GroupFabric(group)
        self._memo: DispatchMemo | None = None
        self._step: int | None = None
        self._way, self._since = tuned.candidates[0], time.perf_counter()

    def take(self, step: int | None, tokens: int, device: torch.device) -> Dispatch:
        """Return the choice of a step; all ranks of the group call it together, in its first layer."""
        if len(self.tuned.candidates) == 1 or (step is not None and step == self._step):
            return self._way
        self._step, before = step, self._since
        self._since = time.perf_counter()
        mine = (tokens, int(1e6 * (self._since - before)))
        most, microseconds = map(max, zip(*values_of_all(self._fabric, device, mine), strict=True))
        if self._memo is None:
            self._memo = DispatchMemo(partial(self._weigh, device.type), self.tuned.tries)
        self._way, why = self._memo.take(most, 1e-6 * microseconds)
        if why:
            say(f"exchange of experts for {why}")
        return self._way

    def _weigh(self, device: str, tokens: int) -> Sequence[WeighedDispatch]:
        cluster = default_cluster(device) if self.tuned.cluster is None else load_cluster(self.tuned.cluster)
        # a program that has parsed no arguments counts no microbatches
        times = 1 if args_of_run() is None else get_num_microbatches()
        size = self.tuned.size._replace(tokens=tokens, times=times)
        return weighed_at_all(self.tuned.candidates, size, self.tuned.ranks, cluster)


# layers of one size, and of a pyramid's others
@lru_cache(16)
def tuner_of(tuned: Tuned, group: ProcessGroup) -> Tuner:
    """Return the tuner that layers share."""
    return Tuner(tuned, group)


def candidates(config: Any, ranks: ExpertRanks) -> tuple[Dispatch, ...]:
    """Return the choices that a config allows, the one that it asks for first."""
    flags = ExpertFlags.of(config)
    asked = STOCK._replace(comm_type=flags.exchange.name, pieces=flags.pieces, per_node=flags.ranks_per_node)
    if not flags.two_hops:
        asked = asked._replace(per_node=None)
    found = [STOCK if ranks.sharing == 1 else asked]
    if flags.degrees is not None and ranks.sharing > 1:
        hops = hops_differ(ranks, flags.ranks_per_node)
        found += [way for way in ways(flags.degree_list, flags.ranks_per_node) if hops or not way.two_hops]
    gathers = (TOKENS, WEIGHTS) if flags.gather == AUTO else (flags.gather or TOKENS,)
    if ranks.tensor == 1:
        gathers = (TOKENS,)
    # an exchange may be asked for by either name
    return tuple(dict.fromkeys(way._replace(gather=gather) for gather in gathers for way in found))


def _size_of(config: Any) -> MixtureSize:
    return MixtureSize(
        0,
        config.moe_router_topk,
        config.num_moe_experts,
        config.hidden_size,
        config.moe_ffn_hidden_size or config.ffn_hidden_size,
        3 if config.gated_linear_unit else 2,
        str(config.params_dtype).removeprefix("torch."),
        False,
    )


def _gathered_weights(experts: Any, fabric: GroupFabric) -> GatheredWeights:
    """Return what gathers a layer's experts; a linear into them is cut by rows, gates and values each, one back by
    columns."""
    parts = 2 if experts.config.gated_linear_unit and experts.config.moe_mlp_glu_interleave_size is None else 1
    cuts, shapes = [], []
    for name, weight in experts.named_parameters():
        cuts.append(ShardCut(0, parts) if "linear_fc1" in name else ShardCut(1))
        shapes.append(weight.shape)
    return GatheredWeights(fabric, cuts, shapes)


def _computed(experts: Any, weights: dict[str, Tensor], *rows: Tensor) -> tuple[Tensor, None]:
    """Return outputs of rows, their numbers and probabilities by such weights, and no bias."""
    result: tuple[Tensor, None] = functional_call(experts, weights, rows, tie_weights=False)
    return result
