"""Islands train apart and meet at syncs alone; with plain SGD and a sync after every step they are data parallelism."""

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_cp.replicas.outer import sent
from tests.megatron.pretraining import losses_of_each_iteration, pretrain_losses, start_from_names, tiny
from tests.ranks import DIED, RankError, run_ranks
from tests.tolerances import BF16_LOSS, LOSS_DIGITS

ISLANDS = "--use-distributed-optimizer --num-distributed-optimizer-instances 2"
BATCH = "--micro-batch-size 1 --clip-grad 0"
# vocabulary twice, in each of two layers qkv, proj, gate and values, fc2 and two norms, and the last norm
PARAMETERS = 2 * 128 * 32 + 2 * (32 * 64 + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
SLEPT = 0.3


class Sgd(torch.optim.AdamW):
    """Plain SGD in the place of the only optimizer that Megatron shards."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.add_(weight.grad, alpha=-group["lr"])


class Apart(NamedTuple):
    """A run on one rank, of step after step.

    weights: digests of the shard that the update leaves, and of the one that is handed on
    sent:    elements that the syncs sent
    said:    our lines
    """

    log: list[dict[str, Any]]
    weights: list[tuple[str, str]]
    sent: int
    waited: float
    said: list[str]


def of_own_island(flags: list[str]) -> list[dict[str, Any]]:
    """Train and return this rank's own log."""
    import sys

    from megatron_cp.megatron.process import pretrain
    from megatron_cp.megatron.process.launch import launched

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags), losses_of_each_iteration() as log:
        pretrain.run(prepare=start_from_names)
    return log


def apart(flags: list[str]) -> Apart:
    """Train; the first island begins its second step only when the other one has ended its third, and sleeps later."""
    from megatron_cp.megatron.replicas import islands

    weights: list[tuple[str, str]] = []
    counted: list[int] = []
    said: list[str] = []
    waited: list[float] = []
    step, hand_on, put_mean, report = islands.take_step, islands.hand_on, islands.put_mean, islands._report
    store = torch.distributed.distributed_c10d._get_default_store

    def late(old: Any, *args: Any, **kwargs: Any) -> Any:
        number, slow = len(weights) + 1, torch.distributed.get_rank() == 0
        if slow and number == 2:
            store().wait(["third step done"])
        if slow and number == 4:
            store().wait(["fourth step done"])
            time.sleep(SLEPT)
        result = step(old, *args, **kwargs)
        if not slow and number == 3:
            store().set("third step done", "")
        return result

    def digested(old: Any, optimizer: Any) -> None:
        before = digest(islands.weights_of(optimizer))
        if len(weights) == 3 and torch.distributed.get_rank():
            store().set("fourth step done", "")
        hand_on(old, optimizer)
        weights.append((before, digest(islands.weights_of(optimizer))))

    def counting(tensors: Any, fabric: Any) -> Any:
        before = fabric.sent
        spread = put_mean(tensors, fabric)
        counted.append((fabric.sent - before) // 4)
        return spread

    def reported(number: int, every: list[Any]) -> None:
        waited.extend(island.waited for island in every)
        report(number, every)

    islands.take_step, islands.hand_on, islands.put_mean, islands._report = late, digested, counting, reported
    islands.say = said.append
    return Apart(of_own_island(flags), weights, sum(counted), sum(waited), said)


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def test_islands_meet_at_syncs_alone() -> None:
    flags = tiny(ISLANDS, BATCH, "--log-interval 4 --local-sgd-steps 4")
    slow, fast = run_ranks(2, apart, flags)
    assert [len(run.weights) for run in (slow, fast)] == [4, 4]
    for step, ((mine, handed_on), (others, theirs)) in enumerate(zip(slow.weights, fast.weights, strict=True), 1):
        assert mine != others
        assert (handed_on == theirs) == (step == 4)
    # the logged losses are of an island, but at the sync
    assert [mine["loss"] == others["loss"] for mine, others in zip(slow.log, fast.log, strict=True)] == [False] * 3 + [
        True
    ]
    # weights and two moments, of shards that are whole replicas
    assert slow.sent == fast.sent == 3 * sent(PARAMETERS, 2)
    assert fast.waited > SLEPT / 2
    (line,) = slow.said
    assert line.startswith("step 4: islands ")
    assert fast.said == slow.said


def plain_sgd(flags: list[str]) -> list[dict[str, Any]]:
    torch.optim.AdamW = Sgd  # type: ignore[misc]
    return pretrain_losses(flags)


def of_sgd(*flags: str) -> list[float]:
    step = "--lr 0.1 --min-lr 0.1 --global-batch-size 8"
    return [step["loss"] for step in run_ranks(4, plain_sgd, tiny(BATCH, step, *flags))[0]]


@pytest.fixture(scope="module")
def replicas() -> list[float]:
    return of_sgd("--use-distributed-optimizer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        pytest.param("--context-parallel-size 2 --cp-comm-type zigzag", 10**-LOSS_DIGITS, id="cp 2"),
        pytest.param("--pipeline-model-parallel-size 2 --pp-schedule zb-h1", 10**-LOSS_DIGITS, id="zb-h1"),
        pytest.param("--bf16 --overlap-grad-reduce --overlap-param-gather", BF16_LOSS, id="bf16, overlaps"),
    ],
)
def test_a_sync_after_every_step_of_sgd_is_data_parallelism(
    replicas: list[float], flags: str, tolerance: float
) -> None:
    assert of_sgd(ISLANDS, flags, "--local-sgd-steps 1") == pytest.approx(replicas, rel=tolerance)


