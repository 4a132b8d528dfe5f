"""On the CPU a run of the unmodified script starts from weights that do not depend on CP, DP, TP or micro batch."""

import hashlib
from typing import Any, NamedTuple

import pytest
import torch

from megatron_cp.context import BACKENDS, DEFAULT
from megatron_cp.megatron.rebind import replace, restore
from tests.megatron.pretraining import script_losses, tiny
from tests.ranks import run_ranks


class Start(NamedTuple):
    """Digest of all parameters before the first step, shards of tensor parallelism joined, and losses of all steps."""

    parameters: str
    losses: list[float]


def start(flags: list[str]) -> Start:
    seen: list[str] = []

    def noting(train_step: Any) -> Any:
        def noted(forward_step: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(_digest(model))
            return train_step(forward_step, data_iterator, model, *args, **kwargs)

        return noted

    done = replace("megatron.training.training:train_step", noting)
    try:
        log = script_losses(flags)
    finally:
        restore(done)
    return Start(seen[0], [step["loss"] for step in log])


def _digest(model: list[torch.nn.Module]) -> str:
    digest = hashlib.sha256()
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            digest.update(name.encode())
            digest.update(_joined(parameter).numpy().tobytes())
    return digest.hexdigest()


def _joined(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the whole parameter; a tensor-parallel rank holds a piece of each of its parts, as of gate and up."""
    from megatron.core import mpu

    shard = parameter.detach().float().contiguous()
    if not getattr(parameter, "tensor_model_parallel", False):
        return shard
    shards = [torch.empty_like(shard) for _ in range(mpu.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(shards, shard, group=mpu.get_tensor_model_parallel_group())
    pieces = [shard.chunk(parameter.partition_stride, dim=parameter.partition_dim) for shard in shards]
    return torch.cat([piece for part in zip(*pieces, strict=True) for piece in part], dim=parameter.partition_dim)


def run(ranks: int, flags: str) -> Start:
    started = run_ranks(ranks, start, tiny(flags))
    assert len({rank.parameters for rank in started}) == 1
    # shown with -s
    print(f"\n{ranks} {'rank ' if ranks == 1 else 'ranks'} {flags}: {' '.join(f'{x:.6E}' for x in started[0].losses)}")
    return started[0]


@pytest.fixture(scope="module")
def one() -> Start:
    return run(1, "--cp-comm-type zigzag")


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# the names of Megatron's own that have one of ours
MEGATRONS = ("p2p", "a2a")
SIZES = {"usp": "1 2", "double-ring": "1 2"}


def _cp(name: str) -> str:
    sizes = f" --hierarchical-context-parallel-sizes {SIZES[name]}" if name in SIZES else ""
    return f"--context-parallel-size 2 --cp-comm-type {name}{sizes}"


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, _cp("zigzag")),
        (2, "--cp-comm-type zigzag"),
        _slow(4, _cp("zigzag")),
        _slow(4, "--cp-comm-type zigzag --context-parallel-size 4"),
        _slow(2, "--cp-comm-type zigzag --use-distributed-optimizer"),
        *(_slow(2, _cp(name)) for name in (*BACKENDS.names, *MEGATRONS) if name != DEFAULT),
    ],
)
def test_first_printed_loss_is_that_of_one_rank_over_cp_and_dp(ranks: int, flags: str, one: Start) -> None:
    other = run(ranks, flags)
    assert other.parameters == one.parameters
    # the digits that Megatron's iteration line has
    assert f"{other.losses[0]:.6E}" == f"{one.losses[0]:.6E}"
    assert other.losses == pytest.approx(one.losses, rel=5e-6)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--micro-batch-size 1"),
        _slow(2, "--tensor-model-parallel-size 2"),
        _slow(2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        _slow(4, f"--tensor-model-parallel-size 2 --sequence-parallel {_cp('usp')}"),
    ],
)
def test_first_loss_is_that_of_one_rank_over_tp_and_micro_batch(ranks: int, flags: str, one: Start) -> None:
    other = run(ranks, f"--cp-comm-type zigzag {flags}")
    assert other.parameters == one.parameters
    assert other.losses[0] == pytest.approx(one.losses[0], rel=2e-6)
    assert other.losses == pytest.approx(one.losses, rel=5e-6)


@pytest.mark.slow
def test_parameters_in_bf16_do_not_depend_on_cp() -> None:
    assert run(2, f"--bf16 {_cp('zigzag')}").parameters == run(1, "--bf16 --cp-comm-type zigzag").parameters
