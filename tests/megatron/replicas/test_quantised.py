"""Quantised messages train as plain ones do, for the bytes of the formulas; what they cannot do is refused."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from megatron_cp.megatron.arguments.quantised import check_quantised, complete_quantised
from megatron_cp.megatron.flags.replicas import QuantisedFlags
from megatron_cp.replicas.two_hops import Sent, sent_to_gather, sent_to_reduce
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

RUN = {
    "zero_quantized_gradients": "int8",
    "zero_quantized_weights": True,
    "zero_quantized_ranks_per_node": None,
    "use_distributed_optimizer": True,
    "data_parallel_size": 2,
    "context_parallel_size": 1,
    "bf16": True,
}


def check(**given: object) -> None:
    check_quantised(SimpleNamespace(**{**RUN, **given}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"zero_quantized_weights": False, "bf16": False},
        {"zero_quantized_gradients": None, "ddp_average_in_collective": True},
        {"data_parallel_size": 1, "context_parallel_size": 2},
        {"zero_quantized_gradients": None, "zero_quantized_weights": False, "fp16": True, "data_parallel_size": 1},
        {"zero_quantized_ranks_per_node": 4, "zero_quantized_gradients": "int4"},
        {"zero_quantized_gradients": "int4", "save": "here"},
        {"save": "here", "dist_ckpt_optim_fully_reshardable": True},
    ],
)
def test_what_works_is_taken(given: dict[str, object]) -> None:
    check(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"use_distributed_optimizer": False},
            "--zero-quantized-gradients int8 does not do .*; pass --use-distributed",
        ),
        ({"use_megatron_fsdp": True}, "use --use-distributed-optimizer in their place"),
        ({"local_sgd_steps": "4"}, "does not do Local SGD; leave --local-sgd-steps out"),
        ({"num_distributed_optimizer_instances": 2}, "leave --num-distributed-optimizer-instances out"),
        ({"fp16": True}, "pass --bf16 in the place of --fp16"),
        ({"fp8_param_gather": True}, "leave --fp8-param-gather and"),
        ({"optimizer": "muon"}, "pass --optimizer adam"),
        ({"pp_schedule": "2bw"}, "take another --pp-schedule"),
        ({"pp_schedule": "chimera"}, "two copies.*; take another --pp-schedule"),
        ({"ddp_average_in_collective": True}, "leave --ddp-average-in-collective out"),
        ({"bf16": False}, "--zero-quantized-weights does not do float32 weights.*; pass --bf16"),
        ({"use_precision_aware_optimizer": True}, "leave --use-precision-aware-optimizer"),
        ({"optimizer_cpu_offload": True}, "and --optimizer-cpu-offload out"),
        ({"overlap_param_gather_with_optimizer_step": True}, "leave --overlap-param-gather-with-optimizer-step out"),
        ({"data_parallel_size": 1}, "has nothing to send: .* are 1"),
        ({"zero_quantized_gradients": None, "data_parallel_size": 1}, "--zero-quantized-weights has nothing to send"),
        ({"zero_quantized_gradients": "int3"}, "unknown quantisation 'int3'"),
        (
            {"zero_quantized_gradients": "int4", "save": "here", "dist_ckpt_optim_fully_reshardable": True},
            "--zero-quantized-gradients int4 with --save does not do .*; leave --dist-ckpt-optim-fully-reshardable out",
        ),
        ({"zero_quantized_ranks_per_node": 0}, "is 1 or more, got 0"),
        (
            {
                "zero_quantized_gradients": None,
                "zero_quantized_weights": False,
                "zero_quantized_ranks_per_node": 4,
            },
            "--zero-quantized-ranks-per-node 4 is of quantised messages",
        ),
    ],
)
def test_what_does_not_is_refused_in_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        check(**given)
    assert "\n" not in str(error.value)


def test_gradients_imply_the_reduce_scatter_that_they_take_the_place_of(capsys: pytest.CaptureFixture[str]) -> None:
    args = SimpleNamespace(**RUN)
    complete_quantised(args)
    assert args.ddp_reduce_scatter_with_fp32_accumulation
    assert "--ddp-reduce-scatter-with-fp32-accumulation" in capsys.readouterr().out
    args = SimpleNamespace(**{**RUN, "zero_quantized_gradients": None})
    complete_quantised(args)
    assert not hasattr(args, "ddp_reduce_scatter_with_fp32_accumulation")


def test_flags_without_a_name_ask_for_nothing() -> None:
    assert not QuantisedFlags().asked
    assert QuantisedFlags(weights=True).asked
    kept = QuantisedFlags(gradients="int4").of_gradients
    assert kept is not None
    assert kept.keeps


@pytest.mark.parametrize(
    ("name", "dims", "exact"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", 2, False),
        ("decoder.layers.0.self_attention.linear_qkv.bias", 1, True),
        ("decoder.final_layernorm.weight", 1, True),
        ("embedding.word_embeddings.weight", 2, True),
        ("output_layer.weight", 2, True),
        ("decoder.layers.1.mlp.router.weight", 2, True),
    ],
)
def test_norms_biases_embeddings_and_routers_stay_exact(name: str, dims: int, exact: bool) -> None:
    from megatron_cp.megatron.replicas.quantised import is_exact

    assert is_exact(f"module.{name}", torch.zeros((2,) * dims)) is exact


class Quantised(NamedTuple):
    """A run on one rank.

    sent:    bytes inside nodes and between them, and those of the formula, of every reduction and every gather
    weights: a digest of each bucket after a gather
    """

    log: list[dict[str, Any]]
    reduced: list[tuple[Sent, Sent]]
    gathered: list[tuple[Sent, Sent]]
    weights: list[str]


def quantised(flags: list[str]) -> Quantised:
    """Train and count."""
    from megatron_cp.megatron.replicas import quantised as adapter

    found = Quantised([], [], [], [])

    def counting(move: Any, formula: Any, sent: list[tuple[Sent, Sent]]) -> Any:
        def counted(whole: Any, parts: Any, hops: Any, quantisation: Any, *rest: Any) -> None:
            before = hops.inside.sent, hops.between.sent
            move(whole, parts, hops, quantisation, *rest)
            now = Sent(hops.inside.sent - before[0], hops.between.sent - before[1])
            sent.append((now, formula(parts, hops.ranks, quantisation, whole.dtype, hops.own)))
            if sent is found.gathered:
                # elements between parameters are no weights, and are not sent
                slices = [each for part in parts for each in (*part.coded, *part.plain)]
                kept = torch.cat([whole[each] for each in slices])
                found.weights.append(hashlib.sha256(kept.view(torch.uint8).numpy().tobytes()).hexdigest())

        return counted

    adapter.reduce_scatter = counting(adapter.reduce_scatter, sent_to_reduce, found.reduced)
    adapter.all_gather = counting(adapter.all_gather, sent_to_gather, found.gathered)
    return found._replace(log=pretrain_losses(flags))


DP = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --global-batch-size 8"
NODES = "--zero-quantized-ranks-per-node 2"
WITHIN = 1e-3
STEPS = 30


def losses(*flags: str) -> tuple[list[float], list[Quantised]]:
    runs = run_ranks(4, quantised, tiny(DP, f"--train-iters {STEPS}", *flags))
    return [step["loss"] for step in runs[0].log], runs


@pytest.fixture(scope="module")
def replicas() -> list[float]:
    return losses()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "near"),
    [("--zero-quantized-gradients int8", STEPS), ("--zero-quantized-gradients int8 --zero-quantized-weights", 10)],
    ids=["gradients", "gradients and weights"],
)
def test_quantised_replicas_train_as_plain_ones_do(replicas: list[float], flags: str, near: int) -> None:
    found, runs = losses(NODES, flags)
    assert found[0] == replicas[0]
    assert found[1:] != replicas[1:]
    assert found[:near] == pytest.approx(replicas[:near], rel=WITHIN)
    print(f"{flags}: off by {abs(found[-1] / replicas[-1] - 1):.1e} at step {STEPS}")
    for run in runs:
        assert len(run.reduced) >= STEPS
        assert all(sent == formula for sent, formula in (*run.reduced, *run.gathered))
        assert run.weights == runs[0].weights
    assert bool(runs[0].gathered) == ("weights" in flags)


@pytest.mark.slow
def test_a_resumed_run_with_int4_is_the_unbroken_one(tmp_path: Path) -> None:
    flags = tiny(DP, "--zero-quantized-gradients int4 --zero-quantized-ranks-per-node 1")
    unbroken = run_ranks(2, pretrain_losses, [*flags, "--save", str(tmp_path), "--save-interval", "2"])
    resumed = run_ranks(2, pretrain_losses, [*flags, "--load", str(tmp_path), "--ckpt-step", "2"])
    assert [step["iteration"] for step in resumed[0]] == [3, 4]
    assert resumed[0] == unbroken[0][2:]


class Model(torch.nn.Module):
    """A matrix, a norm and an embedding, whose gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(24, 16)
        self.linear = torch.nn.Linear(48, 40, bias=False)
        self.norm = torch.nn.LayerNorm(33)


