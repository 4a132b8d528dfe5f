"""How much an algorithm sends: a formula that is evaluated and printed from one text."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_cp.grid import Grid

OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
TOKEN = re.compile(r"\d+|Uq|Us|Ug|[A-Za-z]|[-+/()]")


class Formula:
    """An expression such as "(p-1)/p (2Uq + 2U)", called with the values of its names.

    Names are Uq, Us, Ug or one letter. Factors next to each other are multiplied.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        tokens = TOKEN.findall(text)
        if "".join(tokens) != text.replace(" ", ""):
            raise ValueError(f"not a formula: {text!r}")
        code = "".join(
            f"{'*' if _is_factor_end(before) and _is_factor_start(token) else ''}{token}"
            for before, token in zip(["+", *tokens], tokens, strict=False)
        )
        self._tree = ast.parse(code, mode="eval").body

    def __str__(self) -> str:
        return self.text

    def __call__(self, **values: float) -> float:
        return _value(self._tree, values)


def _is_factor_start(token: str) -> bool:
    return token.isalnum() or token == "("


def _is_factor_end(token: str) -> bool:
    return token.isalnum() or token == ")"


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_value(left, values), _value(right, values))
    raise ValueError(f"not part of a formula: {ast.unparse(node)}")


class LocalSizes(NamedTuple):
    """Attention on each of p ranks: s tokens of b sequences, h query heads and g KV heads of dim d."""

    p: int
    s: int
    b: int
    h: int
    g: int
    d: int


class Elements(NamedTuple):
    """Elements sent in the dtype of the inputs, and those in the accumulator's (row statistics, sums of gradients)."""

    inputs: float
    sums: float

    def size(self, itemsize: int, sums_itemsize: int) -> float:
        """Return the bytes of elements of these sizes."""
        return self.inputs * itemsize + self.sums * sums_itemsize


Sense = Literal["rank", "mean", "at most"]


@dataclass(frozen=True, kw_only=True)
class TrafficFormula:
    """Elements that a rank sends in each pass, on the layout that the loop wants.

    In formulas p is the number of ranks, U = s b g d elements of one of K or V, Uq = s b h d of the queries,
    Us = s b h row statistics and Ug = s b g d of one of dK or dV, the last two in the accumulator's dtype; the two
    letters of `axes` are the sizes of the grid's inner and outer axis.

    full:         formula of the forward pass under full attention
    causal:       formula under a causal mask, or a share of `full` such as "3/4 of it"; empty for the same
    backward:     `full` of the backward pass; empty if it is not stated
    backward_causal: `causal` of the backward pass, if it is no share of it; empty for the same
    sense:        of `full`: "rank", exact on every rank; "mean", exact as a mean over the ranks; "at most", a bound of
                  the mean
    causal_sense: of `causal`
    per_kv_head:  holds where the ranks that share heads divide the KV heads; fewer KV heads are sent to several ranks
    where:        further words of the table
    """

    full: str
    causal: str = ""
    backward: str = ""
    backward_causal: str = ""
    sense: Sense = "rank"
    causal_sense: Sense = "mean"
    axes: str = ""
    per_kv_head: bool = False
    where: str = ""

    def __str__(self) -> str:
        return self.text()

    def text(self, *, backward: bool = False) -> str:
        """Return the formula of a pass for tables, that of the forward pass with its further words."""
        full, causal = self._formulas(backward)
        bounds = ["at most " if sense == "at most" else "" for sense in (self.sense, self.causal_sense)]
        causal = f"causal {bounds[1]}{causal}" if causal else ""
        return ", ".join(part for part in (bounds[0] + full, causal, "" if backward else self.where) if part)

    def sense_of(self, causal: bool) -> Sense:
        """Return what the formula of a mask promises."""
        return self.causal_sense if causal and self.causal else self.sense

    def elements(
        self, sizes: LocalSizes, *, causal: bool, grid: Grid | None = None, backward: bool = False
    ) -> Elements:
        """Evaluate the formula of full or causal attention; a formula with axes takes their sizes from `grid`."""
        p, s, b, h, g, d = sizes
        names: dict[str, float] = {"p": p, **dict(zip(self.axes, grid.sizes if grid else (), strict=False))}
        inputs, sums = {"U": s * b * g * d, "Uq": s * b * h * d}, {"Us": s * b * h, "Ug": s * b * g * d}
        kinds = {**inputs, **dict.fromkeys(sums, 0)}, {**dict.fromkeys(inputs, 0), **sums}
        full, of_causal = self._formulas(backward)
        return Elements(*(_evaluate(full, of_causal if causal else "", {**names, **kind}) for kind in kinds))

    def _formulas(self, backward: bool) -> tuple[str, str]:
        """Return the formulas of a pass under full attention and under a causal mask."""
        if not backward:
            return self.full, self.causal
        return self.backward, self.backward_causal or self.causal


def _evaluate(full: str, causal: str, names: Mapping[str, float]) -> float:
    whole = Formula(full)(**names)
    if not causal:
        return whole
    share = causal.removesuffix(" of it")
    return whole * Formula(share)() if share != causal else Formula(causal)(**names)
