"""The parser that is kept on disk is Megatron's, costs no import of it, and is made anew for another Megatron."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cp.megatron.arguments import known_flags
from megatron_cp.megatron.arguments.known_flags import KEPT, kept_parser, parser


@pytest.fixture(scope="module")
def megatrons() -> argparse.ArgumentParser:
    return parser()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


def tables(home: Path) -> list[Path]:
    return sorted((home / "megatron-cp").glob("*"))


def test_it_knows_every_flag_as_megatrons_parser_does(megatrons: argparse.ArgumentParser, home: Path) -> None:
    for kept in (kept_parser(), kept_parser()):
        assert len(tables(home)) == 1
        assert set(kept._option_string_actions) == set(megatrons._option_string_actions)
        for word, action in megatrons._option_string_actions.items():
            same = kept._option_string_actions[word]
            assert (same.dest, same.nargs, same.const) == (action.dest, action.nargs, action.const), word
            assert type(same) is type(action), word
            assert same.default == known_flags._name(action.default), word
            assert same.choices == (action.choices and [known_flags._name(choice) for choice in action.choices]), word


@pytest.mark.parametrize(
    "line",
    [
        "--num-layers 4 --lr 1e-3 --swiglu --no-rope-fusion --cp-comm-type zigzag ulysses --cp-kernel torch",
        "--moe-layer-freq ([0]*3+[1]*61) --no-create-attention-mask-in-dataloader --split 98,2,0",
        "--adam-beta1=.9 --data-path 1 a 2 b --pp-schedule zb-h1 --recompute-activations",
    ],
)
def test_a_command_line_gives_the_same_arguments(megatrons: argparse.ArgumentParser, line: str) -> None:
    theirs, ours = (vars(known.parse_args(line.split())) for known in (megatrons, kept_parser()))
    assert ours == {name: known_flags._name(value) for name, value in theirs.items()}


@pytest.mark.parametrize("line", ["--lr fast", "--num-layers 1.5", "--attention-backend flush", "--moe-layer-freq x y"])
def test_what_the_one_refuses_the_other_does(megatrons: argparse.ArgumentParser, line: str) -> None:
    for known in (megatrons, kept_parser()):
        # Megatron looks an enumeration's member up by its name without a word of its own
        with pytest.raises((SystemExit, KeyError)):
            known.parse_args(line.split())


@pytest.mark.parametrize("words", [["render", "quickstart"], ["train", "quickstart", "--num-layer", "2"]])
def test_commands_import_neither_torch_nor_megatron(words: list[str], megatrons: argparse.ArgumentParser) -> None:
    kept_parser()
    code = (
        "import atexit, sys; from megatron_cp.cli import main\n"
        "atexit.register(lambda: print([name for name in ('torch', 'megatron.core') if name in sys.modules]))\n"
        f"sys.argv = {['megatron-cp', *words]!r}; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[]", ran.stderr
    assert ran.returncode == (words[0] == "train")


def test_changed_sources_make_another_table_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "megatron" / "training" / "arguments.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: argparse.Namespace(submodule_search_locations=[str(source.parent)])
    )
    monkeypatch.setattr(known_flags, "parser", lambda: known_flags._with_ours(argparse.ArgumentParser()))
    files: set[Path] = set()
    for size in range(KEPT + 3):
        source.write_text(size * " ")
        kept_parser()
        (newest,) = set(tables(tmp_path)) - files
        os.utime(newest, (size, size))
        files |= {newest}
    assert len(tables(tmp_path)) == KEPT


@pytest.mark.parametrize("content", ["", "{", "[1"])
def test_a_damaged_table_is_written_again(content: str, megatrons: argparse.ArgumentParser, home: Path) -> None:
    kept_parser()
    file = known_flags._file()
    assert file is not None
    file.write_text(content)
    assert "--num-layers" in kept_parser()._option_string_actions
    assert file.read_text()[:2] == "[{"


def test_a_folder_that_takes_no_file_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "--num-layers" in kept_parser()._option_string_actions
