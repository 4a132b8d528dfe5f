"""The registry entry of a context-parallel algorithm: its loop, what it sends, and what other files must know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cp.context.loop import Loop
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.traffic import TrafficFormula
from megatron_cp.grid import Grid

PLACEMENTS = {"head-first": "inner", "context-first": "outer"}
"""The axis of the grid that exchanges heads, by the value of --cp-placement."""

MaskKind = Literal["full", "causal", "window", "packed"]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Needs and abilities of an algorithm.

    masks:     masks that it can do; "packed" are those of documents
    grid:      the two axes of --hierarchical-context-parallel-sizes are "needed", "optional" (without them the loop
               chooses) or "none"
    teams:     the inner axis is a team, whose size squared must divide the ranks
    placement: --cp-placement chooses the axis that exchanges heads
    heads:     ranks that share a rank's query heads and need one each: "none", "all" or those of the heads' "axis"
    chunks:    can be cut into chunks over time: it takes any mask over any positions
    over_time: cuts a sequence into such chunks by itself
    any_positions: without a layout of its own, works on any positions; else on equal pieces of the sequence
    bias:      takes a dense bias and returns probabilities
    softcap:   computes scores by a kernel, which may cap them, or drop weights
    sinks:     a sink is merged "after" the loop, into out and lse of the `Saved` that it keeps, or "inside" by the loop
               itself, whose backward pass then returns the sink's gradient last; "none": the loop keeps another tuple
    weighed:   considered by backend `auto`: "always", "without window" (but for kernels that take windows) or "never"
    planned:   considered by `megatron-cp plan` where no backend is named
    latent:    its loop is a plain ring, which may carry the latent of multi-latent attention in the place of K and V
    by_nodes:  what it sends depends on the nodes of the ranks, on which all must agree
    """

    masks: frozenset[MaskKind] = frozenset({"full", "causal", "window", "packed"})
    grid: Literal["none", "optional", "needed"] = "none"
    teams: bool = False
    placement: bool = False
    heads: Literal["none", "all", "axis"] = "none"
    chunks: bool = True
    over_time: bool = False
    any_positions: bool = True
    bias: bool = False
    softcap: bool = True
    sinks: Literal["after", "inside", "none"] = "after"
    weighed: Literal["always", "without window", "never"] = "always"
    planned: bool = False
    latent: bool = False
    by_nodes: bool = False


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One context-parallel algorithm.

    load:    imports the algorithm's loop
    what:    one line for tables
    traffic: what a rank sends; None for a backend that takes another's loop
    layout:  positions that its loop wants on a rank; None takes those that the tokens have
    """

    name: str
    load: Callable[[], Loop[Any]]
    paper: str
    what: str
    traffic: TrafficFormula | None = None
    aliases: tuple[str, ...] = ()
    layout: str | None = None
    capabilities: Capabilities = Capabilities()

    @property
    def needs_grid(self) -> bool:
        """True if the two axes must be given."""
        return self.capabilities.grid == "needed"

    @property
    def takes_grid(self) -> bool:
        """True if the two axes have an effect."""
        return self.capabilities.grid != "none"

    @property
    def sends(self) -> str:
        """Traffic in words, for tables."""
        return str(self.traffic) if self.traffic else "as the one it takes"

    def head_ranks(self, ranks: int, grid: Grid | None, axis: str) -> int:
        """Return how many ranks share the query heads of a rank, where `axis` of a grid exchanges heads."""
        if self.capabilities.heads == "axis":
            return grid.size(axis) if grid else 1
        return ranks if self.capabilities.heads == "all" else 1

    def weighs(self, mask: AnyMask, *, windows: bool = False) -> bool:
        """True if backend `auto` considers it under this mask, with a kernel that takes windows or not."""
        weighed = self.capabilities.weighed
        return weighed == "always" or (weighed == "without window" and (windows or not mask.window))
