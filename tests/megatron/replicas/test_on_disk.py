"""Runs with the optimizer's state in files are those with it in memory, for less of it; the rest is refused."""

import ctypes
import errno
import gc
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from megatron_cp.megatron.arguments.on_disk import check_on_disk, check_state_dir
from megatron_cp.megatron.rebind import replace, restore
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import RankError, run_ranks

RUN = {
    "optimizer_state_dir": "/nvme",
    "optimizer_state_weights": True,
    "use_distributed_optimizer": True,
    "bf16": True,
}


def check(**given: object) -> None:
    check_on_disk(SimpleNamespace(**{**RUN, **given}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer_state_weights": False, "bf16": False, "log_params_norm": True, "num_experts": 4},
        {"optimizer_state_dir": None, "optimizer_state_weights": False, "optimizer": "sgd", "async_save": True},
        {"zero_quantized_gradients": "int8", "pp_schedule": "zb-h1"},
    ],
)
def test_what_works_is_taken(given: dict[str, object]) -> None:
    check(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optimizer_state_dir": None}, "--optimizer-state-weights is of a state in files; pass --optimizer-state-dir"),
        ({"use_megatron_fsdp": True}, "--optimizer-state-dir /nvme does not do .*; use --use-distributed-optimizer"),
        ({"use_distributed_optimizer": False}, "pass --use-distributed-optimizer"),
        ({"optimizer": "muon"}, "pass --optimizer adam"),
        ({"use_precision_aware_optimizer": True}, "leave --use-precision-aware-optimizer"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
        ({"fp8_param_gather": True}, "--fp8-param-gather"),
        ({"optimizer_cuda_graph": True}, "leave --optimizer-cuda-graph out"),
        ({"overlap_param_gather_with_optimizer_step": True}, "leave --overlap-param-gather-with-optimizer-step out"),
        ({"local_sgd_steps": "4"}, "leave --local-sgd-steps out"),
        ({"async_save": True}, "leave --async-save out"),
        ({"bf16": False}, "--optimizer-state-weights does not do a float32 model.*; pass --bf16"),
        ({"log_params_norm": True}, "leave --log-params-norm out"),
    ],
)
def test_what_does_not_is_refused_in_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        check(**given)
    assert "\n" not in str(error.value)


def test_a_directory_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(directory: Path | None) -> None:
        check_state_dir(SimpleNamespace(optimizer_state_dir=None if directory is None else str(directory)))

    given(None)
    given(tmp_path)
    with pytest.raises(ValueError, match="is no directory; make it on every node"):
        given(tmp_path / "missing")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        given(tmp_path)


class Ran(NamedTuple):
    """A run on one rank.

    files:     bytes of its state in files, and of those that its pieces say it stepped in each step
    anonymous: resident bytes that are of no file, by which the process grows in the first step
    """

    log: list[dict[str, Any]]
    files: int
    stepped: list[int]
    anonymous: int


def ran(flags: list[str], full: int | None = None) -> Ran:
    """Train, and count; the disk of rank `full` has no room."""
    from megatron_cp.replicas import on_disk

    disks, stepped = [], []

    class Counting(on_disk.StateOnDisk):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, piece=50_000, **kwargs)
            disks.append(self)

        def step(self, closure: None = None) -> None:
            stepped.append(0)
            super().step(closure)

        def _step_piece(self, piece: list[on_disk.StatePart]) -> dict[int, int]:
            stepped[-1] += sum(part.span.stop - part.span.start for part in piece)
            return super()._step_piece(piece)

    from megatron_cp.megatron.replicas import on_disk as adapter

    adapter.StateOnDisk = Counting  # type: ignore[misc]
    if full is not None and os.environ["RANK"] == str(full):

        def no_room(*_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.posix_fallocate = no_room  # type: ignore[assignment]
    # the first step of an optimizer imports it
    import torch._dynamo  # noqa: F401

    # a tensor's memory is a mapping of its own, given back when it is freed
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    found: list[int] = []

    def measuring(train_step: Any) -> Any:
        def measured(*args: Any, **kwargs: Any) -> Any:
            before = anonymous()
            result = train_step(*args, **kwargs)
            found.append(anonymous() - before)
            return result

        return measured

    measured = replace("megatron.training.training:train_step", measuring)
    try:
        log = pretrain_losses(flags)
    finally:
        restore(measured)
    return Ran(log, sum(each.bytes for each in disks), stepped, found[0])


def anonymous() -> int:
    """Return this process's resident bytes that are of no file, once what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kilobytes = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    return 1024 * int(kilobytes[1])


M_MMAP_THRESHOLD = -3
RANKS = 4
MODEL = "--vocab-size 8191 --hidden-size 128 --ffn-hidden-size 256"
PARAMETERS = 2 * 8192 * 128 + 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 256 * 128 + 2 * 128) + 128
DP2_CP2 = """--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --context-parallel-size 2
    --cp-comm-type zigzag --calculate-per-token-loss --train-iters 3 --save-interval 2 --ckpt-format torch_dist"""


@pytest.mark.slow
def test_runs_with_state_in_files_are_those_with_it_in_memory(tmp_path: Path) -> None:
    flags, files = tiny(MODEL, DP2_CP2), ["--optimizer-state-dir", str(tmp_path)]
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    memory = run_ranks(RANKS, ran, [*flags, "--save", str(tmp_path / "memory")])
    disk = run_ranks(RANKS, ran, [*flags, *files, "--save", str(tmp_path / "disk")])
    assert [run.log for run in disk] == [run.log for run in memory]
    # two moments of every weight, which the ranks share out
    assert sum(run.files for run in disk) == 8 * PARAMETERS
    assert all(run.stepped == [run.files // 8] * 3 for run in disk)
    assert not any(run.stepped for run in memory)
    less = [other.anonymous - run.anonymous for run, other in zip(disk, memory, strict=True)]
    print(f"in files {disk[0].files:,} bytes a rank, less resident memory {less}")
    assert less == pytest.approx([run.files for run in disk], rel=0.1)
    # each goes on from the other's checkpoint
    on = ["--ckpt-step", "2", "--load"]
    weights = run_ranks(RANKS, ran, [*flags, *files, "--optimizer-state-weights", *on, str(tmp_path / "memory")])
    plain = run_ranks(RANKS, ran, [*flags, *on, str(tmp_path / "disk")])
    assert [run.log for run in weights] == [run.log for run in plain] == [run.log[2:] for run in memory]
    assert [run.files for run in weights] == [12 * run.files // 8 for run in disk]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.slow
def test_a_disk_without_room_is_named_on_every_rank(tmp_path: Path) -> None:
    flags = tiny("--use-distributed-optimizer --optimizer-state-dir", str(tmp_path))
    with pytest.raises(RankError) as error:
        run_ranks(2, ran, flags, 1)
    found = error.value.errors
    for rank in range(2):
        line = found[rank].splitlines()[0]
        assert line.startswith(f"SystemExit: [megatron-cp] rank {rank}: --optimizer-state-dir {tmp_path} cannot hold")
        assert "(rank 1: No space left on device); give a directory" in line
