"""The order of folders holds: no import against it, no circle, one file for the environment, one for collectives."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import (
    ADAPTERS,
    FILES,
    PACKAGE,
    arrows_up,
    circles,
    files,
    imported,
    levels,
    loads_by_string,
    name_of,
    rooms,
    tree,
)

# what a user of the command line or of the menus imports before anything is computed
PURE = sorted(
    [
        "megatron_cp",
        "megatron_cp.recipe.command",
        "megatron_cp.config",
        "megatron_cp.context",
        "megatron_cp.context.frames",
        "megatron_cp.context.layouts",
        "megatron_cp.context.tiles",
        "megatron_cp.context.choose",
        "megatron_cp.context.trace.critical_path",
        "megatron_cp.context.trace.events",
        "megatron_cp.context.trace.simulate",
        "megatron_cp.experts",
        "megatron_cp.experts.load",
        "megatron_cp.grid",
        "megatron_cp.kernels",
        "megatron_cp.hardware.cluster",
        "megatron_cp.hardware.cluster_file",
        "megatron_cp.recipe.recipe",
        "megatron_cp.registry",
        "megatron_cp.replicas",
        "megatron_cp.replicas.parts",
        "megatron_cp.replicas.sync_steps",
        "megatron_cp.tensor",
        "megatron_cp.tensor.tesseract",
        "megatron_cp.tensor.traffic",
        "megatron_cp.runlog",
        "megatron_cp.slurm.job",
        "megatron_cp.slurm.preflight",
        "megatron_cp.slurm.script",
        *(f"megatron_cp.{path.parent.name}.{path.stem}" for path in (PACKAGE / "cli").glob("[!_]*.py")),
        *(f"megatron_cp.{path.parent.name}.{path.stem}" for path in (PACKAGE / "corpus").glob("[!_]*.py")),
    ]
)
HEAVY = ("torch", "megatron.core", "megatron.training", "matplotlib")
# from the bottom to the top: a line imports lines above it only
ORDER = (
    "__init__.py config.py dtypes.py errors.py findings.py quiet.py runlog.py",
    "grid.py registry.py units.py yaml_file.py",
    "comm corpus hardware kernels recipe report.py",
    "context experts pipeline replicas tensor",
    "bench planner",
    "batches",
    "megatron plots",
    "launch.py pretrain_gpt.py",
    "slurm",
    "cli",
    "__main__.py",
)
# the same inside the folder that adapts Megatron
ADAPTER_ORDER = (
    "flags rebind.py",
    "run.py",
    "hooks.py pipeline",
    "checkpoint dataset.py experts machine patches.py replicas tensor",
    "arguments",
    "layers",
    "batches",
    "process spec.py",
    "bench __init__.py",
)
MOST_LEVELS = 9
ROOT_OF_ADAPTERS = 7
# look a module up by its name: for the table of hooks, and for the table of libraries that are measured beside ours
BY_STRING = ("megatron/rebind.py", "bench/peers.py")
COLLECTIVES = {
    *("all_gather all_gather_into_tensor all_gather_object all_gather_single all_reduce all_to_all").split(),
    *("all_to_all_single barrier batch_isend_irecv broadcast broadcast_object_list gather gather_object").split(),
    *("irecv isend monitored_barrier recv reduce reduce_scatter reduce_scatter_single").split(),
    *("reduce_scatter_tensor scatter scatter_object_list send P2POp").split(),
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def distributed_names(root: ast.AST) -> dict[str, str]:
    """Local names of torch.distributed and of what is imported from it."""
    names = {"torch.distributed": "torch.distributed"}
    for node in ast.walk(root):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {local: full for local, full in names.items() if within(full, "torch.distributed")}


def collectives(root: ast.AST) -> Iterator[str]:
    """Calls of torch.distributed that move data between ranks."""
    names = distributed_names(root)
    for node in ast.walk(root):
        if not isinstance(node, ast.Call):
            continue
        base, _, function = ast.unparse(node.func).rpartition(".")
        called = f"{names[base]}.{function}" if base in names else names.get(function, "")
        if called.rpartition(".")[2] in COLLECTIVES:
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


def environment_uses(root: ast.AST) -> Iterator[str]:
    for node in ast.walk(root):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            yield f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"line {node.lineno}" for alias in node.names if alias.name in ("environ", "getenv", "putenv"))


@pytest.mark.parametrize("module", PURE)
def test_pure_module_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_pure_modules_import_without_torch_and_no_slower_than_what_they_stand_on(tmp_path: Path) -> None:
    code = f"""
