"""Inputs that attention does not take: one line, the same on every rank, before anything but a comparison is sent."""

import math

import pytest
import torch

from megatron_cp.comm import GroupFabric
from megatron_cp.context import BACKENDS, opaque
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.bias import attend_with_bias, attention_probabilities
from megatron_cp.context.sharding import unshard
from megatron_cp.context.slices import KeptKeys, attend_slice
from tests.cases import slow_unless
from tests.context.test_modes import made
from tests.ranks import run_ranks

TOKENS, HEADS = 24, 4


def x(*shape, dtype=torch.float32, **options):
    return torch.zeros(shape or (TOKENS, 1, HEADS, 8), dtype=dtype, **options)


def nested():
    return torch.nested.nested_tensor([x(4, 8), x(5, 8)], layout=torch.jagged)


# the same on all ranks: q, k, v and the start of the text
UNFIT = {
    "t h d": (lambda: [x(TOKENS, HEADS, 8)] * 3, "q must be s b h d, got 3 dims (24, 4, 8); packed tensors"),
    "five dims": (lambda: [x(TOKENS, 1, 1, HEADS, 8)] * 3, "q must be s b h d, got 5 dims (24, 1, 1, 4, 8)"),
    "no dims": (lambda: [torch.zeros(())] * 3, "q must be s b h d, got 0 dims ()"),
    "None": (lambda: [x(), None, x()], "k must be a tensor s b h d, got NoneType"),
    "a list": (lambda: [x(), x(), [1.0]], "v must be a tensor s b h d, got list"),
    "nested": (lambda: [nested()] * 3, "q must be a dense tensor s b h d, got a nested one; packed tensors"),
    "sparse": (lambda: [x().to_sparse()] * 3, "q must be a dense tensor s b h d, got a torch.sparse_coo one"),
    "s = 0": (lambda: [x(0, 1, HEADS, 8)] * 3, "q (s b h d) must have tokens s of 1 or more, got (0, 1, 4, 8)"),
    "h = 0": (lambda: [x(TOKENS, 1, 0, 8)] * 3, "q (s b h d) must have heads of 1 or more, got (24, 1, 0, 8)"),
    "g = 0": (lambda: [x(), *[x(TOKENS, 1, 0, 8)] * 2], "k (s b h d) must have heads of 1 or more"),
    "d = 0": (lambda: [x(TOKENS, 1, HEADS, 0)] * 3, "q (s b h d) must have head dim d of 1 or more"),
    "int64": (lambda: [x(dtype=torch.int64)] * 3, "q must be of dtype float64 or float32 or bfloat16 or float16, got"),
    "complex": (lambda: [x(dtype=torch.complex64)] * 3, "q must be of dtype float64 or float32"),
    "float8": (lambda: [x().to(torch.float8_e4m3fn)] * 3, "q must be of dtype float64 or float32"),
    "two dtypes": (lambda: [x(), x(dtype=torch.float64), x()], "q, k and v must have one dtype, got torch.float32, "),
    "two devices": (lambda: [x(), x(), x(device="meta")], "q, k and v must be on one device, got cpu, cpu and meta"),
    "k unlike v": (lambda: [x(), x(), x(TOKENS, 1, 2, 8)], "k and v must agree in tokens, batch and heads, got (24, "),
    "q unlike k": (lambda: [x(), *[x(TOKENS, 2, HEADS, 8)] * 2], "q and k must agree in tokens, batch and head dim"),
    "three KV heads": (lambda: [x(), *[x(TOKENS, 1, 3, 8)] * 2], "query heads must be a multiple of KV heads, got 4"),
}
# on the last rank only, where all others hold x(): q, k, v, other arguments of the plan, and the start of the text,
# with LAST for that rank
ONE_RANK = {
    "longer": (lambda: [x(2 * TOKENS, 1, HEADS, 8)] * 3, {}, "all ranks must hold equally many tokens, got rank 0: 24"),
    "no tokens": (lambda: [x(0, 1, HEADS, 8)] * 3, {}, "all ranks must hold equally many tokens, got rank 0: 24"),
    "no batch": (lambda: [x(TOKENS, 0, HEADS, 8)] * 3, {}, "all ranks must hold tensors of one shape (s, b, h, d)"),
    "t h d": (
        lambda: [x(TOKENS, HEADS, 8)] * 3,
        {},
        "all ranks must hold tensors of one shape (s, b, h, d), got rank 0",
    ),
    "None": (lambda: [None] * 3, {}, "all ranks must hold equally many tokens, got rank 0: 24"),
    "bfloat16": (
        lambda: [x(dtype=torch.bfloat16)] * 3,
        {},
        "all ranks must hold tensors of one dtype, got rank 0: flo",
    ),
    "gradients": (lambda: [x(requires_grad=True)] * 3, {}, "all ranks must want gradients or none, got rank 0: no"),
    "window": (lambda: [x()] * 3, {"window": (3, 0)}, "all ranks must attend by one plan, got rank 0: "),
    "scale": (lambda: [x()] * 3, {"softmax_scale": 0.1}, "all ranks must attend by one plan, got rank 0: "),
    "causal": (lambda: [x()] * 3, {"causal": False}, "all ranks must attend by one plan, got rank 0: "),
    "sparse": (
        lambda: [x().to_sparse()] * 3,
        {},
        "rank LAST: q must be a dense tensor s b h d, got a torch.sparse_coo",
    ),
    "two devices": (lambda: [x(), x(), x(device="meta")], {}, "rank LAST: q, k and v must be on one device, got cpu, "),
    "int64": (lambda: [x(dtype=torch.int64)] * 3, {}, "rank LAST: q must be of dtype float64 or float32"),
}
# other arguments of the call, on the last rank only
ONE_CALL = {
    "ends that fall": ({"documents": [0, 9, 4, 24]}, "rank LAST: cu_seqlens must"),
    "documents too short": ({"documents": [0, 5]}, "rank LAST: "),
    "no number": ({"sink": math.nan}, "rank LAST: sink must be a number below infinity, got nan"),
    "sink of three heads": (
        {"sink": torch.zeros(3)},
        "rank LAST: sink must have a logit for each of the 4 query heads",
    ),
    "sparse sink": (
        {"sink": torch.zeros(HEADS).to_sparse()},
        "rank LAST: sink must be a dense tensor h or b h, got a ",
    ),
    "sparse documents": ({"documents": torch.tensor([0, 48]).to_sparse()}, "rank LAST: cu_seqlens must be whole"),
    "a huge sink": ({"sink": 10**400}, "rank LAST: sink must be a number below infinity, got inf"),
    "another sink": ({"sink": 5.0}, "all ranks must attend by one plan, got rank 0: "),
    "a seed without dropout": ({"dropout_seed": 3}, "rank LAST: dropout_seed is for a plan that drops weights"),
}


