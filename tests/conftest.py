import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nccl import Tally
from tests.typecheck import check_shapes

# a shell that runs the tests in its background has them ignore SIGINT, which some send to what they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

type Write = Callable[..., str]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --check-shapes."""
    parser.addoption("--check-shapes", action="store_true", help="check the shapes in the signatures of attention")


def pytest_configure(config: pytest.Config) -> None:
    """Check shapes where it is asked for, as tests/context/test_shapes.py does: calls take twice as long."""
    if config.getoption("--check-shapes"):
        check_shapes()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave slow cases out unless -m or a case's own id asks for them, and keep a module's shared fixtures together."""
    # the jobs of a SLURM wait more than they compute: beside them the other tests run
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)
def pytest_groups_keep_their_names(items: list[pytest.Function]) -> None:
    """Name an item with its group, as pytest-xdist 3.8 means to: since pytest 9.2 its assignment has no effect."""
    for item in items:
        if (named := vars(item).get("_nodeid")) and hasattr(item, "_id"):
            item._id = type(item._id).parse(named)


def _shares_a_fixture(item: pytest.Function) -> bool:
    """True if a fixture of the module, made once for all who ask, is among this test's."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    return any(definition.scope == "module" for found in definitions for definition in found)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Count a module's plays under NCCL's rules; -s prints them."""
    counts = Tally()
    yield counts
    print("", *counts.lines(), sep="\n")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe into an empty current folder; its name comes back."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> str:
        Path(name).write_text(text)
        return name

    return write