@pytest.mark.slow
def test_islands_that_are_near_go_on_apart_until_their_weights_are_read() -> None:
    flags = tiny(ISLANDS, BATCH, "--train-iters 2 --local-sgd-steps")
    seldom, near, far = (
        [[step["loss"] for step in log] for log in run_ranks(2, of_own_island, [*flags, *steps.split()])]
        for steps in ("2", "1 --local-sgd-spread 0.9", "1 --local-sgd-spread 1e-9")
    )
    # all compare a sample in each step, and so log the loss of all
    assert near[0] == near[1]
    assert near[0][1] == seldom[0][1]
    assert near[0][0] == far[0][0]
    assert near[0][1] != far[0][1]


@pytest.mark.slow
def test_resuming_is_the_unbroken_run(tmp_path: Path) -> None:
    flags = tiny(ISLANDS, "--local-sgd-steps 2 --bf16 --overlap-grad-reduce --overlap-param-gather")
    flags += "--local-sgd-outer diloco --train-iters 6".split()
    unbroken = run_ranks(2, of_own_island, [*flags, "--save", str(tmp_path), "--save-interval", "2"])
    resumed = run_ranks(2, of_own_island, [*flags, "--load", str(tmp_path), "--ckpt-step", "2"])
    assert [step["iteration"] for step in resumed[0]] == [3, 4, 5, 6]
    for whole, part in zip(unbroken, resumed, strict=True):
        assert part == whole[2:]


def killed(flags: list[str]) -> None:
    """Train; the last island is killed before its third step, and the first one comes late to the next sync."""
    from megatron_cp.megatron.replicas import islands

    step = islands.take_step

    def of_three(old: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 2 and kwargs["iteration"] == 2:
            # the writer of checkpoints would outlive it
            for child in multiprocessing.active_children():
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        if torch.distributed.get_rank() == 0 and kwargs["iteration"] == 3:
            time.sleep(SLEPT)
        return step(old, *args, **kwargs)

    islands.take_step = of_three
    of_own_island(flags)


@pytest.mark.slow
def test_a_dead_island_is_named_at_the_next_sync_and_the_others_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    flags = tiny("--use-distributed-optimizer --local-sgd-steps 2 --local-sgd-outer diloco", BATCH)
    flags += f"--global-batch-size 6 --log-interval 2 --save {tmp_path} --load {tmp_path} --save-interval 2".split()
    islands = "--num-distributed-optimizer-instances"
    with pytest.raises(RankError) as error:
        run_ranks(3, killed, [*flags, islands, "3"])
    found = error.value.errors
    assert found[2].startswith(DIED)
    for rank in (0, 1):
        line, _ = found[rank].split("\n", 1)
        assert line.startswith(f"SystemExit: [megatron-cp] rank {rank}: step 4: island 2 (rank 2) did not come"), found[
            rank
        ]
        assert line.endswith("with --num-distributed-optimizer-instances 2")
    first, second = run_ranks(2, of_own_island, [*flags, islands, "2"])
    assert [step["iteration"] for step in first] == [3, 4]
    assert first[1]["loss"] == second[1]["loss"]
