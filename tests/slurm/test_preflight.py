"""What a node must have before a job starts on it, and which node is named when one is unlike the others."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatron_cp import cli
from megatron_cp.findings import Finding
from megatron_cp.slurm import preflight
from megatron_cp.slurm.preflight import GIB, NodeReport, Wanted

NODES = ["n1", "n2", "n3"]


def report(node: str, **differs: object) -> NodeReport:
    facts = {"torch": "2.8.0", "NVIDIA driver": "570.86"}
    like_all = {"clock": 1000.0, "memory": 500 * GIB, "facts": facts, "findings": [Finding("disk", "ok", "9 GB free")]}
    return NodeReport(node, **{**like_all, **differs})


def reasons(**differs: object) -> list[str]:
    """Why the middle one of three nodes is bad; the others must be fine."""
    reports = {node: report(node, **(differs if node == "n2" else {})) for node in NODES}
    bad = preflight.verdict(reports, NODES)
    assert set(bad) <= {"n2"}
    return bad.get("n2", [])


def status(findings: list[Finding], subject: str) -> tuple[str, str]:
    found = next(finding for finding in findings if finding.subject == subject)
    return found.status, f"{found.found} {found.remedy}"


def test_equal_nodes_are_fine() -> None:
    assert reasons(clock=1000.0 + preflight.SECONDS_APART, memory=460 * GIB) == []


@pytest.mark.parametrize(
    ("differs", "text"),
    [
        ({"facts": {"torch": "2.9.1", "NVIDIA driver": "570.86"}}, "torch: 2.9.1, elsewhere 2.8.0"),
        ({"facts": {"torch": "2.8.0", "NVIDIA driver": "535.1"}}, "NVIDIA driver: 535.1, elsewhere 570.86"),
        (
            {"facts": {"torch": "2.8.0", "NVIDIA driver": "570.86", "GPU": "NVIDIA A100"}},
            "GPU: NVIDIA A100, elsewhere none -> ask SLURM for nodes with one model",
        ),
        ({"memory": 250 * GIB}, "memory: 250 GiB, elsewhere 500 GiB"),
        ({"clock": 1300.0}, "clock: 300 s off the others"),
        ({"findings": [Finding("GPUs", "broken", "7 of 8 usable", "drain it")]}, "GPUs: 7 of 8 usable -> drain it"),
    ],
)
def test_a_node_unlike_the_others_is_named(differs: dict[str, object], text: str) -> None:
    (reason,) = reasons(**differs)
    assert text in reason


def test_a_node_without_a_whole_report_is_named(tmp_path: Path) -> None:
    preflight.write(report("n1"), tmp_path)
    (tmp_path / "n2.json").write_text('{"node": "n2", "clo')
    reports = preflight.read(tmp_path, NODES, patience=0)
    assert reports == {"n1": report("n1")}
    assert set(preflight.verdict(reports, NODES)) == {"n2", "n3"}


def test_the_command_names_bad_nodes_and_says_how_to_go_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in NODES:
        preflight.write(report(node, memory=(100 if node == "n3" else 500) * GIB), tmp_path)
    result = CliRunner().invoke(cli.app, ["doctor", "--reports", str(tmp_path), *NODES])
    assert result.exit_code == 1
    named, advice = result.stdout.splitlines()
    assert named.startswith("[megatron-cp] node n3: memory: 100 GiB")
    assert advice == "[megatron-cp] 1 of 3 nodes failed; without them: --exclude=n3"


def test_this_machine_passes_and_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    words = ["--node", "--json", "--report", str(tmp_path), "--master-addr", "127.0.0.1"]
    result = CliRunner().invoke(cli.app, ["doctor", *words])
    assert result.exit_code == 0, result.stdout
    assert {finding["subject"] for finding in json.loads(result.stdout)} >= {"GPUs", "/dev/shm", "disk", "own address"}
    (found,) = preflight.read(tmp_path, ["n7"], patience=0).values()
    assert found.facts["megatron-core"].startswith("0.19.")
    assert preflight.verdict({"n7": found}, ["n7"]) == {}


def test_an_address_that_does_not_resolve_is_refused(tmp_path: Path) -> None:
    found = preflight.examine(Wanted(0, 0, tmp_path, "no-such-host.invalid"))
    assert status(found.findings, "address of the first node")[0] == "broken"
    assert "does not resolve" in status(found.findings, "address of the first node")[1]


def test_the_address_belongs_to_the_first_node_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an address for documentation, which no machine has (RFC 5737)
    for node, expected in (("0", "broken"), ("1", "ok")):
        monkeypatch.setenv("SLURM_NODEID", node)
        found = preflight.examine(Wanted(0, 0, tmp_path, "192.0.2.1"))
        assert status(found.findings, "address of the first node")[0] == expected


@pytest.mark.parametrize(
    ("environment", "resolved", "expected"),
    [
        ({"SLURM_JOB_NUM_NODES": "2"}, {"127.0.1.1"}, "broken"),
        ({"SLURM_JOB_NUM_NODES": "2"}, set(), "broken"),
        ({"SLURM_JOB_NUM_NODES": "2"}, {"127.0.1.1", "10.0.0.7"}, "ok"),
        ({"SLURM_JOB_NUM_NODES": "1"}, {"127.0.1.1"}, "ok"),
        ({"SLURM_JOB_NUM_NODES": "2", "GLOO_SOCKET_IFNAME": "lo"}, {"127.0.1.1"}, "ok"),
        ({"SLURM_JOB_NUM_NODES": "2", "GLOO_SOCKET_IFNAME": "wrong0"}, {"10.0.0.7"}, "broken"),
    ],
)
def test_gloo_needs_an_address_that_other_nodes_reach(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], resolved: set[str], expected: str
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preflight, "_resolved", lambda host: resolved)
    (finding,) = preflight._own_address()
    assert finding.status == expected


def test_a_full_disk_and_too_little_shared_memory_are_refused(tmp_path: Path) -> None:
    (disk,) = preflight._disk(Wanted(0, 2**60, tmp_path, ""))
    assert disk.status == "broken"
    assert "--node-free-gb" in disk.remedy
    (nowhere,) = preflight.guarded("disk", lambda: preflight._disk(Wanted(0, 0, tmp_path / "missing", "")))
    assert nowhere.status == "broken"


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (finding,) = preflight._gpus(8)
    assert (finding.status, finding.found) == ("broken", "0 of 8 usable")


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"), [(16, 8, "ok"), (8, 8, "optional"), (1, 8, "broken"), (1, 0, "ok")]
)
def test_the_cpus_of_the_step_are_counted(monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, expected: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cpus)))
    (found,) = preflight._cpus(gpus)
    assert found.status == expected
    assert bool(found.remedy) is (expected != "ok")


@pytest.mark.parametrize(
    ("limit", "gpus", "expected"),
    [(None, 8, "ok"), (400, 8, "ok"), (100, 8, "optional"), (60, 8, "broken"), (1, 0, "ok")],
)
def test_the_memory_that_the_step_may_use_is_compared_with_the_nodes(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, gpus: int, expected: str
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=500 * GIB))
    monkeypatch.setattr(preflight, "memory_limit", lambda *folders: limit and limit * GIB)
    (found,) = preflight._memory(gpus)
    assert found.status == expected
    assert f"{limit or 500}.0 of 500.0 GiB" in found.found


@pytest.mark.parametrize(
    ("process", "files", "expected"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": "5000", "slurm/job_7/step_0/memory.max": "max"}, 5000),
        ("0::/a/b\n", {"a/memory.max": "7", "a/b/memory.max": "9"}, 7),
        ("3:cpu:/x\n4:memory,hugetlb:/slurm/job_7\n", {"memory/slurm/job_7/memory.limit_in_bytes": "64"}, 64),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_the_limit_of_a_control_group_is_the_smallest_above_it(
    tmp_path: Path, process: str, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        file = tmp_path / "mounted" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(process)
    assert preflight.memory_limit(tmp_path / "cgroup", tmp_path / "mounted") == expected
