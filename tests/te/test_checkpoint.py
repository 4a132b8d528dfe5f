"""Checkpoints of TransformerEngine's layers with our attention: to and from local layers, and stock ones' keys."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from tests.ranks import RankError, run_ranks
from tests.te.models import config, model, ready
from tests.te.training import LOCAL, TE, losses, run

CP = "--context-parallel-size 2"
# the local norms have no state of FP8, which TransformerEngine's final norm asks a checkpoint for
NOTHING_OF_FP8 = "--dist-ckpt-strictness log_all"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a checkpoint after step 2 of 4, and the losses of all steps."""

    @cache
    def saved(implementation: str, flags: str) -> tuple[Path, list[float]]:
        folder = tmp_path_factory.mktemp(implementation)
        return folder, losses(run(2, implementation, flags, f"--save {folder} --save-interval 2"))

    return saved


@pytest.mark.parametrize(("saved", "loaded", "more"), [(TE, LOCAL, ""), (LOCAL, TE, NOTHING_OF_FP8)])
def test_training_goes_on_in_the_other_layers(unbroken: Any, saved: str, loaded: str, more: str) -> None:
    folder, expected = unbroken(saved, CP)
    resumed = run(2, loaded, CP, f"--load {folder} --ckpt-step 2", more)
    assert losses(resumed) == pytest.approx(expected[2:], rel=1e-6)


def test_what_local_checkpoints_lack_is_said_in_one_line(unbroken: Any) -> None:
    folder, _ = unbroken(LOCAL, CP)
    with pytest.raises(RankError, match=r"SystemExit: .*is of --transformer-impl local.*pass --dist-ckpt-strictness"):
        run(2, TE, CP, f"--load {folder} --ckpt-step 2")


@pytest.mark.parametrize("flags", [CP, f"{CP} --bf16 --use-distributed-optimizer"])
def test_training_goes_on_in_the_same_layers(unbroken: Any, flags: str) -> None:
    folder, expected = unbroken(TE, flags)
    assert losses(run(2, TE, flags, f"--load {folder} --ckpt-step 2")) == expected[2:]


def _keys_of_experts() -> list[set[str]]:
    with ready():
        made = [config(num_moe_experts=2, moe_grouped_gemm=True, transformer_impl=name) for name in (TE, LOCAL)]
        entries = [model(each).sharded_state_dict().values() for each in made]
    keys = [{entry.key for entry in each} for each in entries]
    return [{key for key in each if ".experts." in key and "_extra_state" not in key} for each in keys]


def test_experts_at_once_have_the_keys_of_transformer_engines() -> None:
    (found,) = run_ranks(1, _keys_of_experts)
    assert found[0] == found[1]
    assert {key.rpartition("experts.")[2] for key in found[1]} == {"linear_fc1.weight", "linear_fc2.weight"}


def _keys_and_loads(changes: dict[str, Any]) -> dict[str, Any]:
    with ready():
        made = config(**changes)
        stock = model(made, get_gpt_decoder_block_spec(made, True, normalization="RMSNorm"))
        ours = model(made)
        older = {name: value for name, value in stock.state_dict().items() if "core_attention" not in name}
        return {
            "plain": [set(each.state_dict()) for each in (stock, ours)],
            "sharded": [set(each.sharded_state_dict()) for each in (stock, ours)],
            # strict: a missing or unexpected key raises
            "loads": [
                ours.load_state_dict(stock.state_dict()),
                stock.load_state_dict(ours.state_dict()),
                ours.load_state_dict(older),
            ],
        }


@pytest.mark.parametrize("changes", [{}, {"num_moe_experts": 2, "moe_grouped_gemm": True, "qk_layernorm": True}])
def test_keys_are_those_of_stock_layers(changes: dict[str, Any]) -> None:
    (found,) = run_ranks(1, _keys_and_loads, changes)
    (stock, ours), (stock_sharded, ours_sharded) = found["plain"], found["sharded"]
    assert "decoder.layers.0.self_attention.core_attention._extra_state" in stock
    assert ours == stock
    assert ours_sharded == stock_sharded
    assert all(not missing and not unexpected for missing, unexpected in found["loads"])
