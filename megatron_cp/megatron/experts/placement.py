"""The layer of experts with copies of busy ones in spare slots (FasterMoE, FlexMoE, Lina)."""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn
from torch.func import functional_call

from megatron_cp.comm import Scattering
from megatron_cp.experts import PLACEMENTS
from megatron_cp.experts.dealing import Deal, deal_of, dealt
from megatron_cp.experts.lending import (
    Borrowed,
    CopiesOnTheWay,
    Lending,
    as_rows,
    borrowed_here,
    check_plans,
    in_shapes,
    lent_here,
    loan_of,
)
from megatron_cp.experts.placing import ChangingPlan
from megatron_cp.experts.slot_costs import slot_costs
from megatron_cp.experts.slots import SlotCosts, SlotPlan, Slots
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.experts.dispatcher import (
    ExchangingLayer,
    LoopDispatcher,
    TwoHopDispatcher,
    compute_part,
    copies_of,
    weights_in_autograd,
)
from megatron_cp.megatron.experts.parameters import keep_gradients, splits_backwards, wait_for_weights
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.run import args_of_run


class PlacedLayer(ExchangingLayer):
    """Megatron's layer of experts, where ranks host copies of other ranks' experts.

    Router, losses, capacity, parameters and checkpoints know experts alone. Tokens are dealt out to slots; weights of
    copies come in the first forward of a step, while the layer before computes, and gradients go home in each
    backward, while the layer before computes its own. Plans change between steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.placed: HostedCopies | None = None
        super().__init__(*args, **kwargs)
        if self.placed:
            self.placed.host(self.experts)

    def dispatcher(self, groups: Any) -> TwoHopDispatcher:
        """Return what sends a piece to slots in the place of experts."""
        if self.placed is None:
            fabric = copies_of(groups.ep)
            self.placed = HostedCopies(
                self.config, Slots(self.config.num_moe_experts, fabric.size, self._spare), fabric
            )
        per_rank = self.num_local_experts + self._spare
        first = groups.ep.rank() * per_rank
        wide = copy.copy(self.config)
        wide.num_moe_experts = groups.ep.size() * per_rank
        return TwoHopDispatcher(per_rank, list(range(first, first + per_rank)), config=wide, pg_collection=groups)

    @property
    def _spare(self) -> int:
        return ExpertFlags.of(self.config).slots

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
        """Return what Megatron's layer does, of slots in the place of experts."""
        if self.placed:
            self.placed.begin(self.training, self.layer_number)
            self.placed.count(self.training, routing_map)
            routing_map, probs = dealt(self.placed.deal(probs.device), routing_map, probs)
        return super().preprocess(hidden_states, probs, routing_map)

    def routed_experts_compute(self, hidden_states: Any, probs: Any) -> Any:
        """Return the outputs of experts and copies, and no bias; with pieces or groups they have come home already."""
        if self.placed is None:
            return super().routed_experts_compute(hidden_states, probs)
        self.placed.lend(self.experts)
        if self.placed.following is not None:
            self.placed.following.lend_ahead()
        if isinstance(self.token_dispatcher, LoopDispatcher):
            return self._in_pieces(self.placed, hidden_states, probs), None
        rows, of_rows, copies = self.placed.borrow(self.experts, hidden_states, probs)
        experts = self.placed.with_copies(self.experts, copies)
        return compute_part(self.token_dispatcher, experts, rows, of_rows), None

    def lend_ahead(self) -> None:
        """Let the weights of copies leave, and the plan change, while the layer before computes."""
        assert self.placed is not None, "layers in a row have copies alike"
        self.placed.begin(self.training, self.layer_number)
        self.placed.lend(self.experts, ahead=True)

    def _in_pieces(self, placed: "HostedCopies", rows: Sequence[Tensor], probs: Sequence[Tensor]) -> Sequence[Tensor]:
        first, of_first, copies = placed.borrow(self.experts, rows[0], probs[0])
        rows, probs, weights = [first, *rows[1:]], [of_first, *probs[1:]], weights_in_autograd(self.experts)
        if not copies.requires_grad:
            return self.token_dispatcher.through(placed.with_copies(self.experts, copies), rows, probs, weights)
        # the graph of a piece ends at its own leaf
        leaf = copies.detach().requires_grad_()
        experts = placed.with_copies(self.experts, leaf)
        return self.token_dispatcher.through(experts, rows, probs, [*weights, copies], leaf)

    def describe(self) -> str:
        """Return the policy and the slots."""
        name = PLACEMENTS.get(ExpertFlags.of(self.config).placement).name
        if self.placed is None:
            return f"{name}, one rank, which has all experts"
        slots = self.placed.plan.slots
        steps = "step" if (interval := self.placed.placing.interval) == 1 else f"{interval} steps"
        return (
            f"{name}, every {steps}; {slots.ranks} ranks with {self.num_local_experts} experts and {slots.spare} spare "
            f"slot{'s' * (slots.spare > 1)} each"
        )


