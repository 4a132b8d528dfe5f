"""Megatron's all-to-all dispatcher with another exchange, and the layer of experts that has it."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, maybe_move_tensor_to_cpu
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_cp.comm import Fabric, GroupFabric, SingleFabric
from megatron_cp.experts.exchange import HopPlan, TwoHopExchange, sent_home, sent_there
from megatron_cp.experts.nodes import ranks_of_a_node
from megatron_cp.megatron.run import ExpertFlags


class TwoHopDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends tokens and probabilities to their experts in two hops; all else is Megatron's.

    A rank needs the counts of all ranks of its node: they gather them, W numbers each, beside Megatron's own gather.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange = TwoHopExchange(*hops_of(self.ep_group, ExpertFlags.of(self.config).ranks_per_node))
        self._leaving: Any = None
        self._plan: HopPlan | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Return the tokens of each expert of this rank."""
        per_expert: Tensor = super().preprocess(routing_map)
        if not self.drop_and_pad:
            self._leaving = self.exchange.inside.all_gather(self.input_splits)
        return per_expert

    def token_dispatch(self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens for this rank's experts and their probabilities, in order of the rank they come from."""
        per_expert: Tensor = self.tokens_per_expert  # type: ignore[has-type]
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", per_expert)
        self._plan = self.exchange.plan(*self._counts(len(permutated_local_input_tokens)))
        return (
            sent_there(self.exchange, self._plan, permutated_local_input_tokens),
            sent_there(self.exchange, self._plan, permuted_probs),
        )

    def token_combine(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what the experts have made of this rank's tokens."""
        assert self._plan is not None, "tokens come home after they were sent"
        return sent_home(self.exchange, self._plan, hidden_states)

    def describe(self) -> str:
        """Return how the ranks of a group lie on nodes."""
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
        result: Tensor = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        return result


class ExchangingLayer(MoELayer):
    """Megatron's layer of experts with our exchange, where several ranks share the experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stock: Any = self.token_dispatcher  # type: ignore[has-type]
        if not isinstance(stock, MoEAlltoAllTokenDispatcher) or stock.ep_size == 1:
            return
        groups = kwargs.get("pg_collection") or get_default_pg_collection()
        self.token_dispatcher = TwoHopDispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=groups
        )


def exchanging(mlp: Any, config: Any) -> Any:
    """Return what builds a layer of experts with the exchange that the config asks for; any other builder as it is."""
    if not ExpertFlags.of(config).exchanges or not isinstance(mlp, partial) or mlp.func is not MoELayer:
        return mlp
    return partial(ExchangingLayer, *mlp.args, **mlp.keywords)


def connect_experts(config: Any) -> None:
    """Make the groups of this config's exchange; a process whose stage has no experts makes them too."""
    flags = ExpertFlags.of(config)
    if not flags.exchanges or not config.num_moe_experts or not parallel_state.model_parallel_is_initialized():
        return
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() > 1:
        hops_of(group, flags.ranks_per_node)


# a model has one group of ranks that share its experts
@lru_cache(8)
def hops_of(group: ProcessGroup, per_node: int | None) -> tuple[Fabric, Fabric]:
    """Return the ranks of this rank's node and those at its place in all nodes; all processes make them together.

    per_node: ranks of the whole run on a node; None for torchrun's LOCAL_WORLD_SIZE
    """
    whole = GroupFabric(group)
    nodes = whole.nodes if per_node is None else [rank // per_node for rank in get_process_group_ranks(group)]
    size = ranks_of_a_node(nodes)
    first = whole.rank // size * size
    inside, between = range(first, first + size), range(whole.rank % size, whole.size, size)
    return _of(whole, inside), _of(whole, between)


def _of(whole: GroupFabric, ranks: Sequence[int]) -> Fabric:
    if len(ranks) == 1:
        return SingleFabric()
    return whole if len(ranks) == whole.size else whole.subset(ranks)
