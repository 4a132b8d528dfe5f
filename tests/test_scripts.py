"""The scripts make one environment, keep it, and say in one line what is missing."""

import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("dev", "docs", "parquet", "report", "tokenizers")
TOOLS = "bash basename cat cksum cp df dirname grep head mkdir mktemp realpath rm sed tail tr".split()
# stands for a new enough Python: notes its calls, and copies itself into the environments it makes
PYTHON = """#!{bash}
echo "$*" >>"{calls}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "${{!#}}/bin" && cp "$0" "${{!#}}/bin/python"; fi
"""


class Machine:
    """A checkout on a machine that has nothing but `TOOLS` and the Pythons that a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        shutil.copytree(ROOT / "constraints", self.checkout / "constraints")
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"this test needs {tool}"
            (self.bin / tool).symlink_to(found)

    def add_python(self, path: str, text: str = PYTHON) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(bash=self.bin / "bash", calls=self.calls))
        file.chmod(0o755)

    def run(self, script: str, *words: str, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """What the script did with these words and more of an environment, and how it called Python."""
        self.calls.write_text("")
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.folder),
            "PYENV_ROOT": str(self.folder / "pyenv"),
            **more,
        }
        command = [str(self.bin / "bash"), f"checkout/scripts/{script}", *words]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        return done, self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_new_python_one_line_says_what_to_do(machine: Machine) -> None:
    machine.add_python("bin/python3", "#!{bash}\nexit 1\n")
    done, _ = machine.run("train.sh")
    assert done.returncode == 1
    assert done.stderr.startswith("megatron-cp needs Python 3.12 or newer")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path", ["bin/python3.12", "bin/python3.13", "bin/python3", "pyenv/versions/3.12.9/bin/python"]
)
def test_any_new_python_makes_the_environment(machine: Machine, path: str) -> None:
    machine.add_python(path)
    done, calls = machine.run("train.sh")
    assert done.returncode == 0, done.stderr
    assert f"making .venv with {machine.folder / path}" in done.stdout
    assert calls[-3:] == [
        f"-m venv --clear {machine.checkout}/.venv",
        "-m pip install --quiet --disable-pip-version-check "
        f"--constraint {machine.checkout}/constraints/default.txt "
        f"-e {machine.checkout}[dev,docs,parquet,report,tokenizers]",
        "-m megatron_cp train quickstart",
    ]


def test_a_second_call_installs_nothing(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    machine.run("train.sh")
    done, calls = machine.run("train.sh", "my.yaml", "--lr", "1")
    assert calls == ["-c ", "-m megatron_cp train my.yaml --lr 1"]
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml"])
def test_changed_requirements_are_installed_into_the_same_environment(machine: Machine, name: str) -> None:
    machine.add_python("bin/python3.12")
    machine.run("test.sh")
    with (machine.checkout / name).open("a") as file:
        file.write("# changed\n")
    _, calls = machine.run("test.sh", "-k", "x")
    assert not any("venv" in call.split() for call in calls)
    assert any("pip install" in call for call in calls)
    assert calls[-1] == "-m pytest -k x"


def test_flags_without_a_recipe_go_to_the_quickstart(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    assert machine.run("train.sh", "--lr", "1")[1][-1] == "-m megatron_cp train quickstart --lr 1"


def test_a_recipe_is_meant_from_where_the_user_is(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    (machine.folder / "my.yaml").write_text("")
    assert machine.run("train.sh", "my.yaml")[1][-1] == f"-m megatron_cp train {machine.folder}/my.yaml"


def test_a_failed_installation_is_tried_again(machine: Machine) -> None:
    machine.add_python("bin/python3.12", PYTHON + '[ "$2" != pip ]\n')
    assert machine.run("train.sh")[0].returncode == 1
    assert any("pip install" in call for call in machine.run("train.sh")[1])


WITHOUT_PINS = PYTHON + 'case "$*" in *--constraint*) exit 1 ;; esac\n'


def test_versions_that_an_index_lacks_give_way_to_the_newest_in_range(machine: Machine) -> None:
    machine.add_python("bin/python3.12", WITHOUT_PINS)
    done, calls = machine.run("train.sh")
    assert done.returncode == 0
    assert "constraints/default.txt cannot be had here: installing the newest that setup.py allows" in done.stderr
    assert calls[-2].startswith("-m pip install")
    assert "--constraint" not in calls[-2]


def test_versions_that_were_asked_for_stay_required(machine: Machine) -> None:
    machine.add_python("bin/python3.12", WITHOUT_PINS)
    assert machine.run("train.sh", MEGATRON_CP_CONSTRAINTS="default")[0].returncode == 1


def test_a_checkout_that_was_moved_gets_a_new_environment(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    machine.run("test.sh")
    moved = machine.checkout.rename(machine.folder / "moved")
    shutil.copytree(moved, machine.checkout)
    (moved / ".venv" / "made-for").unlink()
    made_for = machine.checkout / ".venv" / "made-for"
    made_for.write_text(made_for.read_text().replace(str(machine.checkout), str(moved)))
    assert any("venv" in call.split() for call in machine.run("test.sh")[1])


def test_other_versions_are_installed_into_the_same_environment(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    machine.run("test.sh")
    _, calls = machine.run("test.sh", MEGATRON_CP_CONSTRAINTS="oldest")
    assert not any("venv" in call.split() for call in calls)
    assert any(f"--constraint {machine.checkout}/constraints/oldest.txt" in call for call in calls)
    assert machine.run("test.sh", MEGATRON_CP_CONSTRAINTS="oldest")[1][0] == "-c "


def test_ones_own_torch_is_kept_in_an_environment_of_its_own(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    machine.run("test.sh")
    _, calls = machine.run("test.sh", MEGATRON_CP_CONSTRAINTS="own")
    assert f"-m venv --clear --system-site-packages {machine.checkout}/.venv" in calls
    assert not any("--constraint" in call for call in calls)
    assert machine.run("test.sh", MEGATRON_CP_CONSTRAINTS="own")[1][0] == "-c "


def test_unknown_versions_are_refused_in_one_line(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    done, calls = machine.run("test.sh", MEGATRON_CP_CONSTRAINTS="latest")
    assert (done.returncode, calls) == (1, [])
    assert done.stderr == "MEGATRON_CP_CONSTRAINTS is default, oldest, newest, own or a file; got 'latest'\n"


@pytest.mark.parametrize("name", ["default", "oldest", "newest"])
def test_training_takes_the_versions_that_are_asked_for(machine: Machine, name: str) -> None:
    machine.add_python("bin/python3.12")
    done, calls = machine.run("train.sh", MEGATRON_CP_CONSTRAINTS=name)
    assert done.returncode == 0, done.stderr
    assert f"--constraint {machine.checkout}/constraints/{name}.txt" in calls[-2]
    assert calls[-1] == "-m megatron_cp train quickstart"


def test_other_versions_are_tried_in_environments_that_go_again(machine: Machine) -> None:
    machine.add_python("bin/python3.12")
    (machine.folder / "tmp").mkdir()
    done, calls = machine.run("environments.sh", "oldest", "newest", TMPDIR=str(machine.folder / "tmp"))
    assert done.returncode == 0, done.stderr
    made = [call for call in calls if call.startswith("-m venv") and not call.endswith(".venv")]
    assert len(set(made)) == 2
    for name in ("oldest", "newest"):
        (installed,) = (at for at, call in enumerate(calls) if f"/{name}.txt --editable" in call)
        assert calls[installed - 1] in made
    # one is tested while the next is made
    assert calls.count("-m pytest --quiet -m smoke and not slow") == 2
    assert not any((machine.folder / "tmp").iterdir())


def test_environments_whose_tests_fail_go_too(machine: Machine) -> None:
    machine.add_python("bin/python3.12", PYTHON + '[ "$2" != pytest ] || {{ echo "1 failed"; exit 1; }}\n')
    (machine.folder / "tmp").mkdir()
    done, calls = machine.run("environments.sh", "oldest", "newest", TMPDIR=str(machine.folder / "tmp"))
    assert done.returncode == 1
    assert done.stdout.endswith("oldest: tested\n1 failed\nnewest: tested\n1 failed\n")
    assert sum(call.startswith("-m pytest") for call in calls) == 2
    assert not any((machine.folder / "tmp").iterdir())


def test_versions_that_the_environment_has_are_not_tried_again(machine: Machine) -> None:
    machine.add_python("bin/python3.12", PYTHON + 'case "$*" in *freeze*) cat constraints/oldest.txt ;; esac\n')
    done, calls = machine.run("environments.sh", "oldest")
    assert done.returncode == 0, done.stderr
    assert "oldest: skipped, .venv has the same versions (torch==" in done.stdout
    assert not any(call.startswith("-m pytest") for call in calls)


def test_without_an_index_the_tests_with_transformer_engine_are_skipped(machine: Machine) -> None:
    machine.add_python("bin/python3.12", PYTHON + '[ "$3" != download ]\n')
    done, calls = machine.run("te.sh", "2.6.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("transformer-engine 2.6.0: skipped, no index of packages can be reached\n")
    assert not any(call.startswith("-m pytest") for call in calls)


def test_every_file_of_versions_lies_in_the_ranges_that_setup_py_asks_for() -> None:
    for requirement in map(Requirement, requires("megatron-cp") or []):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        for file in (ROOT / "constraints").glob("*.txt") if wanted else ():
            pins = dict(line.split("==") for line in file.read_text().splitlines() if not line.startswith("#"))
            version = pins.get(requirement.name.lower())
            assert version is None or requirement.specifier.contains(version), (file.name, requirement.name)
            # these stand on top of what another file names
            assert {"torch", "megatron-core"} <= pins.keys() or file.name in ("te.txt", "hf.txt")
