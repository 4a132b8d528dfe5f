"""The wheel works in an empty folder, without the checkout."""

import shutil
import subprocess
import sys
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
