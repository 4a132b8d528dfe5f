"""Linears of all experts of a rank equal each expert's own, forward and backward, whatever the tokens of each."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_cp.experts import GROUPED_MM, LOOP, PRODUCTS
from megatron_cp.experts.function import GroupedCall, activated_linear, grouped_linear
from megatron_cp.experts.grouped_mm import lacking
from megatron_cp.experts.product import groups_of
from tests.tolerances import BF16_RATIO, EXACT

CPU = torch.device("cpu")
SIZES = {
    "equal": (4, 4, 4),
    "uneven": (7, 1, 12, 3),
    "first without rows": (0, 5, 3),
    "last without rows": (5, 3, 0),
    "two in the middle without rows": (2, 0, 0, 9),
    "all to one": (0, 11, 0),
    "no rows": (0, 0, 0),
    "one expert": (6,),
    "one row each": (1,) * 8,
    "64 experts, Zipf": tuple(200 // (rank + 1) for rank in range(64)),
}
INPUTS, OUTPUTS = 8, 16
# torch's grouped product takes no float64; products and sums of small whole numbers are exact in float32 too
DTYPES = {LOOP: torch.float64, GROUPED_MM: torch.float32}


def made(name, dtype=None):
    """A new product; skipped where this torch cannot compute it."""
    if name == GROUPED_MM and (reason := lacking("cpu", dtype or DTYPES[name])):
        pytest.skip(f"{name} {reason}")
    return PRODUCTS.get(name).load()()


class Drawn(NamedTuple):
    """Random whole numbers for a linear, and what a product for each row alone makes of them."""

    x: Tensor
    weights: tuple[Tensor, ...]
    dy: Tensor
    y: Tensor
    dx: Tensor
    dw: Tensor


def drawn(sizes, inputs=INPUTS, outputs=OUTPUTS):
    generator = torch.Generator().manual_seed(sum(sizes) + len(sizes))
    rows = sum(sizes)
    x, dy, w = (
        torch.randint(-8, 9, shape, generator=generator).double()
        for shape in ((rows, inputs), (rows, outputs), (len(sizes), outputs, inputs))
    )
    return of_rows(x, w, dy, sizes)


def of_rows(x, w, dy, sizes):
    """The linear of each row by the weight of its expert, in float64."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y, dx = torch.einsum("tk,tnk->tn", x, w[owner]), torch.einsum("tn,tnk->tk", dy, w[owner])
    dw = torch.zeros_like(w).index_add_(0, owner, torch.einsum("tn,tk->tnk", dy, x))
    return Drawn(x, w.unbind(), dy, y, dx, dw)


def error(found, expected):
    """Largest difference, relative to the largest element."""
    if not expected.numel():
        assert found.shape == expected.shape
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def errors(product, whole, groups, dtype=None):
    dtype = dtype or DTYPES[product.name]
    x, dy, weights = whole.x.to(dtype), whole.dy.to(dtype), [weight.to(dtype) for weight in whole.weights]
    dw = product.weight_gradients(dy, x, groups)
    assert [gradient.dtype for gradient in dw] == [dtype] * len(weights)
    pairs = (
        (product.forward(x, weights, groups), whole.y),
        (product.input_gradient(dy, weights, groups), whole.dx),
        (torch.stack(list(dw)), whole.dw),
    )
    assert all(found.isfinite().all() for found, _ in pairs)
    return [error(found, expected) if expected.any() else float(found.abs().sum()) for found, expected in pairs]


@pytest.mark.parametrize("name", PRODUCTS.names)
@pytest.mark.parametrize("case", SIZES)
def test_a_product_of_all_experts_is_each_experts_own(name, case):
    sizes = SIZES[case]
    product = made(name)
    assert max(errors(product, drawn(sizes), groups_of(sizes, CPU))) < EXACT
    assert product.calls == 1


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [(LOOP, 3, 2), (LOOP, 1, 1), (GROUPED_MM, 64, 4), (GROUPED_MM, 4, 64)],
)
def test_any_widths_do(name, inputs, outputs):
    sizes = SIZES["uneven"]
    assert max(errors(made(name), drawn(sizes, inputs, outputs), groups_of(sizes, CPU))) < EXACT


@pytest.mark.parametrize("name", PRODUCTS.names)
def test_low_precision_loses_what_a_product_for_each_expert_does(name):
    sizes = SIZES["64 experts, Zipf"]
    generator = torch.Generator().manual_seed(1)
    whole, groups = drawn(sizes, 64, 64), groups_of(sizes, CPU)
    x, dy = (torch.randn(each.shape, generator=generator).double() for each in (whole.x, whole.dy))
    whole = of_rows(x, torch.stack([w + torch.randn(w.shape, generator=generator) for w in whole.weights]), dy, sizes)
    assert max(errors(made(name, torch.float32), whole, groups, torch.float32)) < 1e-5
    found = errors(made(name, torch.bfloat16), whole, groups, torch.bfloat16)
    own = errors(made(LOOP), whole, groups, torch.bfloat16)
    assert all(ours < BF16_RATIO * apart for ours, apart in zip(found, own, strict=True))


