"""A checkpoint holds the outer momentum, or what is left over, beside the weights, and gives it to the same shard."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cp.megatron.checkpoint import resume
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, QuantisedFlags
from megatron_cp.megatron.run import Settings
from tests.ranks import run_ranks

NESTEROV = LocalSgdFlags(steps="4", outer="diloco")
INT4 = QuantisedFlags(gradients="int4")


def saved_and_loaded() -> dict[str, Any]:
    """Save a shard's momentum, with three elements of nobody beside it, and load other values."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_cp.megatron.replicas.shard_state import MOMENTUM, with_shard_state

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
        found = with_shard_state(stock, settings, optimizer, {}, metadata=description, **flags)
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


def left_over_saved_and_loaded() -> dict[str, Any]:
    """Save what is left over of the first rank's four elements, with padding beside them, and load other values."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

    from megatron_cp.megatron.replicas import shard_state
    from megatron_cp.megatron.replicas.quantised import BUCKET, Bucket
    from megatron_cp.replicas import QUANTISATIONS
    from megatron_cp.replicas.parts import ParameterSpan, parts_of
    from megatron_cp.replicas.two_hops import Hops, Left

    def stock(optimizer: Any, model: Any, is_loading: bool = False, metadata: Any = None) -> dict[str, Any]:
        shards = [
            {
                "param": ShardedTensor("bucket.param", data, data.dtype, data.shape, (7,), (at,), None),
                "padding": LocalNonpersistentObject(padding),
            }
            for at, data, padding in ((0, torch.ones(4), False), (4, torch.empty(3), True))
        ]
        return {"param_state": {"per_bucket_numel": 8, 0: {torch.float32: [shards]}}}

    # two ranks of a node; the second part is exact
    parts = parts_of([ParameterSpan(0, 4), ParameterSpan(4, 8, exact=True)], 8, 2)
    inside: Any = SimpleNamespace(size=2, rank=0)
    between: Any = SimpleNamespace(size=1, rank=0)
    left = Left(torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(0, 64, dtype=torch.bfloat16))
    gradients, int4 = torch.zeros(8), QUANTISATIONS.get("int4")
    setattr(gradients, BUCKET, Bucket(parts, Hops(inside, between, ((0,), (1,))), int4, None, left))
    where = {"weight": {"gbuf_world_in_bucket": SimpleNamespace(start=0, end=4)}}
    optimizer = SimpleNamespace(
        buffers=[SimpleNamespace(buckets=[SimpleNamespace(grad_data=gradients)])],
        gbuf_ranges=[{torch.float32: [{"param_map": where}]}],
    )

    def collect(of: Any) -> None:
        assert of is optimizer
        left.inside[0, :4] = torch.arange(1, 5)

    shard_state.collect_left = collect

    def asked(description: dict[str, Any], flags: QuantisedFlags = INT4, **more: Any) -> list[dict[str, Any]]:
        settings = Settings(quantised=flags)
        found = shard_state.with_shard_state(stock, settings, optimizer, {}, metadata=description, **more)
        shards: list[dict[str, Any]] = found["param_state"][0][torch.float32][0]
        return shards

    description: dict[str, Any] = {}
    saves = [shard[shard_state.LEFT_OVER] for shard in asked(description)]
    values = [part.data.tolist() for part in saves]
    loads = asked(description, is_loading=True)
    loads[0][shard_state.LEFT_OVER].merge_fn(torch.full((4,), 5.0))
    without = [*asked({}, is_loading=True), *asked({}, QuantisedFlags(gradients="int8"))]
    return {
        "keys": [part.key for part in saves],
        "dtypes": {part.dtype for part in saves},
        "values": values,
        "loaded": left.inside[0, :6].tolist(),
        "without": {tuple(shard) for shard in without},
    }


def test_a_shard_gets_back_what_was_left_over_of_it() -> None:
    (found,) = run_ranks(1, left_over_saved_and_loaded)
    assert found == {
        "keys": ["bucket.left_over"] * 2,
        "dtypes": {torch.bfloat16},
        "values": [[1.0, 2.0, 3.0, 4.0], [0.0] * 3],
        "loaded": [5.0] * 4 + [0.0] * 2,
        "without": {("param", "padding")},
    }


@pytest.mark.parametrize(
    ("here", "there", "says"),
    [
        ("int4", "int8", "in old has nothing left over: --zero-quantized-gradients int4 begins without"),
        ("int4", None, "begins without"),
        (None, "int4", "what --zero-quantized-gradients int4 has left over in old is left: this run keeps nothing"),
        ("int4", "int4", ""),
        ("int8", None, ""),
    ],
)
def test_a_line_says_what_becomes_of_what_was_left_over(
    here: str | None, there: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [SimpleNamespace(load="old", zero_quantized_gradients=name) for name in (here, there)]
    resume.say_left_over(*runs)
    printed = capsys.readouterr().out
    assert printed.count("\n") == bool(says)
    assert says in printed


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
