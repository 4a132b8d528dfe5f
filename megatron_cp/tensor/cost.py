"""Seconds of a layer's linears under each scheme on a cluster, and the scheme that takes least.

The same in GSPMD's terms (arXiv:2105.04663): a linear gathers tokens, weights or some of both, and the choice is one
grid (t, w) of the p ranks. All grids are priced, so that the least is exact; nothing is propagated over a graph.

Assumed overlap: engine `ring` hides its messages behind products, except those of one piece; engine `collective`
hides nothing; Megatron's own linears hide the collectives of a backward beside its two products, except the gather
that undoes a reduce-scatter. Weights, their gradients and the exchange around attention are never hidden, but for
engine `panels`, which hides weights and their gradients, except one shard, and no tokens.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from megatron_cp.dtypes import BYTES
from megatron_cp.grid import divisors
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.operations import Product, collective_seconds
from megatron_cp.tensor import AUTO, CUBE, DEFAULT_ENGINE, FLUX, MEGATRONS, PANELS, RING
from megatron_cp.tensor.place import CUBES, GridSize, cube_side
from megatron_cp.tensor.traffic import (
    LinearSize,
    SentElements,
    cube_backward,
    cube_exchange,
    cube_forward,
    grid_backward,
    grid_forward,
    heads_exchange,
    rest,
)


class LayerLinears(NamedTuple):
    """The linears of one layer over a whole tensor-parallel group, for the tokens of a microbatch.

    attention: features of queries, keys and values together
    query:     features of queries, which the output projection takes
    first:     outputs of the MLP's first linear, gate and values together
    second:    inputs of its second one; 0 for a layer without a dense MLP
    """

    tokens: float
    hidden: float
    attention: float
    query: float
    first: float
    second: float

    @property
    def linears(self) -> list[LinearSize]:
        """Sizes of all of them."""
        found = [
            LinearSize(self.tokens, self.hidden, self.attention, True),
            LinearSize(self.tokens, self.query, self.hidden, False),
        ]
        if not self.second:
            return found
        return [
            *found,
            LinearSize(self.tokens, self.hidden, self.first, True),
            LinearSize(self.tokens, self.second, self.hidden, False),
        ]

    @property
    def of_attention(self) -> "LayerLinears":
        """The layer without its MLP."""
        return self._replace(first=0.0, second=0.0)

    def sent(self, size: GridSize, *, split: bool) -> tuple[float, float]:
        """Return the elements that a rank sends over the token axis and over the weight axis, in both passes."""
        total, weights = SentElements(), 0.0
        for linear in self.linears:
            total = total.plus(grid_forward(linear, *size)).plus(grid_backward(linear, *size, split=split))
            # gathered in both passes, and its gradient scattered
            weights += 3 * linear.weight / size.tokens * rest(size.weights)
        heads = 2 * heads_exchange(self.tokens, self.attention + self.query, *size).exchange
        return total.total - weights, weights + heads

    def sent_on_cube(self, side: int, *, split: bool) -> float:
        """Return the elements that a rank sends in both passes with its MLP on a cube and attention as flux."""
        total = sum(self.of_attention.sent(GridSize(side**3, 1), split=split))
        for linear in self.linears[2:]:
            total += cube_forward(linear, side).total + cube_backward(linear, side, split=split).total
            # tokens for features on one side of each linear, in both passes
            total += 2 * cube_exchange(self.tokens, self.hidden, side).total
        return total

    def at_work_on_cube(self, side: int) -> float:
        """Return the most elements that one linear of an MLP on a cube gathers and makes at once."""
        most = 0.0
        for size in self.linears[2:]:
            x, y, weight = (
                elements / side**2 for elements in (size.tokens * size.inputs, size.tokens * size.outputs, size.weight)
            )
            # 1. forward: x and the weight gathered, y before and after it is added up
            # 2. backward: dy and the weight gathered, dx before and after, the weight's gradient before and after
            forward, backward = x + weight + y * (1 + 1 / side), y + weight + x * (1 + 1 / side) + weight
            most = max(most, forward, backward)
        return most


class Placing(NamedTuple):
    """A scheme, its grid and the engine of its linears."""

    scheme: str
    size: GridSize
    engine: str = DEFAULT_ENGINE

    @property
    def pieces(self) -> int:
        """Products that one product over the tokens of all ranks becomes."""
        ring = self.engine == RING or (self.engine == PANELS and self.size.weights == 1)
        return self.size.tokens if self.scheme != MEGATRONS and ring else 1

    @property
    def panels(self) -> int:
        """Products that one product with the weight of all ranks becomes."""
        return self.size.weights if self.engine == PANELS else 1

    @property
    def output_pieces(self) -> int:
        """Products that the one of the output layer becomes, whose tokens all ranks gather."""
        return self.size.grid.ranks if self.scheme != MEGATRONS and self.engine in (RING, PANELS) else 1

    def __str__(self) -> str:
        grid = f" on {self.size}" if self.size.weights > 1 else ""
        return f"{self.scheme}{grid}"


class LinearTimes(NamedTuple):
    """Seconds of a layer's linears for one microbatch.

    products: of one pass; forward, input gradients and weight gradients take equally long
    forward, input, weight: communication that no product hides
    """

    products: float
    forward: float
    input: float
    weight: float

    @property
    def total(self) -> float:
        """Seconds of a forward and a whole backward."""
        return 3 * self.products + self.forward + self.input + self.weight


def linear_times(layer: LayerLinears, placing: Placing, cluster: Cluster, dtype: str, *, split: bool) -> LinearTimes:
    """Return the seconds of a layer's linears; with `split` weight gradients are computed apart."""
    if placing.scheme == CUBE:
        return _on_cube(layer, placing, cluster, dtype, split=split)
    (tokens, weights), stored = placing.size, BYTES[dtype]
    products = sum(_product(linear, placing).seconds(cluster, dtype, stored) for linear in layer.linears)
    size = layer.tokens / weights * layer.hidden * stored
    gather, scatter = (collective_seconds(cluster, kind, size, tokens, weights) for kind in ("gather", "scatter"))
    pairs = len(layer.linears) // 2
    whole = sum(linear.weight for linear in layer.linears) / tokens * stored
    gathered, reduced = (collective_seconds(cluster, kind, whole, weights, 1) for kind in ("gather", "scatter"))
    heads = layer.tokens / tokens * (layer.attention + layer.query) * stored / weights
    exchanged = collective_seconds(cluster, "gather", heads, weights, 1) if weights > 1 else 0.0
    forward = pairs * (gather + scatter)
    if placing.scheme == MEGATRONS:
        behind = gather + scatter if cluster.inside.busy_s_per_byte else 0.0
        return LinearTimes(products, forward, pairs * (gather + behind), 0.0)
    # where computing ranks move the bytes themselves, nothing is hidden
    share, of_weights = (1.0, 1.0) if cluster.inside.busy_s_per_byte else (1 / placing.pieces, 1 / placing.panels)
    # x is gathered for weight gradients, and dy once more where they come apart
    late = pairs * gather * (2 if split else 1) * share
    early = forward * share + gathered * of_weights + exchanged
    return LinearTimes(products, early, early, late + reduced * of_weights)


