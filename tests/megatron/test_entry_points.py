"""The launcher and our own script train through the real pretrain, alike, and refuse in one line on every rank."""

import ctypes
import importlib
import os
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cp import config, runlog
from megatron_cp.megatron.machine.environment import advised_for_receives, environment_for_gpus, first_host
from megatron_cp.megatron.machine.facts import major_capability
from megatron_cp.megatron.process import launch
from megatron_cp.megatron.run import values_of
from tests.cases import slow_unless
from tests.megatron.pretraining import SCRIPT, pretrain_losses, script_losses, tiny
from tests.ranks import RankError, run_ranks, run_ranks_with_log

CONTEXT_PARALLEL = "--cp-comm-type p2p --context-parallel-size"


def assert_equal(run: list[dict], reference: list[dict]) -> None:
    """The loss of every iteration to 6 significant digits, the grad norm to 5."""
    assert [step["iteration"] for step in run] == [step["iteration"] for step in reference]
    for ours, theirs in zip(run, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def reference() -> list[dict]:
    return run_ranks(1, pretrain_losses, tiny("--cp-comm-type p2p"))[0]


def test_training_goes_on_and_learns() -> None:
    # mock data counts upwards: a few steps suffice to see it
    (run,), text = run_ranks_with_log(
        1, pretrain_losses, tiny("--cp-comm-type p2p --train-iters 12 --lr 1e-2 --no-rope-fusion")
    )
    (found,) = filter(None, map(runlog.read_summary, text.splitlines()))
    assert found["backend"] == "none, one rank holds a sequence"
    assert all(isfinite(step["loss"]) and step["skipped"] == 0 for step in run)
    assert run[-1]["loss"] < run[0]["loss"] - 0.5


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ""),
        pytest.param(2, "", marks=pytest.mark.slow),
        (2, "--pipeline-model-parallel-size 2"),
        (2, f"{CONTEXT_PARALLEL} 2"),
        (
            4,
            f"{CONTEXT_PARALLEL} 2 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer "
            "--overlap-grad-reduce --overlap-param-gather",
        ),
        pytest.param(2, f"{CONTEXT_PARALLEL} 2 --calculate-per-token-loss", marks=pytest.mark.slow),
    ],
)
def test_every_topology_trains_the_same_model(ranks: int, flags: str, reference: list[dict]) -> None:
    runs = run_ranks(ranks, pretrain_losses, tiny(flags))
    assert all(run == runs[0] for run in runs)
    assert_equal(runs[0], reference)


EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"


