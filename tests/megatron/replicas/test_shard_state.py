"""A checkpoint holds the outer momentum beside the weights, and gives it back to the same shard."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cp.megatron.checkpoint import resume
from megatron_cp.megatron.run import LocalSgdFlags, Settings
from tests.ranks import run_ranks

NESTEROV = LocalSgdFlags(steps="4", outer="diloco")


def saved_and_loaded() -> dict[str, Any]:
    """Save a shard's momentum, with three elements of nobody beside it, and load other values."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_cp.megatron.replicas.saved_momentum import MOMENTUM, with_momentum

    weight, nobody = torch.ones(4), torch.empty(3)

    def stock(optimizer: Any, model: Any, is_loading: bool = False, metadata: Any = None) -> dict[str, Any]:
        shards = [
            {"param": ShardedTensor("buffer.param", data, data.dtype, data.shape, (7,), (start,), None, replica_id=at)}
            for at, data, start in ((1, weight, 0), (1, nobody, 4))
        ]
        return {"param_state": {0: {torch.float32: [shards]}}}

    optimizer = SimpleNamespace(shard_fp32_groups=[[weight]])
    settings = Settings(local_sgd=NESTEROV)

    def asked(description: dict[str, Any], **flags: Any) -> list[dict[str, Any]]:
        found = with_momentum(stock, settings, optimizer, {}, metadata=description, **flags)
        shards: list[dict[str, Any]] = found["param_state"][0][torch.float32][0]
        return shards

    description: dict[str, Any] = {}
    saves = asked(description)
    loads = asked(description, is_loading=True)
    without = asked({}, is_loading=True)
    factory = loads[0][MOMENTUM]
    assert isinstance(factory, ShardedTensorFactory)
    factory.merge_fn(torch.full((4,), 5.0))
    return {
        "keys": [shard[MOMENTUM].key for shard in saves],
        "replicas": [shard[MOMENTUM].replica_id for shard in saves],
        "offsets": [shard[MOMENTUM].global_offset for shard in saves],
        "values": [shard[MOMENTUM].data.tolist() for shard in saves],
        "asked": factory.build().key,
        "without": [sorted(shard) for shard in without],
    }


def test_a_shard_gets_its_own_momentum_back() -> None:
    (found,) = run_ranks(1, saved_and_loaded)
    assert found == {
        "keys": ["buffer.outer_momentum"] * 2,
        "replicas": [1, 1],
        "offsets": [(0,), (4,)],
        "values": [[5.0] * 4, [0.0] * 3],
        "asked": "buffer.outer_momentum",
        "without": [["param"], ["param"]],
    }


@pytest.mark.parametrize(
    ("here", "there", "says"),
    [
        (
            "nesterov",
            "average",
            "in old has no outer momentum: that of --local-sgd-outer nesterov begins",
        ),
        ("nesterov", None, "begins at zero"),
        ("average", "diloco", "the outer momentum of --local-sgd-outer nesterov in old is left"),
        (None, "nesterov", "this run has none"),
        ("nesterov", "diloco", ""),
        ("average", None, ""),
    ],
)
def test_a_line_says_what_becomes_of_a_momentum(
    here: str | None, there: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        SimpleNamespace(load="old", local_sgd_steps=outer and "4", local_sgd_outer=outer or "average")
        for outer in (here, there)
    ]
    resume.say_momentum(*runs)
    printed = capsys.readouterr().out
    assert printed.count("\n") == bool(says)
    assert says in printed