def _on_cube(layer: LayerLinears, placing: Placing, cluster: Cluster, dtype: str, *, split: bool) -> LinearTimes:
    """Return the times of attention as flux and of the MLP on a cube, whose communication nothing hides."""
    one = placing._replace(scheme=FLUX)
    times = linear_times(layer.of_attention, one, cluster, dtype, split=split)
    side, stored = cube_side(placing.size.tokens), BYTES[dtype]
    for size in layer.linears[2:]:
        # rank (i, j, k) is i l^2 + j l + k; the second linear has j and k exchanged
        strides = (side, 1) if size.column else (1, side)
        sizes = size.tokens * size.inputs, size.tokens * size.outputs, size.weight
        x, y, weight = (
            collective_seconds(cluster, "gather", elements / side**2 * stored, side, stride)
            for elements, stride in zip(sizes, (*strides, side**2), strict=True)
        )
        product = Product(size.tokens / side, size.inputs / side, size.outputs / side)
        heads = layer.tokens * layer.hidden / side**3 * stored
        exchange = collective_seconds(cluster, "gather", heads, side, 1)
        times = LinearTimes(
            times.products + product.seconds(cluster, dtype, stored),
            times.forward + x + weight + y + exchange,
            times.input + x + weight + y + exchange,
            times.weight + x + weight + (y if split else 0.0),
        )
    return times


def _product(linear: LinearSize, placing: Placing) -> Product:
    size, pieces, panels = placing.size, placing.pieces, placing.panels
    rows, parts, times = linear.tokens / size.weights / pieces, size.tokens * panels, pieces * panels
    if linear.column:
        return Product(rows, linear.inputs, linear.outputs / parts, times)
    return Product(rows, linear.inputs / parts, linear.outputs, times)


def placings(ranks: int) -> Iterator[Placing]:
    """Yield every scheme and grid of so many tensor-parallel ranks."""
    yield Placing(MEGATRONS, GridSize(ranks, 1))
    yield Placing(FLUX, GridSize(ranks, 1))
    for weights in divisors(ranks)[1:]:
        yield Placing("2d", GridSize(ranks // weights, weights))
    if ranks in CUBES:
        yield Placing(CUBE, GridSize(ranks, 1))


def _divides(layer: LayerLinears, placing: Placing) -> bool:
    """True if a cube can cut the weights of the layer's MLP along both of their axes."""
    if placing.scheme != CUBE:
        return True
    parts = cube_side(placing.size.tokens) ** 2
    return layer.second > 0 and layer.hidden % parts == 0 and layer.second % parts == 0


class Cheapest(NamedTuple):
    """The scheme that takes least, and why in one line."""

    placing: Placing
    why: str


def cheapest(
    layer: LayerLinears,
    ranks: int,
    cluster: Cluster,
    dtype: str,
    *,
    split: bool,
    bias: bool = False,
    scheme: str = AUTO,
    among: Collection[str] = (),
    engine: str = DEFAULT_ENGINE,
) -> Cheapest:
    """Return the scheme and grid whose linears take least, forward and backward.

    bias:   the MLP has biases, which a grid does not gather
    scheme: the only one to consider, for its grid
    among:  schemes to consider where none is named, by default all
    engine: of all linears but Megatron's own
    """
    possible = (one._replace(engine=engine) for one in placings(ranks))
    allowed = [one for one in possible if not bias or (one.size.weights == 1 and one.scheme != CUBE)]
    allowed = [one for one in allowed if _divides(layer, one) and (not among or one.scheme in among)]
    if scheme != AUTO:
        # 2.5d is 2d beside another axis
        allowed = [one._replace(scheme=scheme) for one in allowed if one.scheme == "2d"]
    times = {one: linear_times(layer, one, cluster, dtype, split=split).total for one in allowed}
    ranked = sorted(times, key=lambda one: times[one])
    first, *others = ranked
    beside = f", {others[0]} {times[others[0]] * 1e3:.3g} ms" if others else ""
    what = f"{times[first] * 1e3:.3g} ms for the linears of a layer and microbatch on {cluster.name}{beside}"
    return Cheapest(first, f"{first} takes {what}")
