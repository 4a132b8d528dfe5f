"""Linears that delay their weight gradients themselves, as transformer-engine's do, train under split schedules."""

import dataclasses
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from tests.cases import slow_unless
from tests.megatron.pipeline.test_schedules import (
    CHUNKS,
    MODEL,
    TABLES,
    TWO,
    assert_bit_equal,
    run,
    trained,
    trained_with_a_table,
)
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks


class Multiply(torch.autograd.Function):
    """The product with a weight whose gradient the module's store computes later, as Megatron's own linear would."""

    @staticmethod
    def forward(ctx, given, weight, owner):
        ctx.save_for_backward(given, weight)
        ctx.owner = owner
        return given.matmul(weight.t())

    @staticmethod
    def backward(ctx, gradient):
        given, weight = ctx.saved_tensors
        ctx.owner.store.append((given, gradient))
        dummy = None
        if ctx.owner.fused:
            # what autograd adds up is garbage, and DDP is told that the real one is elsewhere
            ctx.owner.weight.grad_added_to_main_grad = True
            dummy = torch.full_like(weight, torch.nan)
        return gradient.matmul(weight), dummy, None


class DelayingLinear(torch.nn.Module):
    """The contract of transformer-engine's linears: a first-in-first-out store, `backward_dw` takes the oldest entry.

    Without a fused kernel it overwrites `weight.grad`; with one it adds to `main_grad`, and autograd gets a dummy.
    """

    def __init__(self, weight, fused):
        super().__init__()
        self.weight, self.fused, self.store = weight, fused, deque()
        weight.skip_backward_post_hook = True

    def forward(self, given, *_, **__):
        return Multiply.apply(given, self.weight, self), None

    def need_backward_dw(self):
        return True

    def backward_dw(self):
        if not self.store:
            raise RuntimeError("Pop empty queue")
        given, gradient = (tensor.reshape(-1, tensor.shape[-1]) for tensor in self.store.popleft())
        made = gradient.t().matmul(given)
        if self.fused:
            self.weight.main_grad.add_(made)
        else:
            self.weight.grad = made


def delay_linears(fused):
    """Let every linear of every layer be one that delays; the head stays Megatron's, as it does with the original."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    def exchange(models):
        for layer in (layer for model in models for layer in model.decoder.layers):
            for parent in list(layer.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, ColumnParallelLinear | RowParallelLinear):
                        setattr(parent, name, DelayingLinear(child.weight, fused))
        return models

    return exchange


def left_behind(models):
    return [len(module.store) for model in models for module in model.modules() if isinstance(module, DelayingLinear)]


def trained_delaying(flags, fused, table=None):
    """What `trained` returns, and how many weight gradients each delaying linear was left with."""
    from megatron_cp.megatron.rebind import replace, restore

    models = []

    def with_delaying_linears(old):
        def start(config):
            old(config)
            config.pre_wrap_hooks.append(delay_linears(fused))
            config.post_wrap_hooks.append(lambda built: models.extend(built) or built)

        return start

    done = replace("tests.megatron.pretraining:start_from_names", with_delaying_linears)
    try:
        found = trained(flags) if table is None else trained_with_a_table(flags, table)
    finally:
        restore(done)
    return found, left_behind(models)


CASES = {
    "recomputed": (
        2,
        (TWO, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --pp-schedule zb-h1"),
        False,
        None,
    ),
    "chunks, added by a fused kernel": (2, (TWO, CHUNKS, "--pp-schedule izb"), True, None),
    "split and whole backwards, reductions overlapped": (
        4,
        (TWO, "--overlap-grad-reduce --pp-schedule zb-h1"),
        False,
        TABLES[4],
    ),
}


@pytest.mark.parametrize("case", slow_unless(["chunks, added by a fused kernel"], CASES))
def test_linears_with_a_delay_of_their_own_train_as_megatrons(case):
    world_size, flags, fused, table = CASES[case]
    ranks = run_ranks(world_size, trained_delaying, tiny(MODEL, *flags), fused, table)
    log = next(log for (log, _), _ in ranks if log[0]["loss"] is not None)
    stock = [word for text in flags for word in text.split()]
    del stock[stock.index("--pp-schedule") :]
    assert_bit_equal((log, [parameters for (_, parameters), _ in ranks]), run(world_size, *stock))
    counts = [count for _, left in ranks for count in left]
    assert counts
    assert set(counts) == {0}


def delays_of(schedule, delaying):
    """`delay_wgrad_compute` of a config, of a copy of it and of a config without transformer-engine."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import TransformerConfig
    from megatron.training import global_vars

    from megatron_cp.megatron import hooks

    linear = type("TELinear", (), {"need_backward_dw": None} if delaying else {})
    transformer_engine.TELinear = linear
    global_vars.set_args(SimpleNamespace(pp_schedule=schedule))
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    with hooks.apply(["delayed-weights"]):
        config = TransformerConfig(**sizes, transformer_impl="transformer_engine")
        local = TransformerConfig(**sizes, transformer_impl="local")
        return [found.delay_wgrad_compute for found in (config, dataclasses.replace(config), local)]


@pytest.mark.parametrize(
    ("schedule", "delaying", "expected"),
    [
        ("zb-h1", True, [True, True, False]),
        ("auto", True, [True, True, False]),
        ("1f1b", True, [False] * 3),
        # too old to tell: a whole backward runs with every I
        ("zb-h1", False, [False] * 3),
    ],
)
def test_linears_are_told_to_delay_for_split_schedules_only(schedule, delaying, expected):
    assert run_ranks(1, delays_of, schedule, delaying) == [expected]
