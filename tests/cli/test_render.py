"""The printed command hands a recipe's values on as they are, does nothing else, and is what train runs."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from megatron_cp.cli import render, train
from megatron_cp.recipe.command import Command

HOSTILE = [
    "$(touch x)",
    "`touch x`",
    "'; touch x; '",
    '"; touch x; "',
    "a\nb\n",
    "a \\\n --save x",
    "\r\n\t ",
    "../../../x",
    "~root",
    "* ?[a] {a,b}",
    "$HOME $((1+1))",
    "!x # y",
    "&& touch x || touch x & > x",
    "--no-save-optim",
    "-rf",
    "--",
    "!!python/object/apply:os.system ['touch x']",
    "\u202eété\u00a0",
    "\x1b[31m",
]
STUB = """#!{python}
import json, os, sys
print(json.dumps([os.environ["A"], sys.argv[1:]]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, deep enough for `../../..`, and a torchrun that says what it was given."""
    stub = tmp_path / "bin" / "torchrun"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(stub.with_name("python")))
    here = tmp_path / "a" / "b" / "c"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    return here


def write(folder: Path, value: str) -> None:
    # JSON's texts are YAML's
    text = json.dumps(value)
    (folder / "run.yaml").write_text(
        f"ENV_VARS:\n  A: {text}\nLAUNCH:\n  --log-dir: {text}\n  --nproc-per-node: 2\nMODEL_ARGS:\n"
        f"  --mock-data: true\n  --wandb-exp-name: {text}\n  --num-layers: 2\n"
    )


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_arrives_as_it_was_written(folder: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, value)
    render.render("run.yaml", [])
    printed = capsys.readouterr().out
    ended = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    variable, words = json.loads(ended.stdout)
    tied = value.startswith("-")
    log_dir = [f"--log-dir={value}"] if tied else ["--log-dir", value]
    name = [f"--wandb-exp-name={value}"] if tied else ["--wandb-exp-name", value]
    assert variable == value
    assert words == [
        *["--standalone", *log_dir, "--nproc-per-node", "2", "-m", "megatron_cp.pretrain_gpt"],
        *["--mock-data", *name, "--num-layers", "2"],
    ]
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("value", ["$(touch x)", "a\n'b"])
def test_render_prints_what_train_runs(
    folder: Path, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, value)
    render.render("run.yaml", ["--lr", "-1e-3"])
    printed = capsys.readouterr().out
    ran: list[Command] = []

    def stream(line: Command, *_: object) -> tuple[int, list[object], dict[str, object]]:
        ran.append(line)
        return 1, [], {}

    monkeypatch.setattr(train, "_stream", stream)
    with pytest.raises(typer.Exit):
        train.train("run.yaml", ["--lr", "-1e-3"])
    assert f"{ran[0]}\n" == printed
    ended = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [value, ran[0].words[1:]]


def test_an_open_brace_is_refused_by_its_line(folder: Path) -> None:
    write(folder, "$HOME ${")
    with pytest.raises(ValueError, match=r"run.yaml:2: A: cannot read the variable in '\$HOME \$\{'"):
        render.render("run.yaml", [])