@pytest.mark.parametrize(
    ("plain", "ranks", "flags"),
    [
        (EXPERTS, 4, f"--expert-model-parallel-size 2 {CONTEXT_PARALLEL} 2 --use-distributed-optimizer"),
        pytest.param(
            "--num-layers 4",
            2,
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_experts_and_interleaving_train_the_same_model(plain: str, ranks: int, flags: str) -> None:
    assert_equal(
        run_ranks(ranks, pretrain_losses, tiny(plain, flags))[0],
        run_ranks(1, pretrain_losses, tiny(plain, "--cp-comm-type p2p"))[0],
    )


def test_bf16_stays_near_fp32(reference: list[dict]) -> None:
    run = run_ranks(2, pretrain_losses, tiny("--bf16 --use-distributed-optimizer", CONTEXT_PARALLEL, "2"))[0]
    for ours, theirs in zip(run, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert ours["loss"] != theirs["loss"]


@pytest.mark.parametrize("flags", slow_unless([f"{CONTEXT_PARALLEL} 2"], ["", f"{CONTEXT_PARALLEL} 2"]))
def test_an_unmodified_script_trains_as_our_own_does(flags: str) -> None:
    script = run_ranks(2, script_losses, tiny(flags))[0]
    assert len(script) == 4
    assert script == run_ranks(2, pretrain_losses, tiny(flags), False)[0]


def rope_factor(flags: list[str]) -> float:
    from megatron_cp.megatron.process import pretrain

    sys.argv = ["pretrain_gpt", *flags]
    with launch.launched(flags):
        return pretrain.model_config(pretrain.parse_and_validate_args()).rope_scaling_factor


def test_the_rope_factor_of_the_command_line_reaches_the_model() -> None:
    assert run_ranks(1, rope_factor, tiny("--use-rope-scaling --rope-scaling-factor 32")) == [32]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--context-paralel-size 2", "did you mean '--context-parallel-size'?"),
        ("--seq-length many", "invalid int value"),
        (f"{CONTEXT_PARALLEL} 2 --seq-length 30", "--seq-length must be divisible by 2 * --context-parallel-size = 4"),
        ("--cp-comm-type zigzak --context-parallel-size 2", "did you mean 'zigzag'?"),
        ("--cp-kernel torhc", "did you mean 'torch'?"),
        ("--hidden-size 33", "Megatron requires: "),
        (f"{CONTEXT_PARALLEL} 4", "needs 4 processes, got 2"),
        ("--data-path /no/such/corpus --split 9,1,0", "/no/such/corpus"),
        ("--softmax-type off-by-one --cp-sink 1", "does not do a fixed sink (cp_sink) beside that of a softmax_type"),
    ],
)
def test_bad_flags_are_refused_in_one_line_on_every_rank(flags: str, text: str) -> None:
    words = [word for word in tiny(flags) if "--data-path" not in flags or word != "--mock-data"]
    with pytest.raises(RankError) as error:
        run_ranks(2, pretrain_losses, words)
    for rank, message in error.value.errors.items():
        line = message.splitlines()[0]
        assert line.startswith(f"SystemExit: [megatron-cp] rank {rank}: ")
        assert text in line
    assert len(error.value.errors) == 2


def help_text(command: str) -> None:
    sys.argv = [command, *([SCRIPT] if command == "launch" else []), "--help"]
    launch.main() if command == "launch" else importlib.import_module("megatron_cp.megatron.process.pretrain").main()


@pytest.mark.parametrize("command", ["launch", "pretrain_gpt"])
def test_help_tells_our_flags_beside_megatrons(command: str) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(1, help_text, command)
    assert error.value.errors[0].startswith("SystemExit: 0")
    # the log's end, where the groups that were added last are
    assert "--cp-kernel {auto" in error.value.log
    assert "--cp-placement" in error.value.log


@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        (f"{CONTEXT_PARALLEL} 2", None, "1"),
        ("--tensor-model-parallel-size 2", "8", "8"),
        ("--tensor-model-parallel-size 2 --tp-engine symmetric", None, ""),
        ("--tensor-model-parallel-size 2 --tp-engine symmetric", "1", "1"),
        ("--tensor-model-parallel-size 2 --tp-engine ring", None, "1"),
        ("--tensor-model-parallel-size 1", None, ""),
        ("--tensor-model-parallel-size 2 --use-torch-fsdp2", None, ""),
        (f"{CONTEXT_PARALLEL} 2 --overlap-moe-expert-parallel-comm", None, ""),
    ],
)
def test_the_connections_variable_is_set_where_needed_and_never_overridden(
    flags: str, own: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # set first, so that whatever the function sets is put back after the test
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", own or "0")
    if own is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    environment_for_gpus(flags.split())
    assert config.variable("CUDA_DEVICE_MAX_CONNECTIONS") == expected


class Nvml:
    """NVIDIA's management library with one GPU, or with none."""

    def __init__(self, major: int | None) -> None:
        self._major = major

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
        return 2 if self._major is None else 0

    def nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self._major, 0
        return 0


@pytest.mark.parametrize(("major", "expected"), [(8, "1"), (9, "1"), (10, ""), (12, ""), (None, "1")])
def test_from_blackwell_on_the_connections_are_left_as_they_are(
    major: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "0")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(major))
    assert major_capability() == major
    environment_for_gpus(f"{CONTEXT_PARALLEL} 2".split())
    assert config.variable("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_without_nvml_the_architecture_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert major_capability() is None


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({}, ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", "CUDA_MODULE_LOADING=EAGER"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, ["CUDA_MODULE_LOADING=EAGER"]),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_MODULE_LOADING": "EAGER"}, []),
    ],
)
def test_a_schedule_advises_what_receives_in_flight_need(
    variables: dict[str, str], advice: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_MODULE_LOADING", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert advised_for_receives() == advice
    environment_for_gpus(["--pp-schedule", "zb-h1"])
    assert all(setting in capsys.readouterr().out for setting in advice[:1])
    environment_for_gpus(["--num-layers", "4"])
    assert capsys.readouterr().out == ""


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.smoke
def test_torchrun_starts_an_unmodified_script() -> None:
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    command = [*torchrun, "-m", "megatron_cp.launch", SCRIPT, *tiny(f"{CONTEXT_PARALLEL} 2")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("lm loss:") == 4
    # once per run, and with our flags in Megatron's own dump of arguments
    assert done.stdout.count("[megatron-cp] this machine has no GPU") == 1
    assert done.stdout.count("  cp_kernel ...") == 1


def started_by_srun(job: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        del os.environ[name]
    os.environ |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": job}
    sys.argv = ["pretrain_gpt", *tiny("--train-iters 2")]
    importlib.import_module("megatron_cp.megatron.process.pretrain").main()


def test_srun_starts_our_script() -> None:
    # the port follows from the job, here one below those that are given out by the system
    _, log = run_ranks_with_log(1, started_by_srun, str(os.getpid() % 10000))
    assert "[megatron-cp] from SLURM: LOCAL_RANK=0 MASTER_ADDR=127.0.0.1" in log
    assert log.count("lm loss:") == 2


@pytest.mark.parametrize("arguments", [[], ["--train-iters", "2"], ["no_such_script.py"]])
def test_a_missing_script_is_said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    with pytest.raises(SystemExit, match=r"usage: torchrun|no script 'no_such_script.py'"):
        launch.main()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("a1,b2", "a1"), ("gpu[03-04,7],login1", "gpu03"), ("n[1,3]-ib", "n1-ib"), ("a1,n[1,3]", "a1")],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("--a 1 2 --b", ["1", "2"]),
        ("--a=3 --b 1", ["3"]),
        ("--b 1", None),
        ("--b --a", []),
        ("--a 1 --a 2", ["2"]),
    ],
)
def test_values_of_a_flag(argv: str, values: list[str] | None) -> None:
    assert values_of(argv.split(), "--a") == values
