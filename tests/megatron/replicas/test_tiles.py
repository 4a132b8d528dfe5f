"""An MLP in tiles trains as the whole one does, and is gathered tile by tile; the rest is refused."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cp.megatron.arguments.tiles import check_tiles
from megatron_cp.megatron.rebind import replace, restore
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.megatron.test_data_parallel import preset
from tests.ranks import run_ranks
from tests.tolerances import GRAD_NORM_DIGITS, LOSS_DIGITS

RUN = {
    "mlp_tiles": 4,
    "use_torch_fsdp2": True,
    "transformer_impl": "local",
    "ffn_hidden_size": 64,
    "data_parallel_size": 2,
    "context_parallel_size": 2,
}


def check(**given: object) -> None:
    check_tiles(SimpleNamespace(**{**RUN, **given}))


@pytest.mark.parametrize("given", [{}, {"mlp_tiles": None, "use_torch_fsdp2": False, "num_experts": 4}])
def test_what_works_is_taken(given: dict[str, object]) -> None:
    check(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mlp_tiles": 1}, "--mlp-tiles 1: an MLP is cut into 2 tiles or more; leave it out"),
        ({"use_torch_fsdp2": False, "use_megatron_fsdp": True}, "--mlp-tiles 4 does not do .*; pass --use-torch-fsdp2"),
        ({"torch_fsdp2_reshard_after_forward": False}, "leave --torch-fsdp2-no-reshard-after-forward out"),
        ({"transformer_impl": "transformer_engine"}, "pass --transformer-impl local"),
        ({"tensor_model_parallel_size": 2}, "pass --tensor-model-parallel-size 1"),
        ({"num_experts": 4}, "leave --num-experts out"),
        ({"mlp_chunks_for_training": 2}, "leave --mlp-chunks-for-training out"),
        ({"mlp_tiles": 3}, "the 4 .* ranks .* --ffn-hidden-size 64 is no multiple of 3 x 4; take another number"),
    ],
)
def test_what_does_not_is_refused_in_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        check(**given)
    assert "\n" not in str(error.value)


class Gathers(TorchDispatchMode):
    """Notes how many bytes each gather of weights brings together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::_allgather_base_":
            self.sizes.add(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def gathered(flags: list[str]) -> tuple[list[dict[str, Any]], set[int]]:
    """Train; this rank's log, and the sizes in bytes of its gathers in the steps."""
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    gathers = Gathers()

    def noted(train_step: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            with gathers:
                return train_step(*args, **kwargs)

        return step

    recorded = replace("megatron.training.training:train_step", noted)
    try:
        return pretrain_losses(flags, named_weights=False), gathers.sizes
    finally:
        restore(recorded)


# bytes of float32 weights: qkv and proj with two norms, and the MLP's gates, values and fc2
REST, MLP = 4 * (32 * 64 + 32 * 32 + 2 * 32), 4 * 3 * 32 * 64
CP2 = "--context-parallel-size 2 --cp-comm-type zigzag"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.mark.slow
def test_an_mlp_in_tiles_trains_as_the_whole_one_and_is_gathered_in_parts(tmp_path: Path) -> None:
    flags = tiny(CP2, preset("fsdp2"))
    tiled = [*flags, "--mlp-tiles", "2"]
    whole, layers = run_ranks(2, gathered, flags)[0]
    saving = ["--save", str(tmp_path), "--save-interval", "2", "--no-save-optim"]
    found, parts = run_ranks(2, gathered, [*tiled, *saving])[0]
    assert [step["iteration"] for step in found] == [1, 2, 3, 4]
    for step, other in zip(found, whole, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS)
    assert max(layers) == REST + MLP
    assert {REST, MLP // 2} <= parts
    assert max(parts) < REST + MLP
    # from its checkpoint of weights, with layers that run once more in the backward pass
    resumed = ["--load", str(tmp_path), "--ckpt-step", "2", "--no-load-optim", *RECOMPUTED.split()]
    again, fewer = run_ranks(2, gathered, [*tiled, *resumed])[0]
    assert [step["iteration"] for step in again] == [3, 4]
    # the first loss is that of the weights, the second one that of another optimizer
    assert again[0]["loss"] == pytest.approx(found[2]["loss"], rel=10**-LOSS_DIGITS)
    assert fewer == parts
