"""Groups of ranks that tokens go to one after the other: what is taken, implied and refused in one line."""

from types import SimpleNamespace

import pytest

from megatron_cp.megatron.arguments.expert_groups import check_groups, imply_groups
from tests.megatron.experts.test_refusals import EXCHANGED

GROUPED = {**EXCHANGED, "moe_comm_type": "fastermoe"}


@pytest.mark.parametrize(
    "given",
    [
        {"moe_group_ranks": 2},
        {"moe_group_ranks": 8, "moe_pad_expert_input_to_capacity": True, "pp_schedule": "zb-h1"},
        {"moe_group_ranks": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"moe_pieces": 4, "tensor_model_parallel_size": 2},
        {"moe_comm_type": "two-hop", "fp8": "hybrid"},
    ],
)
def test_groups_that_work_are_taken(given):
    check_groups(SimpleNamespace(**{**GROUPED, **given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"moe_group_ranks": 3},
            "--moe-group-ranks must divide the 8 ranks that share a layer's experts, got 3; change",
        ),
        ({"moe_group_ranks": 0}, "must divide the 8 ranks that share a layer's experts, got 0"),
        ({"moe_group_ranks": 2, "moe_pieces": 2}, "--moe-group-ranks 2 is of --moe-comm-type fastermoe without"),
        ({"moe_group_ranks": 2, "moe_comm_type": "lina"}, "is of --moe-comm-type fastermoe without --moe-pieces"),
        ({"tensor_model_parallel_size": 2}, "pass --expert-tensor-parallel-size 1"),
        ({"fp8": "hybrid"}, "--moe-comm-type fastermoe without --moe-pieces does not do products in FP8"),
        ({"transformer_impl": "transformer_engine", "pp_schedule": "zb-h1"}, "or a schedule without W"),
    ],
)
def test_groups_that_do_not_work_are_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_groups(SimpleNamespace(**{**GROUPED, **given}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "local", "taken"),
    [
        ({}, 4, 4),
        ({}, 8, 1),
        ({}, 3, 1),
        ({}, None, 1),
        ({"expert_tensor_parallel_size": 2}, 8, 4),
        ({"moe_group_ranks": 2}, 4, 2),
        ({"moe_pieces": 2}, 4, None),
        ({"expert_model_parallel_size": 1}, 4, None),
    ],
)
def test_a_group_is_a_node_unless_another_size_is_asked_for(given, local, taken, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    args = SimpleNamespace(**{**GROUPED, **given})
    imply_groups(args)
    assert getattr(args, "moe_group_ranks", None) == taken
    said = f"--moe-comm-type fastermoe: --moe-group-ranks {taken}"
    assert (said in capsys.readouterr().out) == (taken is not None and "moe_group_ranks" not in given)
