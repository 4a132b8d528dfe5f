"""Megatron's all-to-all dispatcher with another exchange or in pieces, and the layer of experts that has it."""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, maybe_move_tensor_to_cpu
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_cp.comm import Fabric, GroupFabric
from megatron_cp.errors import Refused
from megatron_cp.experts.dispatch_cost import ExpertRanks
from megatron_cp.experts.exchange import HopPlan, TwoHopExchange, hops, sent_home, sent_there, transposed
from megatron_cp.experts.groups import by_step, group_plans, group_steps, in_rank_order
from megatron_cp.experts.nodes import ranks_of_a_node, ranks_on_nodes
from megatron_cp.experts.pieces import PieceLoop, in_pieces
from megatron_cp.experts.priority import ExchangePriority
from megatron_cp.megatron.experts.residual import ResidualLayer
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.pipeline.split_linear import bound_queue


class TwoHopDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends tokens and probabilities to their experts in two hops, or one; all else is Megatron's.

    A rank needs the counts of all ranks of its node: they gather them, W numbers each, beside Megatron's own gather.

    keeps_sources: `counted` is asked for what each rank has for each expert
    """

    keeps_sources = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange = TwoHopExchange(*hops_of(self.ep_group, ExpertFlags.of(self.config).exchange_node))
        self._leaving: Any = None
        self._sources: Any = None
        self._plan: HopPlan | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Return the tokens of each expert of this rank."""
        per_expert: Tensor = super().preprocess(routing_map)
        if not self.drop_and_pad:
            self._leaving = self.exchange.inside.all_gather(self.input_splits)
        if self.keeps_sources and not self.drop_and_pad:
            several = self.num_local_experts > 1
            self._sources = self.num_global_tokens_per_local_expert if several else self.output_splits[:, None]
        return per_expert

    def token_dispatch(self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens for this rank's experts and their probabilities, in order of the rank they come from."""
        self._plan = self.planned(len(permutated_local_input_tokens))
        return (
            sent_there(self.exchange, self._plan, permutated_local_input_tokens),
            sent_there(self.exchange, self._plan, permuted_probs),
        )

    def token_combine(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what the experts have made of this rank's tokens."""
        assert self._plan is not None, "tokens come home after they were sent"
        return sent_home(self.exchange, self._plan, hidden_states)

    def planned(self, rows: int) -> HopPlan:
        """Return the plan for so many rows of this rank, once the host has their counts."""
        self._arrive()
        return self.exchange.plan(*self._counts(rows))

    def counted(self, rows: int) -> tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]:
        """Return the counts of rows that this rank sends to, and gets from, each rank of a group without nodes.

        The last are those that each rank has for each expert of this one. `rows` are this rank's.
        """
        self._arrive()
        leaving, arriving = self._counts(rows)
        if self.drop_and_pad:
            return leaving[0], arriving, [[rows // self.num_experts] * self.num_local_experts] * self.ep_size
        return leaving[0], arriving, self._sources.tolist()

    def _arrive(self) -> None:
        per_expert: Tensor = self.tokens_per_expert  # type: ignore[has-type]
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", per_expert)

    def describe(self) -> str:
        """Return how the ranks of a group lie on nodes."""
        flags = ExpertFlags.of(self.config)
        if not flags.two_hops:
            return flags.exchange.name
        nodes, per_node = self.exchange.between.size, self.exchange.inside.size
        if nodes == 1:
            return f"two-hop, {per_node} ranks on one node, which is Megatron's exchange"
        return f"two-hop, {nodes} nodes of {per_node}" + (", which is Megatron's exchange" if per_node == 1 else "")

    def _counts(self, rows: int) -> tuple[Sequence[Sequence[int]], Sequence[int]]:
        if self.drop_and_pad:
            equal = [rows // self.ep_size] * self.ep_size
            return [equal] * self.exchange.inside.size, equal
        return self._leaving.tolist(), self.output_splits.tolist()

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor:
        # on the stream whose event Megatron waits for
        if point == self.cuda_dtoh_point and not self.drop_and_pad:
            stream = self.cuda_dtoh_stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._leaving = maybe_move_tensor_to_cpu(self._leaving, record_stream=True)
                if self.keeps_sources:
                    self._sources = maybe_move_tensor_to_cpu(self._sources, record_stream=True)
        result: Tensor = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        return result


class LoopDispatcher(MoETokenDispatcher):
    """Sends routed tokens while experts compute others: both in `through`, where they also come home."""

    exchange: TwoHopExchange

    def token_dispatch(self, hidden_states: Any, probs: Any) -> Any:
        """Return what it is given."""
        return hidden_states, probs

    def token_combine(self, hidden_states: Any) -> Any:
        """Return what it is given."""
        return hidden_states

    def through(
        self, experts: Any, rows: Sequence[Tensor], probs: Sequence[Tensor], weights: Sequence[Tensor], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what the experts of all ranks have made of the rows of each piece; leaves as in PieceLoop."""
        raise NotImplementedError


class PieceDispatcher(LoopDispatcher):
    """Cuts routed tokens into pieces, each with a dispatcher of its own, and sends them while experts compute others.

    The counts of all pieces are gathered and their tokens sorted before the first leaves.

    priority: over reductions of gradients; set once the model is wrapped, where there are any to hold
    """

    def __init__(self, parts: Sequence[TwoHopDispatcher], pg_collection: Any) -> None:
        super().__init__(parts[0].config, pg_collection)
        self.parts, self.exchange = parts, parts[0].exchange
        self.priority: ExchangePriority | None = None
        self._shape = torch.Size()

    def dispatch_preprocess(  # type: ignore[override]
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return rows and probabilities of each piece, in order of the expert that they are for."""
        self._shape = hidden_states.shape
        whole = (hidden_states.reshape(-1, self._shape[-1]), routing_map, probs)
        pieces = zip(*(each.tensor_split(len(self.parts)) for each in whole), strict=True)
        found = [part.dispatch_preprocess(*piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return [rows for rows, _ in found], [of_rows for _, of_rows in found]

    def through(
        self, experts: Any, rows: Sequence[Tensor], probs: Sequence[Tensor], weights: Sequence[Tensor], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what the experts of all ranks have made of the rows of each piece; leaves as in PieceLoop."""
        loop = PieceLoop(
            self.exchange,
            [part.planned(len(each)) for part, each in zip(self.parts, rows, strict=True)],
            [partial(compute_part, part, experts) for part in self.parts],
            torch.is_grad_enabled(),
            leaves,
            ahead=ExpertFlags.of(self.config).exchange.ahead,
            priority=self.priority,
        )
        return in_pieces(loop, rows, probs, weights)

    def combine_postprocess(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Return the tokens of all pieces in their order."""
        pairs = zip(self.parts, hidden_states, strict=True)
        return torch.cat([part.combine_postprocess(rows) for part, rows in pairs]).view(self._shape)

    def describe(self) -> str:
        """Return the exchange of each piece, their number, and what waits for them."""
        pieces = f"{self.parts[0].describe()}, in {len(self.parts)} pieces"
        if not ExpertFlags.of(self.config).exchange.first:
            return pieces
        if self.priority is None:
            return f"{pieces}; no reduction waits without --overlap-grad-reduce"
        return f"{pieces}, before reductions of gradients"


class GroupDispatcher(LoopDispatcher):
    """Sends routed tokens to one group of ranks after the other, and computes theirs; counts are gathered once.

    whole: Megatron's dispatcher for all of them, of one hop
    """

    def __init__(self, whole: TwoHopDispatcher, pg_collection: Any) -> None:
        super().__init__(whole.config, pg_collection)
        whole.keeps_sources = True
        self.whole, self.exchange = whole, whole.exchange
        self.size = ExpertFlags.of(whole.config).group_ranks or 1
        self.steps = group_steps(whole.ep_rank, whole.ep_size, self.size)

    def dispatch_preprocess(  # type: ignore[override]
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return all rows and their probabilities, in order of the expert that they are for, each alone in a list."""
        rows, of_rows = self.whole.dispatch_preprocess(hidden_states, routing_map, probs)
        return [rows], [of_rows]

    def through(
        self, experts: Any, rows: Sequence[Tensor], probs: Sequence[Tensor], weights: Sequence[Tensor], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what the experts of all ranks have made of the rows, as they were given; leaves as in PieceLoop."""
        (whole,), (of_whole,) = rows, probs
        sends, recvs, sources = self.whole.counted(len(whole))
        loop = PieceLoop(
            self.exchange,
            group_plans(self.exchange, sends, recvs, self.steps),
            [partial(_of_group, experts, sources[step.source.start : step.source.stop]) for step in self.steps],
            torch.is_grad_enabled(),
            leaves,
            ahead=ExpertFlags.of(self.config).exchange.ahead,
        )
        parts, of_parts = (list(by_step(each, sends, self.steps)) for each in (whole, of_whole))
        home = in_pieces(loop, parts, of_parts, weights)
        return (torch.cat(in_rank_order(home, self.steps)),)

    def combine_postprocess(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Return the tokens in their order."""
        (rows,) = hidden_states
        result: Tensor = self.whole.combine_postprocess(rows)
        return result

    def describe(self) -> str:
        """Return the exchange, the number of groups and their size."""
        ranks = f"{self.size} rank{'s' * (self.size > 1)}"
        return f"{self.whole.describe()}, in {len(self.steps)} groups of {ranks}"


def compute_part(part: TwoHopDispatcher, experts: Any, rows: Tensor, probs: Tensor) -> Tensor:
    """Return what this rank's experts make of the rows that have arrived, in the order to send them home in."""
    x, sizes, of_rows = part.dispatch_postprocess(rows, probs)
    output, bias = experts(x, sizes, of_rows)
    assert bias is None, "experts add their biases themselves"
    result: Tensor = part.combine_preprocess(output)
    return result


def _of_group(experts: Any, sources: Sequence[Sequence[int]], rows: Tensor, probs: Tensor) -> Tensor:
    """Return what this rank's experts make of the rows of a group, in their order.

    sources: rows of each rank of the group for each expert
    """
    ranks, local, sizes = len(sources), len(sources[0]), list(chain.from_iterable(sources))
    x, of_rows = (transposed(each, sizes, ranks, local) for each in (rows, probs))
    per_expert = list(map(sum, zip(*sources, strict=True)))
    output, bias = experts(x, torch.tensor(per_expert), of_rows)
    assert bias is None, "experts add their biases themselves"
    by_expert = [count for expert in zip(*sources, strict=True) for count in expert]
    return transposed(output, by_expert, local, ranks)


def weights_in_autograd(experts: Any) -> list[Tensor]:
    """Return the parameters whose gradients are not left to the queue of a split schedule, which takes matrices."""
    queue = bound_queue()
    queued = queue is not None and queue.open
    return [weight for weight in experts.parameters() if weight.requires_grad and not (queued and weight.dim() > 1)]


class ExchangingLayer(ResidualLayer):
    """Megatron's layer of experts with our exchange, where several ranks share the experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stock: Any = self.token_dispatcher  # type: ignore[has-type]
        if not isinstance(stock, MoEAlltoAllTokenDispatcher) or stock.ep_size == 1:
            return
        groups = kwargs.get("pg_collection") or get_default_pg_collection()
        flags = ExpertFlags.of(self.config)
        parts = [self.dispatcher(groups) for _ in range(flags.pieces)]
        if flags.by_groups:
            self.token_dispatcher: Any = GroupDispatcher(parts[0], groups)
        else:
            self.token_dispatcher = parts[0] if len(parts) == 1 else PieceDispatcher(parts, groups)

    def dispatcher(self, groups: Any) -> TwoHopDispatcher:
        """Return what sends a piece."""
        own, indices = self.num_local_experts, self.local_expert_indices
        return TwoHopDispatcher(own, indices, config=self.config, pg_collection=groups)

    def routed_experts_compute(self, hidden_states: Any, probs: Any) -> Any:
        """Return the experts' outputs and no bias; with pieces or groups they have come home already."""
        if isinstance(self.token_dispatcher, LoopDispatcher):
            weights = weights_in_autograd(self.experts)
            return self.token_dispatcher.through(self.experts, hidden_states, probs, weights), None
        return super().routed_experts_compute(hidden_states, probs)


def exchanging(mlp: Any, config: Any) -> Any:
    """Return what builds a layer of experts with the exchange or MLP that the config asks for; others as they are."""
    flags = ExpertFlags.of(config)
    if not (flags.exchanges or flags.mixes) or not isinstance(mlp, partial) or mlp.func is not MoELayer:
        return mlp
    return partial(ExchangingLayer if flags.exchanges else ResidualLayer, *mlp.args, **mlp.keywords)


def connect_experts(config: Any) -> None:
    """Make the groups of this config's exchange; a process whose stage has no experts makes them too."""
    flags = ExpertFlags.of(config)
    if not flags.exchanges or not config.num_moe_experts or not parallel_state.model_parallel_is_initialized():
        return
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() > 1:
        hops_of(group, flags.exchange_node)
        if flags.places:
            copies_of(group)
        step = parallel_state.get_expert_tensor_parallel_world_size()
        if flags.degrees is not None and hops_differ(ExpertRanks(group.size(), step), flags.ranks_per_node):
            hops_of(group, flags.ranks_per_node)


def hops_differ(ranks: ExpertRanks, per_node: int | None) -> bool:
    """True if two hops are possible and are not one, for all ranks of the run.

    per_node: ranks of the whole run on a node; None for torchrun's LOCAL_WORLD_SIZE
    """
    world = torch.distributed.get_world_size()
    try:
        here = ranks_on_nodes(world, ranks.sharing, ranks.tensor, per_node)
    except Refused:
        return False
    return 1 < here < ranks.sharing


# a model has one group of ranks that share its experts
@lru_cache(8)
def hops_of(group: ProcessGroup, per_node: int | None) -> tuple[Fabric, Fabric]:
    """Return the ranks of this rank's node and those at its place in all nodes; all processes make them together.

    per_node: ranks of the whole run on a node; None for torchrun's LOCAL_WORLD_SIZE
    """
    whole = GroupFabric(group)
    nodes = whole.nodes if per_node is None else [rank // per_node for rank in get_process_group_ranks(group)]
    return hops(whole, ranks_of_a_node(nodes))


# a model has one group of ranks that share its experts
@lru_cache(8)
def copies_of(group: ProcessGroup) -> GroupFabric:
    """Return the ranks of a group over a communicator for copies alone; all processes make it together.

    Over that of tokens a copy would hold up the exchange after it.
    """
    return GroupFabric(group).subset(range(group.size()))
