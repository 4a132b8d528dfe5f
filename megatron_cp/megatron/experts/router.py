"""Megatron's router with experts that take tokens as they come: Switch's, and GShard's second expert by chance."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_cp.context import BACKENDS
from megatron_cp.context.layouts import ZIGZAG, indices
from megatron_cp.experts import GSHARD, ROUTERS
from megatron_cp.experts.draws import uniform
from megatron_cp.experts.first_come import first_come, from_groups, in_groups
from megatron_cp.experts.gshard import dispatched
from megatron_cp.experts.routed import capacity_of
from megatron_cp.experts.turns import Turns
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.run import args_of_run


class FirstComeRouter(TopKRouter):
    """Megatron's router with another way to drop tokens, and with a balance of first choices alone.

    Weights, gates, losses, their logs and checkpoints are Megatron's. In training GShard's second expert comes by a
    draw that is named after the seed, the layer, the step, the sample of the global batch and the position of the
    token, so that ranks of every layout draw the same for it.

    calls: microbatches that were routed
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        self._turns = Turns()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the gates of tokens and where they are sent, both [T, E], from logits [s, b, E]."""
        positions, samples = logits.shape[:2]
        rows = logits.view(-1, self.num_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        rows = self.apply_z_loss(rows, padding_mask=padding)
        gates, chosen = topk_routing_with_score_function(
            rows, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
        )
        sent = self._sent(gates.detach(), chosen, positions, samples)
        self.calls += 1
        gates = gates * sent
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            gates = self._balanced(gates, rows, padding, positions, samples)
        return gates, sent

    def describe(self) -> str:
        """Return the router, its capacity and its groups."""
        flags = ExpertFlags.of(self.config)
        group = "all of a microbatch" if flags.group_tokens is None else f"groups of {flags.group_tokens}"
        return f"{ROUTERS.get(flags.router).name}, capacity factor {self.config.moe_expert_capacity_factor:g}, {group}"

    def _sent(self, gates: Tensor, chosen: Tensor, positions: int, samples: int) -> Tensor:
        """Return [T, E], True where a token is sent to an expert."""
        flags = ExpertFlags.of(self.config)
        size, tokens = flags.group_tokens, positions * samples
        grouped = partial(in_groups, samples=samples, size=size)
        capacity = capacity_of(size or tokens, self.topk, self.num_experts, self.config.moe_expert_capacity_factor)
        if ROUTERS.get(flags.router).name == GSHARD:
            draws = grouped(self._draws(positions, samples, gates.device)) if self.training else None
            sent = dispatched(grouped(gates), grouped(chosen), draws, capacity)
        else:
            sent = first_come(grouped(chosen), capacity)
        return from_groups(sent, samples, size, tokens)

    def _draws(self, positions: int, samples: int, device: torch.device) -> Tensor:
        """Return [T, 1], a draw in [0, 1) for each token."""
        args = args_of_run()
        turn = self._turns.take(getattr(args, "curr_iteration", 0))
        rank, ranks = _data_parallel_place()
        sample = torch.arange(samples, device=device) + (turn.microbatch * ranks + rank) * samples
        at = places(self.config, positions, device).unsqueeze(1)
        layer = 2 * (self.layer_number or 0) + self.is_mtp_layer
        return uniform(getattr(args, "seed", 0), layer, turn.step, sample, at).view(-1, 1)

    def _balanced(self, gates: Tensor, logits: Tensor, padding: Tensor | None, positions: int, samples: int) -> Tensor:
        """Return the gates with Megatron's losses of balance, which count a token for its first expert alone."""
        first, scores = compute_routing_scores_for_aux_loss(logits, 1, "softmax", padding_mask=padding)
        # Megatron divides by the experts of a token
        chosen, masked = first * self.topk, padding is not None
        gates = self._apply_aux_loss(gates, scores, chosen, with_padding_mask=masked)
        gates = self._apply_seq_aux_loss(gates, scores, chosen, positions, samples, with_padding_mask=masked)
        return self._apply_global_aux_loss(gates, scores, chosen, with_padding_mask=masked)


def _data_parallel_place() -> tuple[int, int]:
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def places(config: Any, tokens: int, device: torch.device) -> Tensor:
    """Return the positions in a sequence of this rank's tokens, of which there are so many in every sample.

    They are those of --cp-comm-type's layout. Where documents or batches are laid out otherwise, they are some numbers
    that no other rank of the sequence has.
    """
    cp, tp = (0, 1), (0, 1)
    if parallel_state.model_parallel_is_initialized():
        cp = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        if config.sequence_parallel:
            tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    name = config.cp_comm_type or "p2p"
    entry = BACKENDS.get(name if isinstance(name, str) else name[0])
    return _places(entry.layout or ZIGZAG, tokens, cp, tp, AttentionFlags.of(config).stripe, device)


@lru_cache(16)
def _places(
    layout: str, tokens: int, cp: tuple[int, int], tp: tuple[int, int], stripe: int, device: torch.device
) -> Tensor:
    first = tp[0] * tokens
    if cp[1] == 1:
        return torch.arange(first, first + tokens, device=device)
    whole = tokens * tp[1]
    try:
        found = indices(layout, whole * cp[1], cp[1], cp[0], stripe)
    except ValueError:
        found = list(range(cp[0] * whole, (cp[0] + 1) * whole))
    return torch.tensor(found[first : first + tokens], device=device)


def routing(mlp: Any, config: Any) -> Any:
    """Return what builds a layer of experts with the router that the config asks for; any other builder as it is."""
    if not ExpertFlags.of(config).drops or not isinstance(mlp, partial) or mlp.func is not MoELayer:
        return mlp
    parts: Any = mlp.keywords["submodules"]
    return partial(MoELayer, *mlp.args, **{**mlp.keywords, "submodules": replace(parts, router=FirstComeRouter)})