def leaves(whole, name, frozen=()):
    dtype = DTYPES[name]
    x = whole.x.to(dtype).clone().requires_grad_()
    weights = tuple(w.to(dtype).clone().requires_grad_(at not in frozen) for at, w in enumerate(whole.weights))
    return x, weights


@pytest.mark.parametrize("name", PRODUCTS.names)
@pytest.mark.parametrize("case", ["uneven", "all to one", "no rows"])
def test_autograd_has_both_gradients_and_one_for_each_weight(name, case):
    whole, groups = drawn(SIZES[case]), groups_of(SIZES[case], CPU)
    x, weights = leaves(whole, name)
    # a gradient whose rows do not lie one after the other
    grouped_linear(GroupedCall(made(name), groups, weights), x).backward(whole.dy.to(x).t().contiguous().t())
    assert error(x.grad, whole.dx) < EXACT
    found = torch.stack([weight.grad for weight in weights])
    assert float((found - whole.dw).abs().sum()) <= EXACT * float(whole.dw.abs().sum())


@pytest.mark.parametrize("name", PRODUCTS.names)
def test_the_weight_half_may_be_computed_elsewhere_and_later(name):
    sizes = SIZES["two in the middle without rows"]
    whole, groups, waiting = drawn(sizes), groups_of(sizes, CPU), []
    x, weights = leaves(whole, name)
    call = GroupedCall(made(name), groups, weights, lambda half, dy, x: waiting.append((half, dy, x)))
    grouped_linear(call, x).backward(whole.dy.to(x))
    assert error(x.grad, whole.dx) < EXACT
    assert [weight.grad for weight in weights] == [None] * len(sizes)
    ((half, dy, kept),) = waiting
    assert error(torch.stack(list(half(dy, kept))), whole.dw) < EXACT


def gated(x, probs):
    gate, value = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value * probs.unsqueeze(-1)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", PRODUCTS.names)
def test_an_activation_that_is_computed_again_has_equal_gradients_and_is_not_kept(name, later):
    sizes = SIZES["uneven"]
    whole, groups, dtype = drawn(sizes), groups_of(sizes, CPU), DTYPES[name]
    found, kept = [], []
    for again in (False, True):
        waiting = []
        elsewhere = (lambda half, dy, x, to=waiting: to.append((half, dy, x))) if later else None
        _, weights = leaves(whole, name)
        x = (torch.cat([whole.x, whole.x.flip(0)], 1) / 8).to(dtype).requires_grad_()
        probs = torch.linspace(0.1, 1, len(x), dtype=dtype).requires_grad_()
        call = GroupedCall(made(name), groups, weights, elsewhere)
        sizes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes_kept: to.append(t.shape) or t, lambda t: t):
            y = activated_linear(call, gated, x, probs) if again else grouped_linear(call, gated(x, probs))
        y.backward(whole.dy.to(dtype))
        of_weights = list(waiting[0][0](*waiting[0][1:])) if later else [weight.grad for weight in weights]
        found.append([y.detach(), x.grad, probs.grad, *of_weights])
        kept.append(sizes_kept)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert kept[0].count(torch.Size([len(whole.x), INPUTS])) > 1
    assert kept[1] == [torch.Size([len(whole.x), 2 * INPUTS]), torch.Size([len(whole.x)])]


class Watched:
    """A product that notes which of its parts were asked for."""

    name = "watched"

    def __init__(self):
        self.calls, self.parts, self._product = 0, [], made(LOOP)

    def forward(self, *given):
        return self._product.forward(*given)

    def input_gradient(self, *given):
        self.parts.append("input")
        return self._product.input_gradient(*given)

    def weight_gradients(self, *given):
        self.parts.append("weights")
        return self._product.weight_gradients(*given)


def test_what_needs_no_gradient_costs_no_product():
    sizes = SIZES["equal"]
    whole, groups = drawn(sizes), groups_of(sizes, CPU)
    for of_x, frozen, parts in ((True, (0, 1, 2), ["input"]), (False, (), ["weights"]), (True, (1,), None)):
        product = Watched()
        x, weights = leaves(whole, LOOP, frozen)
        x = x if of_x else x.detach()
        grouped_linear(GroupedCall(product, groups, weights), x).backward(whole.dy)
        assert product.parts == (parts or ["input", "weights"])
        assert [weight.grad is None for weight in weights] == [at in frozen for at in range(3)]


def test_sizes_may_be_a_tensor_or_numbers():
    for sizes in ((3, 0, 2), torch.tensor([3, 0, 2])):
        groups = groups_of(sizes, CPU)
        assert groups.sizes == (3, 0, 2)
        assert groups.ends.tolist() == [3, 3, 5]
        assert groups.ends.dtype == torch.int32
        assert list(groups.filled) == [(0, slice(0, 3)), (2, slice(3, 5))]