class Synced(NamedTuple):
    """What a rank has after a reduction of gradients and a gather of weights.

    gradients: the sum of its part, and the elements of parameters among them
    weights:   of all ranks
    """

    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    sent: list[int]


def synced(flags: QuantisedFlags) -> Synced:
    """Reduce and gather once through Megatron's own replica, without training and without overlap."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.machine import cpu
    from megatron_cp.megatron.replicas import quantised as adapter
    from megatron_cp.megatron.run import Settings

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    model = Model().bfloat16()
    hooks.settings_of_run = lambda: Settings(quantised=flags)
    with cpu.cpu_runtime(), hooks.apply(hooks.FOR_QUANTISED):
        replica = DistributedDataParallel(
            TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1),
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                reduce_scatter_with_fp32_accumulation=flags.gradients is not None,
            ),
            model,
        )
        for seed, weight in enumerate(model.parameters()):
            weight.main_grad.copy_(drawn(weight, 10 * rank + seed))
        replica.finish_grad_sync()
        found: dict[str, torch.Tensor] = {}
        for group in replica.bucket_groups:
            for bucket in group.buckets:
                size = len(bucket.grad_data) // torch.distributed.get_world_size()
                for name, weight in model.named_parameters():
                    first, last = bucket.param_to_index[weight]
                    low, high = max(first, rank * size), min(last, (rank + 1) * size)
                    found[name] = torch.full((weight.numel(),), torch.nan)
                    found[name][max(low - first, 0) : max(high - first, 0)] = bucket.grad_data[low : max(low, high)]
                # the optimizer would have written the own part alone
                bucket.param_data[: rank * size] = torch.nan
                bucket.param_data[(rank + 1) * size :] = torch.nan
        replica.start_param_sync()
        hops = adapter.connect(replica.intra_dp_cp_group, flags.ranks_per_node)
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        torch.distributed.barrier()
    return Synced(found, weights, [hops.inside.sent, hops.between.sent])


def drawn(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_a_replica_of_megatrons_sums_gradients_and_gathers_equal_weights() -> None:
    flags = QuantisedFlags(gradients="int8", weights=True, ranks_per_node=2)
    runs = run_ranks(4, synced, flags)
    torch.manual_seed(0)
    model = Model().bfloat16()
    for seed, (name, weight) in enumerate(model.named_parameters()):
        exact = name != "linear.weight"
        mean = sum(drawn(weight, 10 * rank + seed) for rank in range(4)).flatten() / 4
        parts = torch.stack([run.gradients[name] for run in runs])
        # each element is of one rank
        assert parts.isfinite().sum(0).eq(1).all()
        torch.testing.assert_close(parts.nansum(0), mean, rtol=1e-5, atol=1e-6 if exact else 0.03)
        assert exact or not parts.nansum(0).equal(mean)
        for run in runs:
            assert run.weights[name].equal(runs[0].weights[name])
        error = (runs[0].weights[name].float() - weight.float()).abs().max()
        assert error == 0 if exact else 0 < error <= weight.abs().max() / 127
    assert all(min(run.sent) > 0 for run in runs)
