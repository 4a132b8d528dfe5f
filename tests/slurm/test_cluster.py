"""On a real SLURM: a job checks its nodes, trains, saves when it is told to stop, is requeued, and goes on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp import cli, runlog
from tests.slurm import cluster
from tests.slurm.cluster import Cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400
# more iterations than any run gets through
RECIPE = """
extends: quickstart
ENV_VARS:
  GLOO_SOCKET_IFNAME: lo
LAUNCH:
  --nnodes: 2
  --nproc-per-node: 1
DATA:
  --limit: 100
MODEL_ARGS:
  --num-layers: 1
  --hidden-size: 48
  --ffn-hidden-size: 64
  --seq-length: 128
  --max-position-embeddings: 128
  --train-iters: 5000
  --save: ckpt
  --save-interval: 5000
SLURM:
  --requeues: 1
  --time: 60
"""
# a Python that finds another environment on the second node
PYTHON = """#!/bin/sh
if [ "$SLURMD_NODENAME" = n2 ]; then export GLOO_SOCKET_IFNAME=wrong0; fi
exec {python} "$@"
"""

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "there is a SLURM")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with cluster.running() as started:
        yield started


@pytest.fixture
def here(tmp_path: Path, two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", two_nodes.environment["SLURM_CONF"])
    (tmp_path / "run.yaml").write_text(RECIPE)
    yield tmp_path
    two_nodes.ask("scancel", "--full", "--signal=KILL", *two_nodes.ask("squeue", "--noheader", "--format=%i").split())


def submit(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The number of the job."""
    capfd.readouterr()
    result = CliRunner().invoke(cli.app, ["submit", "run.yaml", *words])
    said = capfd.readouterr().out
    assert result.exit_code == 0, f"{result.exception}\n{said}"
    return said.split()[-1]


def losses(log: Path) -> list[tuple[int, float]]:
    """Iterations and their losses, over all attempts of a job.

    Megatron logs the first iteration of a start without resetting its sums, so that the next line has the mean of both.
    """
    found = []
    for attempt in log.read_text(errors="replace").split("] saved in "):
        steps = [step for step in map(runlog.read_iteration, attempt.splitlines()) if step]
        logged = [step.fields["lm loss"] for step in steps]
        if len(logged) > 1:
            logged[1] = 2 * logged[1] - logged[0]
        found += [(step.number, loss) for step, loss in zip(steps, logged, strict=True)]
    return found


def wait_until(log: Path, text: str) -> None:
    def shown() -> str:
        return log.read_text(errors="replace") if log.is_file() else ""

    wait_for(lambda: text in shown(), SECONDS, lambda: f"{text!r} is missing in\n{shown()[-4000:]}")


def wait_for_the_end(two_nodes: Cluster, job: str) -> str:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait_for(lambda: two_nodes.job(job).get("JobState") in over, SECONDS)
    return two_nodes.job(job)["JobState"]


@pytest.mark.slow
def test_a_job_saves_on_each_signal_and_goes_on_as_if_unbroken(
    here: Path, two_nodes: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    job = submit(capfd)
    log = here / f"run-{job}.out"
    stopped_after = 0
    for name, said in (
        ("TERM", f"saved in ckpt; requeues job {job}, 1 of at most 1 times"),
        ("USR2", "saved in ckpt; requeued 1 times, which is the limit"),
    ):
        wait_until(log, f" iteration {stopped_after + 3:8}/")
        two_nodes.ask("scancel", f"--signal={name}", job)
        wait_until(log, said)
        stopped_after = losses(log)[-1][0]
        assert runlog.checkpoint_iteration(here / "ckpt") == stopped_after
    assert wait_for_the_end(two_nodes, job) == "FAILED"
    assert two_nodes.job(job)["Restarts"] == "1"
    in_pieces = losses(log)
    assert [number for number, _ in in_pieces] == list(range(1, len(in_pieces) + 1))

    # without a break, its ranks started by srun, with a wrapper that needs no container, and with flags of sbatch that
    # submit says nothing about
    flags = "--launcher srun --wrapper env --signal SIGUSR2@600 --parsable --hint nomultithread --no-preflight"
    whole = submit(capfd, *flags.split(), *"--save unbroken --job-name unbroken".split())
    log = here / f"unbroken-{whole}.out"
    wait_until(log, f" iteration {len(in_pieces) + 1:8}/")
    # cancelling is not preemption: the job is not requeued
    two_nodes.ask("scancel", whole)
    assert wait_for_the_end(two_nodes, whole) == "CANCELLED"
    assert two_nodes.job(whole)["Restarts"] == "0"
    for (_, resumed), (_, expected) in zip(in_pieces, losses(log)[: len(in_pieces)], strict=True):
        assert resumed == pytest.approx(expected, rel=1e-6)


def test_a_node_that_fails_its_check_is_named_and_training_does_not_start(here: Path, two_nodes: Cluster) -> None:
    python = here / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    words = ["--nodes=2", f"--export=ALL,PYTHON={sys.executable}", "--output=log", "--job-name=bad"]
    script = [str(ROOT / "scripts/slurm/pretrain.sbatch"), "run.yaml", "--python", str(python)]
    done = subprocess.run(["sbatch", *words, *script], capture_output=True, text=True, check=True)
    assert wait_for_the_end(two_nodes, done.stdout.split()[-1]) == "FAILED"
    log = (here / "log").read_text()
    assert "[megatron-cp] node n2: own address: GLOO_SOCKET_IFNAME=wrong0, which this node does not have" in log
    assert "1 of 2 nodes failed; without them: --exclude=n2" in log
    assert "node n1:" not in log
    assert "iteration" not in log
    assert not (here / "runs").exists()
