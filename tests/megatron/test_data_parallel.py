"""Presets of data parallelism train as plain replicas do; each rank keeps and sends what the formulas say."""

import gc
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cp.megatron.arguments import validate
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from tests.cases import slow_unless
from tests.megatron.arguments.test_validate import verdict
from tests.megatron.pretraining import one_gather_at_a_time, preset, pretrain_losses, tiny
from tests.ranks import run_ranks
from tests.tolerances import BF16_LOSS, GRAD_NORM_DIGITS, LOSS_DIGITS

PRESETS = [
    "ddp",
    "zero1",
    "weight-update-sharding",
    "zero1-bf16-gradients",
    "zero2",
    "zero3",
    "hsdp",
    "fsdp2",
]
TRAINED = [name for name in PRESETS if name != "weight-update-sharding"]
"""Presets of other flags than any before."""
OF_ISLANDS = ["local-sgd", "diloco"]
"""Presets that do not train as plain replicas do: their outer steps have tests of their own."""
QUANTISED = ["zero-plus-plus"]
"""Presets that train nearly as plain replicas do: test_quantised.py holds how near."""
LEAST = 2048
"""Bytes of a tensor that counts: losses, norms and counts of tokens are smaller."""


class Run(NamedTuple):
    """A run on one rank.

    attended: calls of our attention
    sent:     bytes of the last step, by kind of collective
    kept:     bytes of tensors after the last step, by dtype
    """

    log: list[dict[str, Any]]
    attended: int
    sent: dict[str, float]
    kept: dict[str, int]


class Collectives(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives of data parallelism, each as a ring sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func._schema.name.removeprefix("c10d::"))
        if kind:
            self.sent[kind] += _sent(kind, *args[:3])
        return func(*args, **(kwargs or {}))


KINDS = {
    "_allgather_base_": "gather",
    "allgather_into_tensor_coalesced_": "gather",
    "_reduce_scatter_base_": "scatter",
    "reduce_scatter_tensor_coalesced_": "scatter",
    "alltoall_base_": "scatter",
    "allreduce_": "reduce",
    "allreduce_coalesced_": "reduce",
}


def _sent(kind: str, first: Any, second: Any, third: Any) -> float:
    group = torch.distributed.ProcessGroup.unbox(second if kind == "reduce" else third)
    whole = max(map(_bytes, (first,) if kind == "reduce" else (first, second)))
    return (2 if kind == "reduce" else 1) * whole * (group.size() - 1) / group.size() if whole >= LEAST else 0.0


def _bytes(tensors: Any) -> int:
    return sum(
        one.numel() * one.element_size() for one in ([tensors] if isinstance(tensors, torch.Tensor) else tensors)
    )


