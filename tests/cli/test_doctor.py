import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.cli import examine as doctor
from megatron_cp.context import BACKENDS
from megatron_cp.kernels import packages


def run(*words):
    return CliRunner().invoke(app, ["doctor", *words])


def test_doctor_finds_nothing_broken_and_proves_every_backend():
    result = run("--json")
    findings = {entry["subject"]: entry for entry in json.loads(result.stdout)}
    assert result.exit_code == 0, result.stdout
    assert {f"backend {name}" for name in BACKENDS.names} <= set(findings)
    assert findings["megatron-core"]["found"].startswith("0.19.")
    assert "agrees" in findings["two processes"]["found"]
    assert all(entry["remedy"] for entry in findings.values() if entry["status"] == "optional")
    assert "[megatron-cp] starts two processes, and runs one step between them\n" in result.stderr
    assert "No CUDA runtime" not in result.stderr


def test_doctor_fails_with_a_remedy_for_what_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.16.1" if name == "megatron-core" else "2.8.0")
    monkeypatch.setattr(doctor, "_between", lambda: iter(()))
    result = run()
    assert result.exit_code == 1
    assert "BROKEN   megatron-core: 0.16.1" in result.stdout
    assert "pip install 'megatron-core>=0.19,<0.20'" in result.stdout


def test_doctor_reports_a_check_that_dies():
    def dies():
        raise OSError("no such link")

    (finding,) = doctor.guarded("link", dies)
    assert finding.status == "broken"
    assert "OSError: no such link" in finding.found


@pytest.mark.parametrize("version", ["2.7.1", "1.13.0+cpu"])
def test_old_torch_is_broken(monkeypatch, version):
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    (finding,) = doctor._torch()
    assert finding.status == "broken"


@pytest.mark.parametrize(
    ("variables", "status", "found"),
    [
        ({}, "optional", "without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True and CUDA_MODULE_LOADING=EAGER"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_MODULE_LOADING": "EAGER"},
            "ok",
            "as receives in flight need them",
        ),
    ],
)
def test_doctor_says_which_settings_a_schedule_should_have(monkeypatch, variables, status, found):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_MODULE_LOADING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (finding,) = doctor._settings()
    assert (finding.status, finding.found) == (status, found)
    assert bool(finding.remedy) == (status == "optional")


@pytest.mark.parametrize(("version", "status"), [("2.4.0", "broken"), ("2.5.0", "ok"), ("2.20.2", "ok")])
def test_an_older_transformer_engine_than_was_tested_is_broken(monkeypatch, version, status):
    monkeypatch.setattr(doctor, "installed", lambda name: version if name == "transformer-engine" else None)
    finding = next(one for one in doctor._optional_packages() if one.subject == "transformer-engine")
    assert (finding.status, bool(finding.remedy)) == (status, status == "broken")


def test_the_oldest_transformer_engine_is_that_of_setup_py():
    oldest = ".".join(map(str, doctor.OLDEST_TE))
    assert f'"transformer-engine[pytorch]>={oldest},<3"' in (Path(__file__).parents[2] / "setup.py").read_text()


@pytest.mark.parametrize(("names", "broken"), [(["H100", "A100"], True), (["H100", "H100"], False)])
def test_gpus_of_several_models_are_broken(monkeypatch, names, broken):
    facts = SimpleNamespace(name="a GPU", total_memory=2**30, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    found = {finding.subject: finding for finding in doctor._devices()}
    assert ("GPU models" in found) == broken
    if broken:
        assert found["GPU models"].found == "2 in one machine: A100, H100"
        assert found["GPU models"].remedy.startswith("run on GPUs of one model")


def test_doctor_names_a_missing_libcuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "find_library", lambda name: None)
    (finding,) = doctor._devices()
    assert (finding.status, finding.found) == ("optional", "libcuda, which the driver brings, is missing (CUDA 13.0)")
    assert "install its driver" in finding.remedy


def test_doctor_says_which_kernel_s_package_was_never_checked(monkeypatch):
    for module in (doctor, packages):
        monkeypatch.setattr(module, "installed", {"flash-attn": "2.9.1", "flash-attn-4": "4.0.0b36"}.get)
    findings = {finding.subject: finding for finding in doctor._kernels()}
    assert findings["kernel flash"].found == "flash-attn 2.9.1"
    assert "was checked with flash-attn 2.6, 2.7, 2.8, not with the 2.9.1" in findings["kernel flash"].remedy
    assert findings["kernel flash-4"].status == "ok"
    assert findings["kernel te"].found == "transformer-engine is not installed"
