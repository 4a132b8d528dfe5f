"""A linear whose weight gradient is put off computes the same numbers in the same order, and keeps nothing."""

import gc
import weakref

import pytest
import torch

from megatron_cp.pipeline.split_backward import WeightQueue, accumulate, weight_gradient
from tests.ranks import run_ranks

TOKENS, BATCH, WIDTH, OUT = 4, 2, 6, 8


def test_work_runs_in_the_order_it_was_put_off() -> None:
    queue, done = WeightQueue(), []
    with queue.step():
        for key in ("a", "b"):
            with queue.put_off(key):
                queue.put(lambda key=key: done.append(key + "1"))
                queue.put(lambda key=key: done.append(key + "2"))
        assert done == []
        queue.run("b")
        queue.run("a")
    assert done == ["b1", "b2", "a1", "a2"]


def test_a_weight_gradient_that_is_never_computed_is_noticed() -> None:
    queue = WeightQueue()
    with pytest.raises(AssertionError, match="never computed"), queue.step(), queue.put_off((0, 1)):
        pass


def test_a_step_that_failed_leaves_nothing_for_the_next_one() -> None:
    queue = WeightQueue()
    with pytest.raises(ZeroDivisionError), queue.step(), queue.put_off("a"):
        _ = queue.put(lambda: None), 1 / 0  # type: ignore[func-returns-value]
    with queue.step():
        assert not queue.putting_off


def test_accumulate_adds_to_main_grad_if_there_is_one() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    accumulate(weight, torch.ones(2))
    accumulate(weight, torch.ones(2))
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2]
    weight.main_grad = torch.zeros(2)  # type: ignore[attr-defined]
    accumulate(weight, torch.ones(2))
    assert weight.main_grad.tolist() == [1, 1]  # type: ignore[attr-defined]
    assert weight.grad.tolist() == [2, 2]


def test_weight_gradient_is_that_of_autograd() -> None:
    given = torch.randn(TOKENS, BATCH, WIDTH, dtype=torch.float64)
    weight = torch.randn(OUT, WIDTH, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(TOKENS, BATCH, OUT, dtype=torch.float64)
    (given @ weight.t()).backward(gradient)
    torch.testing.assert_close(weight_gradient(given, gradient), weight.grad)


MODES = {
    "plain": {"allreduce_dgrad": False, "sequence_parallel": False},
    "tensor parallel": {"allreduce_dgrad": True, "sequence_parallel": False},
    "sequence parallel": {"allreduce_dgrad": False, "sequence_parallel": True},
}
# forwards and backwards of three microbatches; a whole backward between split ones
ORDERS = {"whole": "F0 B0 F1 B1 F2 B2", "split": "F0 F1 I0 F2 I1 W0 I2 W1 W2", "mixed": "F0 B0 F1 I1 W1 F2 B2"}


def _parts(mode: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter, list[torch.Tensor], list[torch.Tensor]]:
    """This rank's weight and bias, and inputs and output gradients of three microbatches."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    weight = torch.nn.Parameter(torch.randn(OUT, WIDTH, generator=generator))
    bias = torch.nn.Parameter(torch.randn(OUT, generator=generator))
    given = [torch.randn(TOKENS, BATCH, WIDTH, generator=generator).requires_grad_() for _ in range(3)]
    rows = TOKENS * (torch.distributed.get_world_size() if MODES[mode]["sequence_parallel"] else 1)
    return weight, bias, given, [torch.randn(rows, BATCH, OUT, generator=generator) for _ in range(3)]


def linear_runs(mode: str) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Per order of actions the gradients of a linear of Megatron's, under the CPU runtime, on these ranks."""
    from megatron.core import parallel_state

    from megatron_cp.megatron.machine import cpu

    torch.distributed.init_process_group("gloo")
    parallel_state._set_global_memory_buffer()
    with cpu.cpu_runtime():
        return {order: _one_run(mode, actions.split()) for order, actions in ORDERS.items()}


def _one_run(mode: str, actions: list[str]) -> dict[str, list[torch.Tensor]]:
    from megatron.core.tensor_parallel import layers

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.pipeline import split_linear

    weight, bias, given, gradients = _parts(mode)
    weight.main_grad = torch.zeros(OUT, WIDTH)  # type: ignore[attr-defined]
    made: dict[int, torch.Tensor] = {}
    with hooks.apply(["weight-queue"]):
        queue = split_linear.bound_queue()
        with queue.step():
            for action in actions:
                kind, micro = action[0], int(action[1])
                if kind == "F":
                    made[micro] = layers.linear_with_grad_accumulation_and_async_allreduce(
                        given[micro], weight, bias, False, **MODES[mode], tp_group=torch.distributed.group.WORLD
                    )
                elif kind == "B":
                    made.pop(micro).backward(gradients[micro])
                elif kind == "I":
                    with queue.put_off(micro):
                        made.pop(micro).backward(gradients[micro])
                else:
                    queue.run(micro)
    assert weight.grad is None, "autograd has no part in the weight"
    return {
        "weight": [weight.main_grad],  # type: ignore[attr-defined]
        "bias": [bias.grad],  # type: ignore[list-item]
        "inputs": [tensor.grad for tensor in given],  # type: ignore[misc]
    }


def stock_run(mode: str) -> dict[str, list[torch.Tensor]]:
    """The same without the hook: Megatron's own backward, its weight gradients added up as its DDP does."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    from megatron_cp.megatron.machine import cpu

    torch.distributed.init_process_group("gloo")
    parallel_state._set_global_memory_buffer()
    weight, bias, given, gradients = _parts(mode)
    total = torch.zeros(OUT, WIDTH)
    with cpu.cpu_runtime():
        for micro in range(3):
            out = layers.linear_with_grad_accumulation_and_async_allreduce(
                given[micro], weight, bias, False, **MODES[mode], tp_group=torch.distributed.group.WORLD
            )
            out.backward(gradients[micro])
            assert weight.grad is not None
            total.add_(weight.grad)
            weight.grad = None
    return {"weight": [total], "bias": [bias.grad], "inputs": [t.grad for t in given]}  # type: ignore[list-item]


@pytest.mark.parametrize("mode", list(MODES))
def test_megatrons_linear_has_the_same_gradients_bit_for_bit_in_every_order(mode: str) -> None:
    expected = run_ranks(2, stock_run, mode)
    for rank, runs in enumerate(run_ranks(2, linear_runs, mode)):
        for order, found in runs.items():
            for name, tensors in found.items():
                equal = [torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected[rank][name], strict=True)]
                assert all(equal), (order, name)


def kept_after() -> tuple[bool, bool]:
    """Whether a linear's input is alive between I and W, and after W."""
    from megatron.core.tensor_parallel import layers

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.pipeline import split_linear

    torch.distributed.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.randn(OUT, WIDTH))
    with hooks.apply(["weight-queue"]):
        queue = split_linear.bound_queue()
        with queue.step():
            given = torch.randn(TOKENS, WIDTH).requires_grad_()
            out = layers.linear_with_grad_accumulation_and_async_allreduce(
                given * 1, weight, None, False, False, False, tp_group=torch.distributed.group.WORLD
            )
            with queue.put_off(0):
                out.sum().backward()
            del out
            kept = [weakref.ref(tensor) for tensor in queue._waiting[0][0].keeps]
            between = all(ref() is not None for ref in kept)
            queue.run(0)
            gc.collect()
            after = any(ref() is not None for ref in kept)
    return between, after


