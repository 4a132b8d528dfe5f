"""Activations that move to the host and back beside computation, as the pipeline's offload moves them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_check.kernels import dtype_on
from gpu_check.table import Row
from megatron_cp.comm import SingleFabric
from megatron_cp.context.attend import attend, plan
from megatron_cp.pipeline.clock import Clock
from megatron_cp.pipeline.saved import HostMover, SavedActivations, seconds_per_byte, storages_of


class AttentionLayer:
    """Projections around attention: a layer whose activations are large, and whose work grows faster."""

    def __init__(self, device: str, heads: int, dim: int, deterministic: bool) -> None:
        generator, width = torch.Generator(device).manual_seed(0), heads * dim
        self._plan = plan("zigzag", cp=SingleFabric(), deterministic=deterministic)
        self._heads = (heads, dim)
        made = (torch.randn(width, width, generator=generator, device=device) / width**0.5 for _ in range(4))
        self.weights = [weight.to(dtype_on(device)).requires_grad_() for weight in made]

    def __call__(self, x: Tensor) -> Tensor:
        queries, keys, values, last = self.weights
        q, k, v = ((x @ weight).unflatten(-1, self._heads) for weight in (queries, keys, values))
        return x + attend(q, k, v, self._plan, agreed=True).flatten(2) @ last


# four microbatches, of which a rank keeps two: the third and the fourth leave, and are back when they are due
ORDER = "F0 F1 F2 E2 F3 E3 B0 L2 B1 L3 B2 B3".split()


def offload(device: str) -> Iterator[Row]:
    """Move activations of attention to the host and back beside computation: gradients, and how much of it shows."""
    tokens, heads, dim, rounds = (65536, 16, 128, 3) if device == "cuda" else (256, 2, 32, 1)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(tokens, 1, heads * dim, generator=generator, device=device, dtype=dtype_on(device))
    kept, moved = (_stepped(AttentionLayer(device, heads, dim, True), x[: tokens // 8], moves) for moves in (0, 1))
    same = all(torch.equal(a, b) for a, b in zip(kept.gradients, moved.gradients, strict=True))
    yield Row("gradients with and without moves", {"equal to the bit": str(same)}, "ok" if same else "wrong")
    layer = AttentionLayer(device, heads, dim, False)
    _stepped(layer, x, 1)
    taken = [[_stepped(layer, x, moves) for moves in (0, 1)] for _ in range(rounds)]
    plain, moving = (min(one[at].seconds for one in taken) for at in (0, 1))
    size, copies = taken[0][1].moved, taken[0][1].copies
    figures = {"kept, ms": plain * 1e3, "moved, ms": moving * 1e3, "moved / kept": moving / plain}
    peaks = {"kept, peak GiB": taken[0][0].peak / 2**30, "moved, peak GiB": taken[0][1].peak / 2**30}
    away = {"GiB away and back": size / 2**30, "its copies alone, ms": copies * 1e3}
    yield Row(f"4 microbatches of {tokens} tokens, two of which move", figures | peaks | away)


class Stepped(NamedTuple):
    """One step: seconds, bytes moved away, seconds of their copies alone both ways, most bytes saved, gradients."""

    seconds: float
    moved: int
    copies: float
    peak: int
    gradients: tuple[Tensor, ...]


def _stepped(layer: AttentionLayer, x: Tensor, moves: int) -> Stepped:
    saved = SavedActivations(HostMover(x.device), x.device, lambda: storages_of(layer.weights))
    clock, made = Clock(x.device), {}
    totals = [torch.zeros_like(weight) for weight in layer.weights]

    def step() -> float:
        begun = clock.mark()
        saved.begin()
        for kind, micro in ((word[0], int(word[1])) for word in ORDER):
            if kind == "F":
                with saved.recording(0, micro) as chunk:
                    made[micro] = layer(x * (1 + micro))
                chunk.stays(made[micro])
            elif kind == "B":
                saved.use(0, micro)
                gradients = torch.autograd.grad(made.pop(micro).square().sum(), layer.weights)
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient
            elif moves:
                (saved.evict if kind == "E" else saved.load)(0, micro)
        saved.finish()
        ended = clock.mark()
        clock.settle()
        return clock.seconds(begun, ended)

    step()
    for total in totals:
        total.zero_()
    taken = step()
    copies = 2 * saved.moved * seconds_per_byte(saved.mover) if moves else 0.0
    return Stepped(taken, saved.moved, copies, saved.peak, tuple(totals))