def placing(mlp: Any, config: Any) -> Any:
    """Return what builds a layer of experts with the copies that the config asks for; any other builder as it is."""
    if not ExpertFlags.of(config).places or not isinstance(mlp, partial) or mlp.func is not ExchangingLayer:
        return mlp
    return partial(PlacedLayer, *mlp.args, **mlp.keywords)


def link_copies[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Let each layer with copies lend those of the next one of its chunk, where the config asks for it; a hook."""
    for model in models:
        layers = [each for each in model.modules() if isinstance(each, PlacedLayer)]
        for layer, following in pairwise(layers):
            if layer.placed is not None and ExpertFlags.of(layer.config).copies_ahead:
                layer.placed.following = following
    return models


class LentAhead(NamedTuple):
    """A loan of this forward, and its mark in autograd."""

    borrowed: Borrowed
    mark: Tensor


class HostedCopies:
    """Plan, counts and copies of a layer. Not a module: neither optimizer nor checkpoint see any of it.

    lending:   with the copies and bytes that this rank has sent
    following: the layer whose weights leave while this one computes
    """

    def __init__(self, config: Any, slots: Slots, fabric: Scattering) -> None:
        flags = ExpertFlags.of(config)
        self._config, self.lending = config, Lending(fabric)
        self.placing = ChangingPlan(PLACEMENTS.get(flags.placement), slots, flags.placement_interval)
        self._step: int | None = None
        self._steps = 0
        self._counts: Tensor | None = None
        self._copies: Tensor | None = None
        self._coming: CopiesOnTheWay | None = None
        self._lent: LentAhead | None = None
        self.following: PlacedLayer | None = None
        self._deal: tuple[SlotPlan, Deal] | None = None
        self._host: nn.Module | None = None

    @property
    def plan(self) -> SlotPlan:
        """The plan in force."""
        return self.placing.plan

    def begin(self, training: bool, layer: int | None) -> None:
        """Note a layer's forward: the first of a training step may change the plan, and gets weights anew.

        Raises RuntimeError where ranks that share the experts have come to different plans.
        """
        step = getattr(args_of_run(), "curr_iteration", None)
        if not training or step is None or step == self._step:
            return
        self._step, self._copies, self._lent = step, None, None
        if self._counts is None:
            return
        self._steps += 1
        if self.placing.due(self._steps):
            self._change(layer)

    def count(self, training: bool, routing_map: Tensor) -> None:
        """Count the tokens of each expert in training, once for a microbatch that is computed again."""
        if training and torch.is_grad_enabled():
            rows = routing_map.detach().sum(0)
            self._counts = rows if self._counts is None else self._counts + rows

    def deal(self, device: torch.device) -> Deal:
        """Return where this rank's tokens go by the plan in force."""
        if self._deal is None or self._deal[0] != self.plan:
            self._deal = self.plan, deal_of(self.plan, self.lending.fabric.rank, device)
        return self._deal[1]

    def lend(self, experts: SequentialMLP, ahead: bool = False) -> None:
        """Let weights leave to the copies of this layer unless they have, and mark where gradients are waited for.

        ahead: for the layer's next forward, whatever was lent before; else for this one, unless it is done
        """
        if not ahead and self._lent and self._lent.mark.requires_grad >= torch.is_grad_enabled():
            return
        self._lent = None
        # outside of a step nothing says when weights have changed
        if not self.plan.copies or (ahead and experts.training and self._step is None):
            return
        parameters = [list(expert.parameters()) for expert in experts.local_experts]
        loan = loan_of(self.plan, self.lending.fabric.rank)
        first = self.lending.fabric.rank * len(parameters)
        if not experts.training:
            # an evaluation comes after the weights have changed
            self._copies = None
        if self._coming is None and self._copies is None:
            wait_for_weights(experts)
            given = [parameters[expert - first] for lent in loan.lends for expert in lent]
            self._coming = self.lending.weights(loan, as_rows(given, parameters[0]))
        keep = keep_gradients if splits_backwards() else None
        borrowed = Borrowed(self.lending, loan, [parameters[expert - first] for expert in loan.lent], keep)
        self._lent = LentAhead(borrowed, lent_here(borrowed, parameters[0][0].device))

    def borrow(self, experts: SequentialMLP, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, their probabilities and this rank's copies [C, P], whose gradients go home in backward."""
        if self._lent is None:
            return rows, probs, as_rows([], list(experts.local_experts[0].parameters()))
        (borrowed, mark), self._lent = self._lent, None
        return borrowed_here(borrowed, mark, rows, probs, self._landed(experts.training))

    def _landed(self, training: bool) -> Tensor:
        if self._copies is not None:
            return self._copies
        assert self._coming is not None, "copies are lent before they are borrowed"
        copies, self._coming = self._coming.landed(), None
        if training and self._step is not None:
            self._copies = copies
        return copies

    def host(self, experts: SequentialMLP) -> None:
        """Make a module for the copies: the modules of experts without parameters of their own."""
        if self.plan.slots.spare:
            host = _twin(experts)
            host.local_experts = nn.ModuleList(_twin(experts.local_experts[0]) for _ in range(self.plan.slots.spare))
            host.num_local_experts = self.plan.slots.spare
            self._host = host

    def with_copies(self, experts: SequentialMLP, copies: Tensor) -> Any:
        """Return what computes the rows of this rank's slots, own experts before copies."""
        return partial(_with_copies, experts, self._host, copies)

    def _change(self, layer: int | None) -> None:
        fabric, summed = self.lending.fabric, self._counts
        assert summed is not None
        counts = [[rows / self._steps for rows in of_rank] for of_rank in fabric.all_gather(summed).tolist()]
        plan = self.placing.change(counts, self._costs())
        self._counts, self._steps = torch.zeros_like(summed), 0
        check_plans(fabric, summed.device, plan, f"the experts of layer {layer} in step {self._step}")

    def _costs(self) -> SlotCosts:
        flags, config = ExpertFlags.of(self._config), self._config
        width = config.moe_ffn_hidden_size or config.ffn_hidden_size
        ranks, cluster = self.plan.slots.ranks, load_cluster(flags.copies_cluster)
        return slot_costs(config.hidden_size, width, ranks, cluster, get_num_microbatches())


def _with_copies(
    experts: Any, host: Any, copies: Tensor, x: Tensor, sizes: Tensor, probs: Tensor
) -> tuple[Tensor, None]:
    """Return outputs of the rows [T, h] of all slots, and no bias; slots without a copy have no rows."""
    own = experts.num_local_experts
    rows = [int(sizes[:own].sum()), int(sizes[own:].sum())]
    (ours, theirs), (of_ours, of_theirs) = x.split(rows), probs.split(rows)
    outputs = [experts(ours, sizes[:own], of_ours)]
    if len(copies):
        first = experts.local_experts[0]
        names, shapes = zip(*((name, weight.shape) for name, weight in first.named_parameters()), strict=True)
        given = [in_shapes(copy, shapes) for copy in copies.unbind()]
        given += [[weight.detach() for weight in first.parameters()]] * (len(host.local_experts) - len(given))
        weights = {
            f"local_experts.{at}.{name}": weight
            for at, each in enumerate(given)
            for name, weight in zip(names, each, strict=True)
        }
        outputs.append(functional_call(host, weights, (theirs, sizes[own:], of_theirs), tie_weights=False))
    assert all(bias is None for _, bias in outputs), "experts add their biases themselves"
    return torch.cat([output for output, _ in outputs]), None


def _twin(module: nn.Module) -> Any:
    """Return a module that computes what another does, with places for parameters of its own."""
    twin = copy.copy(module)
    state: Any = twin.__dict__
    state["_parameters"], state["_buffers"] = dict(module._parameters), dict(module._buffers)
    state["_modules"] = {name: child and _twin(child) for name, child in module._modules.items()}
    return twin