def test_nothing_is_kept_after_the_weight_gradient() -> None:
    assert run_ranks(1, kept_after) == [(True, False)]


def shared_weight() -> list[torch.Tensor]:
    """The gradient of a weight that is an embedding and a linear: put off, and by Megatron's own backward."""
    from megatron.core.tensor_parallel import layers

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.pipeline import split_linear

    torch.distributed.init_process_group("gloo")
    tokens = torch.tensor([1, 3, 3, 5])
    start = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.embedding(tokens, weight)
        out = layers.linear_with_grad_accumulation_and_async_allreduce(
            hidden, weight, None, False, False, False, tp_group=torch.distributed.group.WORLD
        )
        return out.square().sum()

    stock = torch.nn.Parameter(start.clone())
    loss(stock).backward()
    split = torch.nn.Parameter(start.clone())
    with hooks.apply(["weight-queue"]), split_linear.bound_queue().step():
        with split_linear.bound_queue().put_off(0):
            loss(split).backward()
        split_linear.bound_queue().run(0)
    assert stock.grad is not None
    assert split.grad is not None
    return [split.grad, stock.grad]


def test_a_weight_that_is_also_an_embedding_gets_both_gradients() -> None:
    ((found, expected),) = run_ranks(1, shared_weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def without_a_gradient_of_the_input() -> bool:
    from megatron.core.tensor_parallel import layers

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.pipeline import split_linear

    torch.distributed.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.randn(OUT, WIDTH))
    with hooks.apply(["weight-queue"]), split_linear.bound_queue().step():
        out = layers.linear_with_grad_accumulation_and_async_allreduce(
            torch.ones(TOKENS, WIDTH), weight, None, False, False, False, tp_group=torch.distributed.group.WORLD
        )
        with split_linear.bound_queue().put_off(0):
            out.sum().backward()
        split_linear.bound_queue().run(0)
    return weight.grad is not None and bool((weight.grad == TOKENS).all())


def test_a_linear_whose_input_needs_no_gradient_still_gets_its_weights() -> None:
    assert run_ranks(1, without_a_gradient_of_the_input) == [True]