def text_of(call, *args, **choices):
    try:
        call(*args, **choices)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def refusals(backends):
    """What calls say by backend and input, with what has been sent; good calls stand between them."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fabric, found = GroupFabric(dist.group.WORLD), {}
    last = fabric.rank == fabric.size - 1
    for backend in backends:
        how = made(fabric, backend)
        attend(x(), x(), x(), how)
        for name, (inputs, _) in UNFIT.items():
            found[backend, "all", name] = text_of(attend, *inputs(), how)
        for agreed in (False, True) if fabric.size > 1 else ():
            for name, (inputs, other, _) in ONE_RANK.items():
                # groups of a grid are made by all ranks together
                another = made(fabric, backend, **other)
                tensors, plan_here = (inputs(), another) if last else ([x()] * 3, how)
                before = fabric.sent
                found[backend, "agreed" if agreed else "one", name] = text_of(
                    attend, *tensors, plan_here, agreed=agreed
                )
                assert fabric.sent == before
                attend(x(), x(), x(), how, agreed=agreed)
        for name, (given, _) in ONE_CALL.items() if fabric.size > 1 else ():
            found[backend, "call", name] = text_of(
                attend, x(), x(), x(), how, **{"sink": 0.0, **(given if last else {})}
            )
            attend(x(), x(), x(), how)
        empty = [x(TOKENS, 0, HEADS, 8, requires_grad=True) for _ in "qkv"]
        attend(*empty, how).sum().backward()
        assert all(each.grad.shape == each.shape for each in empty)
    dist.barrier()
    return found


# each on one number of ranks
GRIDS = [entry.name for entry in BACKENDS if entry.needs_grid]
OTHERS = [name for name in BACKENDS.names if name not in GRIDS]
FEW, SOME = OTHERS[::2], OTHERS[1::2]


@pytest.mark.parametrize(
    ("ranks", "backends"),
    slow_unless([(2, ["zigzag"])], [(2, ["zigzag"]), (1, BACKENDS.names), (2, FEW), (3, SOME), (4, GRIDS)]),
)
def test_unfit_inputs_are_one_line_on_every_rank(ranks, backends):
    first, *others = run_ranks(ranks, refusals, backends)
    assert all(found == first for found in others)
    assert len(first) == len(backends) * (len(UNFIT) + (2 * len(ONE_RANK) + len(ONE_CALL)) * (ranks > 1))
    starts = {"all": UNFIT, "one": ONE_RANK, "agreed": ONE_RANK, "call": ONE_CALL}
    for (_, kind, name), text in first.items():
        assert text.startswith(starts[kind][name][-1].replace("LAST", str(ranks - 1))), (kind, name, text)
        assert "\n" not in text


PLANS = [
    (
        {"softmax_scale": torch.nn.Parameter(torch.tensor(0.5))},
        "softmax_scale must be a float, got a Parameter; multiply",
    ),
    ({"softmax_scale": torch.ones(4)}, "softmax_scale must be a float, got a Tensor; multiply q by"),
    ({"softmax_scale": "0.5"}, "softmax_scale must be a float, got '0.5'; multiply q by"),
    ({"softmax_scale": True}, "softmax_scale must be a float, got True"),
    ({"softmax_scale": float("nan")}, "softmax_scale must be finite in float32, got nan; leave it out"),
    ({"softmax_scale": -float("inf")}, "softmax_scale must be finite in float32, got -inf"),
    ({"softmax_scale": 10**400}, "softmax_scale must be finite in float32, got inf"),
    ({"softmax_scale": 1e39}, "softmax_scale must be finite in float32, got 1e+39"),
    *(
        (
            {"window": window},
            f"window is (left, right), the keys that a query sees on each side, .* got {window!r}; leave",
        )
        for window in (128, (4,), (1, 2, 3), (4.5, 0), ("4", 0), (True, 0), "ab", {1: 2})
    ),
    ({"window": (-2, 0)}, "a window's limits are 0 or more, or -1 for none, got (-2, 0)"),
    ({"causal": "no"}, "causal must be True or False, got 'no'"),
    ({"deterministic": 1}, "deterministic must be True or False, got 1"),
    ({"chunks": 2.5}, "chunks must be a whole number, got 2.5"),
    ({"stripe": "2"}, "stripe must be a whole number, got '2'"),
    ({"kernel": 3}, "kernel must be a name or a Kernel, got 3; use one of: auto, torch"),
    ({"kernel": "tosch"}, "unknown kernel 'tosch'; did you mean 'torch'"),
    (
        {"softcap": torch.ones(2, 2)},
        "softcap must be a positive finite number, got tensor([[1., 1.], [1., 1.]]); leave",
    ),
    (
        {"window": torch.ones(2, 2)},
        "window is (left, right), the keys that a query sees on each side, .* got tensor([[1",
    ),
    (
        {"dropout": torch.ones(2, 2)},
        "dropout is the part of attention weights that is dropped, 0 to below 1, got tenso",
    ),
    ({"cp": object()}, "cp must be a process group, a DeviceMesh or a fabric, got a object; all ranks together are"),
]


def texts_of_plans():
    return [text_of(plan, "zigzag", **choices) for choices, _ in PLANS]


def test_arguments_of_a_plan_are_refused_in_one_line():
    (texts,) = run_ranks(1, texts_of_plans)
    for text, (choices, start) in zip(texts, PLANS, strict=True):
        head, _, rest = start.partition(".*")
        assert text.startswith(head), choices
        assert rest in text, choices
        assert "\n" not in text


def test_numbers_of_plans_are_never_used_again():
    numbers = [plan("zigzag").number for _ in range(3)]
    assert len(set(numbers)) == 3
    held = plan("zigzag")
    assert opaque.numbered(held.number) is held


BIASES = {
    "a mask": (torch.ones(1, 1, TOKENS, 2 * TOKENS, dtype=torch.bool), "bias must be of dtype float64 or float32"),
    "whole numbers": (torch.ones(1, 1, TOKENS, 2 * TOKENS, dtype=torch.int64), "bias must be of dtype float64 or"),
    "a list": ([[0.0]], "bias must be a tensor b h s S that is added to the scores, got list"),
    "elsewhere": (torch.zeros(1, 1, TOKENS, 2 * TOKENS, device="meta"), "bias must be on the device of q, got meta"),
    "sparse": (
        torch.zeros(1, 1, TOKENS, 2 * TOKENS).to_sparse(),
        "bias must be a dense tensor b h s S, got a torch.spa",
    ),
    "five keys": (torch.zeros(1, 1, TOKENS, 5), "bias must be b h s S = (1, 4, 24, 48), or 1 where it is broadcast"),
}


def refusals_beside_attend():
    """Texts about unfit biases, given on all ranks or on the last, about slices, and about what is no plan."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fabric = GroupFabric(dist.group.WORLD)
    how, rows, last = plan("rsa", cp=fabric), torch.zeros(1, 1, TOKENS, 2 * TOKENS), fabric.rank == fabric.size - 1
    found = {}
    for name, (bias, _) in BIASES.items():
        for everywhere in (True, False):
            given = bias if everywhere or last else rows
            found[name, everywhere] = text_of(attend_with_bias, x(), x(), x(), given, how)
            attend_with_bias(x(), x(), x(), rows, how)
    found["probabilities"] = text_of(attention_probabilities, None, x(), how)
    short = KeptKeys((range(TOKENS if last else 2 * TOKENS),))
    found["slice"] = text_of(attend_slice, x(), x(), x(), plan("zigzag", cp=fabric), short, 0)
    beside = (attend_with_bias, rows, None), (attend_slice, None, KeptKeys(()), 0), (attend, None)
    found["plan"] = {text_of(call, x(), x(), x(), *rest) for call, *rest in beside}
    found["plan"] |= {
        text_of(call, x(), *rest) for call, *rest in ((attention_probabilities, x(), None), (unshard, None))
    }
    found["list"] = text_of(unshard, [0.0] if last else x(), how)
    dist.barrier()
    return found


def test_unfit_biases_slices_and_plans_are_one_line_on_every_rank():
    first, second = run_ranks(2, refusals_beside_attend)
    assert first == second
    for name, (_, start) in BIASES.items():
        assert first[name, True].startswith(start), name
        assert first[name, False].startswith(f"rank 1: {start}"), name
    assert "got rank 0: 24, rank 1: none" in first["list"]
    assert first["probabilities"].startswith("q must be a tensor s b h d, got NoneType")
    assert first["slice"] == "rank 1: slice 0 has 24 tokens over all ranks, got 24 on 2"
    assert first["plan"] == {"plan must be made by megatron_cp.plan(backend, ...), got None"}