def kept() -> dict[str, int]:
    """Bytes of all tensors of this process, by dtype, each storage once."""
    gc.collect()
    storages: dict[int, tuple[str, int]] = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not issubclass(type(one), DTensor):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None and not isinstance(tensor, DTensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = str(tensor.dtype), storage.nbytes()
    found: Counter[str] = Counter()
    for dtype, size in storages.values():
        found[dtype.removeprefix("torch.")] += size if size >= LEAST else 0
    return dict(found)


def measured(flags: list[str]) -> Run:
    """Train and count."""
    from megatron.training import get_args

    from megatron_cp.megatron.layers import attention
    from megatron_cp.megatron.rebind import replace

    if "--use-megatron-fsdp" in flags or "--use-torch-fsdp2" in flags:
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS")
        one_gather_at_a_time()
    calls: list[int] = []
    attend = attention.attend
    attention.attend = lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs)
    last: list[tuple[dict[str, float], dict[str, int]]] = []

    def counted(train_step: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            with Collectives() as collectives:
                result = train_step(*args, **kwargs)
            now = get_args()
            if now.curr_iteration + 1 == now.train_iters:
                last.append((dict(collectives.sent), kept()))
            return result

        return step

    replace("megatron.training.training:train_step", counted)
    log = pretrain_losses(flags, named_weights=False)
    return Run(log, len(calls), *last[0])


CP = "--context-parallel-size 2 --cp-comm-type zigzag"
# two microbatches on each of 2 x 2 ranks
BATCH = "--global-batch-size 8"


@pytest.fixture(scope="module")
def replicas() -> list[dict[str, Any]]:
    return run_ranks(4, measured, tiny(CP, BATCH, preset("ddp")))[0].log


@pytest.mark.parametrize("name", slow_unless(["zero3"], TRAINED[1:]))
def test_a_preset_trains_as_plain_replicas_do(replicas: list[dict[str, Any]], name: str) -> None:
    found = run_ranks(4, measured, tiny(CP, BATCH, preset(name)))
    assert all(one.attended > 0 for one in found)
    assert [step["iteration"] for step in found[0].log] == [1, 2, 3, 4]
    for step, other in zip(found[0].log, replicas, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS)


WIDE = "--bf16 --train-iters 2 --hidden-size 128 --ffn-hidden-size 256"
# embedding and output layer, in each of two layers qkv, proj, gate and values, fc2 and two norms, and the last norm
PARAMETERS = 2 * 128 * 128 + 2 * (128 * 256 + 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128
# bytes a parameter of float32 and of bf16 tensors, and sent in gathers, reduce-scatters and all-reduces; two
# microbatches on four ranks. FSDP has gathered this small model ahead for the next step, and gathers its embedding and
# its output layer once a step. Where gradients are bf16, the optimizer has a shard of them in float32.
BYTES: dict[str, tuple[float, float, float, float, float]] = {
    "ddp": (16, 2, 0, 0, 6),
    "zero1": (7, 2, 1.5, 3, 0),
    "zero1-bf16-gradients": (4, 4, 1.5, 1.5, 0),
    "zero2": (4, 2, 1.5, 6, 0),
    "zero3": (4, 0.5 + 2, 5.58, 6, 0),
    "hsdp": (8, 1 + 2, 3.7, 4, 2),
    "fsdp2": (4, 0.5, 6, 3, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_rank_keeps_and_sends_what_the_formulas_say(name: str) -> None:
    for run in run_ranks(4, measured, tiny(CP, BATCH, WIDE, preset(name))):
        found = [
            run.kept["float32"],
            run.kept["bfloat16"],
            *(run.sent.get(kind, 0) for kind in ("gather", "scatter", "reduce")),
        ]
        assert [size / PARAMETERS for size in found] == pytest.approx(BYTES[name], rel=0.02, abs=0.01)


@pytest.mark.slow
def test_gradients_in_bf16_train_beside_a_pipeline() -> None:
    pipeline = "--bf16 --pipeline-model-parallel-size 2 --pp-schedule zb-h1"
    plain, half = (
        run_ranks(4, measured, tiny(CP, BATCH, pipeline, preset(name))) for name in ("zero1", "zero1-bf16-gradients")
    )
    assert all(run.attended > 0 for run in half)
    assert half[0].log[1:] != plain[0].log[1:]
    for step, other in zip(half[0].log, plain[0].log, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=BF16_LOSS)


@pytest.mark.parametrize("name", [*PRESETS, *OF_ISLANDS, *QUANTISED])
def test_a_preset_is_a_file_to_extend(name: str, tmp_path: Path) -> None:
    run = extended(name, tmp_path)
    sharded = {"--use-megatron-fsdp", "--use-torch-fsdp2"} & set(run.model_args)
    # Megatron refuses one hardware queue with FSDP, and wants it otherwise
    assert run.env_vars["CUDA_DEVICE_MAX_CONNECTIONS"].text == ("8" if sharded else "1")
    assert unmodelled(run) == LEFT_OUT.get(name, [])


def test_weight_update_sharding_is_the_first_stage() -> None:
    assert preset("weight-update-sharding") == preset("zero1")


# all others are trained above
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsdp", "fsdp2", *OF_ISLANDS, *QUANTISED])
def test_a_run_that_extends_a_preset_is_valid(name: str, tmp_path: Path) -> None:
    (answer,) = run_ranks(1, verdict, validate.run_of(extended(name, tmp_path)))
    assert isinstance(answer, list), answer


LEFT_OUT = {
    "zero1-bf16-gradients": ["--ddp-reduce-scatter-with-fp32-accumulation"],
    "fsdp2": ["--no-gradient-accumulation-fusion"],
}


def extended(name: str, folder: Path) -> recipe.Recipe:
    """A run on two nodes that extends a preset."""
    file = folder / "run.yaml"
    file.write_text(
        f"extends: [models/llama3.1-8b, training/pretrain, training/{name}]\nCLUSTER: dgx-h100-ib\n"
        "LAUNCH: {--nnodes: 2, --nproc-per-node: 8}\n"
        "MODEL_ARGS: {--seq-length: 8192, --context-parallel-size: 2, --cp-comm-type: zigzag, --global-batch-size: 16, "
        "--lr: 1e-4, --min-lr: 1e-5}\n"
    )
    return recipe.load(str(file), Unset({}))
