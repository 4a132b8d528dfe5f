"""What the README shows is what the code says."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from megatron_cp.cli import app
from megatron_cp.cli.backends import markdown
from megatron_cp.pipeline import SCHEDULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_table_of_backends_is_the_registrys():
    block = re.search(r"<!-- backends -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert block is not None
    assert block[1] == markdown(), "write the output of `megatron-cp backends --markdown` into the README"


def test_table_of_schedules_is_the_registrys():
    block = re.search(r"<!-- schedules -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert block is not None
    for rule, row in zip(SCHEDULES, block[1].splitlines()[2:], strict=True):
        stages = rule.placement if rule.table else "either"
        assert row == f"| `{rule.name}` | {', '.join(rule.aliases)} | {stages} | {rule.what} | {rule.paper} |"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:scripts|configs|megatron_cp|docs)/[\w./-]+\w", README))))
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()


def commands(group: Any, before: str = "") -> dict[str, Any]:
    """Every command that has no commands of its own, by the words after `megatron-cp`."""
    found: dict[str, Any] = {}
    for name, one in group.commands.items():
        found |= commands(one, f"{before}{name} ") if hasattr(one, "commands") else {before + name: one}
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_every_command_has_a_row_and_every_row_a_command():
    rows = re.findall(r"^\| `megatron-cp ([a-z-]+(?: [a-z]+)?)", README, re.MULTILINE)
    assert sorted(set(rows)) == sorted(COMMANDS)


SHOWN = re.findall(r"`megatron-cp ([^`]+)`", README) + re.findall(
    r"^    megatron-cp ((?:.*\\\n)*.*)$", README, re.MULTILINE
)


@pytest.mark.parametrize("line", sorted({" ".join(line.split()) for line in SHOWN}))
def test_commands_that_the_readme_shows_have_their_options(line):
    name = next(name for name in COMMANDS if f"{line} ".startswith(f"{name} "))
    options = {option for one in COMMANDS[name].params for option in one.opts}
    asked = set(re.findall(r"(?<![\w-])--?[a-z-]+", line))
    # what these do not know is Megatron's, torchrun's or sbatch's
    passed_on = any(one.nargs == -1 for one in COMMANDS[name].params) and name != "data build"
    assert passed_on or asked <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    assert all(one.help for one in COMMANDS[name].params if one.name != "help")
