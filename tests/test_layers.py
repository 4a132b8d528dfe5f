"""The layers hold: pure Python below torch below Megatron, one file for the environment, one for collectives."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_cp"
FILES = sorted(PACKAGE.rglob("*.py"))
# what a user of the command line or of the menus imports before anything is computed
PURE = sorted(
    [
        "megatron_cp",
        "megatron_cp.command",
        "megatron_cp.config",
        "megatron_cp.context",
        "megatron_cp.context.layouts",
        "megatron_cp.context.tiles",
        "megatron_cp.context.trace",
        "megatron_cp.grid",
        "megatron_cp.kernels",
        "megatron_cp.planner.choose_backend",
        "megatron_cp.planner.hardware",
        "megatron_cp.planner.simulate_trace",
        "megatron_cp.recipe",
        "megatron_cp.registry",
        "megatron_cp.runlog",
        "megatron_cp.slurm.job",
        "megatron_cp.slurm.preflight",
        "megatron_cp.slurm.script",
        *(f"megatron_cp.{path.parent.name}.{path.stem}" for path in (PACKAGE / "cli").glob("[!_]*.py")),
        *(f"megatron_cp.{path.parent.name}.{path.stem}" for path in (PACKAGE / "data").glob("[!_]*.py")),
    ]
)
HEAVY = ("torch", "megatron.core", "megatron.training", "matplotlib")
# two doors that hand over to megatron_cp.megatron and do nothing else, and the doctor, who looks at every layer
ABOVE = ("launch.py", "pretrain_gpt.py", "doctor.py")
COLLECTIVES = {
    *("all_gather all_gather_into_tensor all_gather_object all_reduce all_to_all all_to_all_single barrier").split(),
    *("batch_isend_irecv broadcast broadcast_object_list gather gather_object irecv isend recv reduce send").split(),
    *("monitored_barrier reduce_scatter reduce_scatter_tensor scatter scatter_object_list P2POp").split(),
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(root: ast.AST) -> Iterator[str]:
    """Full names of everything that a file imports, at any depth."""
    for node in ast.walk(root):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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


def test_pure_modules_import_without_torch_and_no_slower_than_what_they_stand_on() -> None:
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
    subprocess.run([sys.executable, "-c", code], check=True)  # so that all are compiled
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, *heavy = result.stdout.split()
    assert not heavy
    assert float(ratio) < 2


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_adapters_import_megatron(path: Path) -> None:
    if not name_of(path).startswith("megatron/"):
        assert not [name for name in imported(tree(path)) if within(name, "megatron")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    name = name_of(path)
    upper: tuple[str, ...]
    if name.startswith("megatron/") or name in ABOVE:
        upper = ("megatron_cp.cli",)
    elif name.startswith("cli/") or name == "__main__.py":
        upper = ()
    else:
        upper = ("megatron_cp.cli", "megatron_cp.megatron")
    assert not [found for found in imported(tree(path)) if any(within(found, layer) for layer in upper)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_comm_calls_collectives(path: Path) -> None:
    if name_of(path) != "comm.py":
        assert not list(collectives(tree(path)))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_config_touches_the_environment(path: Path) -> None:
    if name_of(path) != "config.py":
        assert not list(environment_uses(tree(path)))


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
