"""Refusals of what a backend cannot do; each names the backends that can, by the capabilities in their entries."""

from collections.abc import Callable

from megatron_cp.context import AUTO, BACKENDS, DEFAULT
from megatron_cp.context.backend import PLACEMENTS, Backend, MaskKind
from megatron_cp.context.documents import Documents
from megatron_cp.context.layouts import length
from megatron_cp.context.masks import AnyMask, Pieces
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid, team_sizes


def able(to: Callable[[Backend], bool], show: Callable[[str], str] = repr) -> str:
    """Name the backends for which `to` is true, for a message."""
    return " or ".join(show(entry.name) for entry in BACKENDS if to(entry))


def check_mask(entry: Backend, mask: AnyMask) -> None:
    """Raise Refused for a mask that the algorithm cannot do."""
    kind = kind_of(mask)
    if kind not in entry.capabilities.masks:
        raise Refused(
            f"backend {entry.name!r} does {' and '.join(sorted(entry.capabilities.masks))} attention only, got a "
            f"{kind} mask; use backend {able(lambda other: kind in other.capabilities.masks)}"
        )


def check_documents(packed: Documents, tokens: int, ranks: int) -> None:
    """Raise Refused for documents of another sequence than the one that the ranks hold."""
    if packed.tokens != tokens:
        raise Refused(
            f"documents must end where the sequence does, at S = {tokens} on {ranks} ranks, got cu_seqlens that "
            f"end at {packed.tokens}; " + ("pads are one more document" if packed.tokens < tokens else "cut the last")
        )
    held = None if packed.layout is None else [length(runs) for runs in packed.layout]
    if held is not None and held != [tokens // ranks] * ranks:
        raise Refused(
            f"the layout that documents are cut by must give each of {ranks} ranks {tokens // ranks} tokens, got "
            f"{len(held)} ranks with {min(held)} to {max(held)}; plan it for these ranks: documents.planned"
        )


def check_document_layout(entry: Backend, name: str, chunks: int | None) -> None:
    """Raise Refused for an algorithm that works on positions of its own, not on those of a document layout."""
    if not takes_document_layout(entry) or chunks is not None:
        what = "cut into chunks " if chunks is not None else ""
        raise Refused(
            f"backend {entry.name!r} {what}works on a layout of its own, got document layout {name!r}; use backend "
            f"{able(takes_document_layout)} without chunks, or leave it out"
        )


def takes_document_layout(entry: Backend) -> bool:
    """True if the algorithm works on the positions that the ranks' tokens have, whatever they are."""
    return entry.layout is None and entry.capabilities.any_positions


def kind_of(mask: AnyMask) -> MaskKind:
    """Return which kind of mask this is."""
    if isinstance(mask, Pieces):
        return "packed"
    if mask.window:
        return "window"
    return "causal" if mask.causal else "full"


def check_grid(entry: Backend, grid: Grid) -> None:
    """Raise Refused for a grid that the algorithm cannot take."""
    if entry.capabilities.teams and grid.inner not in (possible := team_sizes(grid.ranks)):
        raise Refused(
            f"backend {entry.name!r} needs context_parallel_size divisible by the square of its teams' size, the inner "
            f"hierarchical size, got {grid.ranks} and {grid.inner}; possible are {', '.join(map(str, possible))}, "
            f"backend {able(takes_any_grid)} takes any"
        )


def takes_any_grid(entry: Backend) -> bool:
    """True if the algorithm itself runs on any grid of its ranks, or without one."""
    return entry.capabilities.grid == "optional" and not entry.capabilities.teams and entry.name != AUTO


def check_placement(entry: Backend, placement: str) -> None:
    """Raise Refused for a placement other than the first where it has no effect."""
    if not entry.capabilities.placement and placement != next(iter(PLACEMENTS)):
        raise Refused(
            f"placement says which axis exchanges heads, got {placement!r} with backend {entry.name!r}, which does not "
            f"ask; use backend {able(lambda other: other.capabilities.placement)} or leave it out"
        )


def check_sinks(entry: Backend) -> None:
    """Raise Refused for an algorithm whose results a sink cannot be merged into."""
    if entry.capabilities.sinks == "none":
        raise Refused(
            f"backend {entry.name!r} does not merge sinks; use backend "
            f"{able(lambda other: other.capabilities.sinks != 'none')} or leave the sink out"
        )


def check_latent(entry: Backend) -> None:
    """Raise Refused for an algorithm that is no plain ring, in which latents may travel."""
    if not entry.capabilities.latent:
        raise Refused(
            f"backend {entry.name!r} sends keys and values, no latent; use backend "
            f"{able(lambda other: other.capabilities.latent)}"
        )


def check_softcap(entry: Backend) -> None:
    """Raise Refused for an algorithm that computes scores without a kernel."""
    if not entry.capabilities.softcap:
        raise Refused(
            f"backend {entry.name!r} does not cap scores; use backend "
            f"{able(lambda other: other.capabilities.softcap)} or leave softcap out"
        )


def check_dropout(entry: Backend) -> None:
    """Raise Refused for an algorithm that computes weights without a kernel."""
    if not entry.capabilities.softcap:
        raise Refused(
            f"backend {entry.name!r} does not drop weights; use backend "
            f"{able(lambda other: other.capabilities.softcap)} or leave dropout out"
        )


def check_can_chunk(entry: Backend) -> None:
    """Raise Refused for an algorithm that cannot be cut into chunks over time."""
    if not entry.capabilities.chunks:
        raise Refused(f"backend {entry.name!r} cannot be cut into chunks; leave chunks out or use {DEFAULT!r}")


def check_heads(entry: Backend, heads: int, ranks: int, grid: Grid | None, axis: str) -> None:
    """Raise Refused for more ranks than query heads where the algorithm shares heads among ranks."""
    sharing = entry.head_ranks(ranks, grid, axis)
    if sharing > heads:
        raise Refused(
            f"{sharing} ranks cannot share {heads} query heads; exchange heads among at most {heads} ranks (backend "
            f"{able(lambda other: other.capabilities.heads == 'axis')}) or use backend {DEFAULT!r}"
        )
