"""A SLURM cluster of two nodes on this machine, from the daemons that distributions ship, while a test runs."""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until its credential has expired, two minutes by default
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/linear
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
# the port of a job follows from its number, and other clusters may be tested on this machine
FirstJobId={first_job}
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1\n"


def missing() -> str:
    """Why no cluster can be started here, or an empty string."""
    lacking = [daemon for daemon in DAEMONS if _binary(daemon) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


def _binary(name: str) -> str | None:
    # system daemons are not on the path of every user
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """A running cluster; `environment` makes SLURM's commands talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def ask(self, *words: str) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job, also for some minutes after its end."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start(self, daemon: str, *words: str) -> None:
        binary = _binary(daemon)
        assert binary is not None
        with (self.folder / f"{daemon}.out").open("ab") as out:
            command = [binary, *words]
            started = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, start_new_session=True)
        self.daemons.append(started)


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster with both nodes idle; at the end nothing of it is left, whatever happened."""
    # a short path: the sockets' names have to fit into 108 bytes
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    try:
        _configure(folder)
        cluster.start(
            "munged",
            *("--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket"),
            *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"),
        )
        wait_for((folder / "munge.socket").exists, 30, (folder / "munged.out").read_text)
        cluster.start("slurmctld", "-D")
        for node in NODES:
            cluster.start("slurmd", "-D", "-N", node)
        idle = f"idle {len(NODES)}"
        wait_for(lambda: cluster.ask("sinfo", "--noheader", "--format=%T %D") == idle, 60, lambda: cluster.ask("sinfo"))
        yield cluster
    finally:
        _kill_all_of(folder)
        for daemon in cluster.daemons:
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    # the daemons cannot choose a port; these lie below those that the system gives out
    first_port = 10000 + 10 * secrets.randbelow(900)
    nodes = "".join(NODE.format(node=node, host=host, port=first_port + at) for at, node in enumerate(NODES, 1))
    text = CONFIGURATION.format(
        host=host,
        port=first_port,
        user=getpass.getuser(),
        folder=folder,
        nodes=",".join(NODES),
        first_job=1 + secrets.randbelow(10000),
    )
    # a partition comes after its nodes
    (folder / "slurm.conf").write_text(nodes + text)
    (folder / "state").mkdir()
    key = folder / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)


def _kill_all_of(folder: Path) -> None:
    """Daemons, steps and whatever they started; workers of torchrun are in sessions of their own."""
    for _ in range(3):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and _is_of(process, str(folder)):
                    process.kill()
        time.sleep(0.2)


def _is_of(process: psutil.Process, folder: str) -> bool:
    if folder in " ".join(process.cmdline()) or folder in process.environ().get("SLURM_CONF", ""):
        return True
    # the keeper of a step hides both, and writes into the log of its node
    return process.name().startswith("slurm") and any(file.path.startswith(folder) for file in process.open_files())