import importlib, sys, time
def seconds(names):
    began = time.process_time()
    for name in names:
        importlib.import_module(name)
    return time.process_time() - began
libraries = seconds(["typer", "rich.console", "rich.progress", "numpy", "ruamel.yaml", "psutil"])
print(seconds({PURE!r}) / libraries, *[name for name in {HEAVY!r} if name in sys.modules])
"""
    # the second time all are compiled, also where the environment keeps no compiled files
    compiled = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=compiled, check=True)
    result = subprocess.run([sys.executable, "-c", code], env=compiled, capture_output=True, text=True, check=True)
    ratio, *heavy = result.stdout.split()
    assert not heavy
    assert float(ratio) < 2


def test_no_import_runs_against_the_order_of_folders() -> None:
    # the package's own name is what `from megatron_cp import attend` gives to users
    graph = {name: targets - {"__init__.py"} for name, targets in rooms(files()).items() if name != "__init__.py"}
    assert arrows_up(graph, ORDER) == []
    assert max(levels(rooms(files())).values()) <= MOST_LEVELS


def test_no_import_runs_against_the_order_inside_the_adapters() -> None:
    assert arrows_up(rooms(files(), ADAPTERS), [qualified(line) for line in ADAPTER_ORDER]) == []


def qualified(line: str) -> str:
    return " ".join(f"{ADAPTERS}/{name}" for name in line.split())


def test_no_files_and_no_folders_import_each_other() -> None:
    assert circles(files()) == []
    assert circles(rooms(files())) == []


def test_the_root_of_the_adapters_holds_few_files() -> None:
    assert len([path for path in FILES if path.parent.name == ADAPTERS]) <= ROOT_OF_ADAPTERS


def test_every_file_keeps_to_its_part() -> None:
    for path in FILES:
        name, root = name_of(path), tree(path)
        assert name.startswith(f"{ADAPTERS}/") or not [found for found in imported(root) if within(found, "megatron")]
        assert name == "comm/distributed.py" or not list(collectives(root)), name
        assert name == "config.py" or not list(environment_uses(root)), name
        assert name in BY_STRING or not list(loads_by_string(root)), name


GRAPH = {"a/x.py": {"b/y.py"}, "b/y.py": {"c.py"}, "c.py": set()}


@pytest.mark.parametrize(
    ("name", "target", "fault"),
    [("c.py", "a/x.py", "circle"), ("b/y.py", "a/x.py", "circle"), ("c.py", "b/z.py", "up")],
)
def test_an_import_against_the_order_is_noticed(name: str, target: str, fault: str) -> None:
    graph = {key: frozenset(targets) for key, targets in {**GRAPH, name: {*GRAPH[name], target}}.items()}
    assert arrows_up(rooms(graph), ("c.py", "b", "a")) == [(name.split("/")[0], target.split("/")[0])]
    assert bool(circles(graph)) == (fault == "circle")


@pytest.mark.parametrize(
    "code",
    [
        "import importlib\nimportlib.import_module('megatron_cp.comm')",
        "from importlib import import_module\nimport_module(entry.module)",
        "__import__(name)",
    ],
)
def test_an_import_by_string_is_noticed(code: str) -> None:
    assert list(loads_by_string(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch.distributed as dist\ndist.isend(x, 1)",
        "from torch import distributed as d\nd.all_to_all_single(x, y)",
        "from torch.distributed import all_gather as g\ng(x, y)",
    ],
)
def test_a_collective_is_noticed_however_it_is_imported(code: str) -> None:
    assert list(collectives(ast.parse(code)))


@pytest.mark.parametrize("code", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"])
def test_a_look_at_the_environment_is_noticed(code: str) -> None:
    assert list(environment_uses(ast.parse(code)))
