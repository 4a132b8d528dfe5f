"""Shipped recipes pass Megatron's own checks and ours for their clusters; broken copies fail with the right line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cp.experts import DEEPSPEED_MOE, EXCHANGES, PLACEMENTS, PRODUCTS, ROUTERS
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments import validate
from megatron_cp.megatron.arguments.assumed_machine import assumed, gpu_of
from megatron_cp.megatron.rebind import find
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from tests.conftest import Write
from tests.ranks import run_ranks

type Broken = Callable[..., str]

# a recipe with something of everything: tensor, pipeline with chunks, context and data parallelism
BASE = "llama3.1-70b-32k-h100x256"
MODULE = "LAUNCH: {entry: somebody.elses.module}\n"


def verdict(run: validate.ClusterRun) -> list[str] | str:
    """In a rank's process: what was assumed, or the line that refuses the run."""
    environment = validate.environment(run)
    os.environ.clear()
    os.environ.update(environment)
    try:
        return validate.examine(run)
    except ValueError as error:
        return str(error)
    finally:
        assert not torch.cuda.is_initialized()


def examined(name: str, *flags: str, cluster: str | None = None) -> list[str] | str:
    run = validate.run_of(recipe.load(name, Unset({}), flags), cluster)
    (answer,) = run_ranks(1, verdict, run)
    return answer  # type: ignore[no-any-return]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """The line that refuses a copy of BASE with these lines under MODEL_ARGS."""
    monkeypatch.chdir(tmp_path)

    def broken(*lines: str, more: str = "") -> str:
        text = "".join(f"  {line}\n" for line in lines)
        Path("broken.yaml").write_text(f"extends: {BASE}\n{more}MODEL_ARGS:\n{text}")
        try:
            answer = examined("broken.yaml")
        except ValueError as error:
            return str(error)
        assert isinstance(answer, str), f"accepted, assuming {answer}"
        return answer

    return broken


@pytest.mark.parametrize("name", recipe.shipped("recipes"))
def test_every_recipe_is_valid_for_its_cluster(name: str) -> None:
    answer = examined(name)
    assert isinstance(answer, list), answer


MODELS = [name for name in recipe.shipped("models") if name != "models/llama"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_valid_on_two_nodes(write: Write, name: str) -> None:
    experts = "--num-experts" in recipe.load(name, Unset({})).model_args
    sizes = (
        "{--expert-model-parallel-size: 8}"
        if experts
        else "{--tensor-model-parallel-size: 8, --sequence-parallel: true}"
    )
    answer = examined(
        write(f"extends: [{name}, training/pretrain, training/gpus]\nCLUSTER: dgx-h100-ib\nMODEL_ARGS: {sizes}\n"),
        *("--context-parallel-size", "2", "--cp-comm-type", "zigzag", "--nnodes", "2", "--nproc-per-node", "8"),
        *("--micro-batch-size", "1", "--global-batch-size", "16"),
    )
    assert isinstance(answer, list), answer


OF_EXPERTS = dict.fromkeys(entry.preset for entry in (*PRODUCTS, *EXCHANGES, *PLACEMENTS, *ROUTERS) if entry.preset)


@pytest.mark.slow
@pytest.mark.parametrize("preset", OF_EXPERTS)
def test_every_preset_of_experts_is_valid_on_two_nodes(write: Write, preset: str) -> None:
    sizes = "--expert-model-parallel-size: 8"
    if preset == ROUTERS.get(DEEPSPEED_MOE).preset:
        sizes += ", --moe-shared-expert-intermediate-size: 14336"
    answer = examined(
        write(
            f"extends: [models/mixtral-8x7b, training/pretrain, training/gpus, {preset}]\nCLUSTER: dgx-h100-ib\n"
            f"MODEL_ARGS: {{{sizes}}}\n"
        ),
        *("--context-parallel-size", "2", "--cp-comm-type", "zigzag", "--nnodes", "2", "--nproc-per-node", "8"),
        *("--micro-batch-size", "1", "--global-batch-size", "16"),
    )
    assert isinstance(answer, list), answer


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["--num-query-groups: 3", "--tensor-model-parallel-size: 4"],
            ["num_query_groups (3) must be", "tensor_model_parallel_size (4)", "broken.yaml:3 --num-query-groups 3"],
        ),
        (["--num-layer: 80"], ["broken.yaml:3: unknown flag '--num-layer'; did you mean '--num-layers'?"]),
        (
            ["--cp-comm-type: nonsense"],
            ["unknown context-parallel backend 'nonsense'", "broken.yaml:3 --cp-comm-type nonsense"],
        ),
        (
            ["--seq-length: 32770"],
            ["--seq-length must be divisible by", "got 32770", "broken.yaml:3 --seq-length 32770"],
        ),
        (
            ["--context-parallel-size: 16", "--pipeline-model-parallel-size: 2", "--cp-comm-type: ulysses"],
            ["got 8 heads; use at most 8 ranks"],
        ),
        (["--context-parallel-size: 5"], ["TP=8 * PP=4 * CP=5 needs a multiple of 160 processes, got 256"]),
        (["--cp-comm-type: usp", "--hierarchical-context-parallel-sizes: [3, 2]"], ["3 * 2 = 6 and 4"]),
        (
            ["--pp-schedule: zb-h1"],
            [
                "--pp-schedule zb-h1 has 1 chunk per rank, got --num-virtual-stages-per-pipeline-rank 5",
                "--num-virtual-stages-per-pipeline-rank=false",
                "llama3.1-70b-32k-h100x256.yaml:",
            ],
        ),
        (
            ["--pp-schedule: zb-h1", "--cp-comm-type: usp"],
            ["zb-h1 has 1 chunk per rank", "; also: ", "usp needs two --hierarchical-context-parallel-sizes"],
        ),
        (
            ["--num-virtual-stages-per-pipeline-rank: 7"],
            ["num_layers_per_pipeline_rank 20 should be divisible by", "7"],
        ),
        (
            ["--global-batch-size: 12"],
            [
                "--pipeline-model-parallel-size 4 with chunks takes 4 microbatches",
                "broken.yaml:3 --global-batch-size 12",
            ],
        ),
        (["--global-batch-size: 127"], ["127"]),
        (["--context-parallel-size: 0"], ["broken.yaml:3: --context-parallel-size takes a positive int, got '0'"]),
        (["--recompute-granularity: selective", "--recompute-modules: nothing"], ["recompute_modules"]),
        (["--sequence-parallel: false", "--tp-comm-overlap: true"], ["sequence parallelism"]),
    ],
    ids=lambda value: value[0].split(":")[0].removeprefix("--") if isinstance(value, list) else None,
)
def test_a_broken_copy_fails_with_the_right_line(broken: Broken, lines: list[str], words: list[str]) -> None:
    line = broken(*lines)
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["--cp-comm-type: nonsense"], "unknown --cp-comm-type 'nonsense'"),
        (
            ["--cp-comm-type: a2a", "--context-parallel-size: 4"],
            "--num-query-groups of a tensor-parallel rank evenly over 4",
        ),
        (["--cp-comm-type: p2p", "--window-size: '1024,0'"], "--window-size needs --cp-comm-type all_gather or a2a"),
        (
            ["--transformer-impl: local", "--no-rope-fusion: true"],
            "--transformer-impl local has no context parallelism",
        ),
    ],
)
def test_what_stock_attention_cannot_do_is_refused_where_ours_is_not_in_force(
    broken: Broken, lines: list[str], words: str
) -> None:
    line = broken(*lines, more=MODULE)
    assert words in line
    assert "broken.yaml:4" in line


def test_upstreams_names_are_valid_with_stock_attention(tmp_path: Path) -> None:
    (tmp_path / "stock.yaml").write_text(f"extends: {BASE}\n{MODULE}")
    assert isinstance(examined(str(tmp_path / "stock.yaml")), list)


CHUNKS = "--pipeline-model-parallel-size 2 --context-parallel-size 1 --micro-batch-size 1"


@pytest.mark.parametrize(
    ("cluster", "flags", "refused"),
    [
        ("a100-ib", ("--fp8-format", "hybrid"), "command line: --fp8-format needs compute capability 8.9, got 8.0 of"),
        ("h100-ib", ("--fp8-format", "hybrid"), ""),
        ("h100-ib", ("--fp4-format", "e2m1"), "command line: --fp4-format needs compute capability 10.0, got 9.0 of"),
    ],
)
def test_low_precision_needs_a_gpu_that_has_it(cluster: str, flags: tuple[str, ...], refused: str) -> None:
    answer = examined("llama3.1-8b-8k-h100x8", *flags, cluster=cluster)
    if not refused:
        assert isinstance(answer, list), answer
        return
    assert isinstance(answer, str)
    assert answer.startswith(refused)
    assert "\n" not in answer


def test_a_layout_of_stages_is_valid() -> None:
    answer = examined("quickstart", *CHUNKS.split(), "--pipeline-model-parallel-layout=Et*2|t*2L", cluster="h100-ib")
    assert isinstance(answer, list), answer


@pytest.mark.parametrize(("first", "fits"), [(8, True), (1, False)])
def test_each_batch_size_of_a_schedule_is_checked(first: int, fits: bool) -> None:
    flags = f"{CHUNKS} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size=false --eval-iters 0".split()
    answer = examined("quickstart", *flags, f"--step-batch-size-schedule=0:{first} 1M:16", cluster="h100-ib")
    if fits:
        assert isinstance(answer, list), answer
    else:
        assert f"got 1 from --step-batch-size-schedule 0:{first} 1M:16" in answer


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("LAUNCH: {--nnodes: 33}\n", "broken.yaml:2: TP=8 * PP=4 * CP=4 needs a multiple of 128 processes, got 264"),
        ("LAUNCH: {--nnodes: 0}\n", "needs a multiple of 128 processes, got 0; change --nproc-per-node or --nnodes"),
        ("LAUNCH: {--nproc-per-node: 16}\n", "broken.yaml:2: --nproc-per-node 16, but a node of h100-ib has 8 GPUs"),
        ("LAUNCH: {--nproc-per-node: gpu}\n", "the number of processes is not known"),
        ("CLUSTER: h100-lb\n", "no cluster 'h100-lb'; did you mean 'h100-ib'?"),
        ("ENV_VARS: {CUDA_DEVICE_MAX_CONNECTIONS: 8}\n", "CUDA_DEVICE_MAX_CONNECTIONS to 1"),
        (
            "ENV_VARS: {NVTE_FLASH_ATTN: 0}\n",
            "broken.yaml:2: NVTE_FLASH_ATTN is '0', but Megatron sets it to 1 for --attention-backend auto",
        ),
    ],
)
def test_machines_and_environment_are_checked(broken: Broken, more: str, words: str) -> None:
    assert words in broken("--seed: 1", more=more)


@pytest.mark.parametrize(
    ("engine", "connections", "words"),
    [
        ("symmetric", "8", ""),
        ("symmetric", "1", "--tp-engine symmetric copies on a second stream, got CUDA_DEVICE_MAX_CONNECTIONS=1"),
        ("ring", "8", "CUDA_DEVICE_MAX_CONNECTIONS to 1"),
    ],
)
def test_one_connection_is_demanded_but_for_the_symmetric_engine(
    write: Write, engine: str, connections: str, words: str
) -> None:
    flags = f"{{--transformer-impl: local, --tp-comm-type: flux, --tp-engine: {engine}}}"
    name = write(f"extends: {BASE}\nENV_VARS: {{CUDA_DEVICE_MAX_CONNECTIONS: {connections}}}\nMODEL_ARGS: {flags}\n")
    answer = examined(name)
    assert words in answer if words else isinstance(answer, list), answer


def test_environment_that_says_the_same_as_megatron_is_accepted(write: Write) -> None:
    name = write(f"extends: {BASE}\nENV_VARS: {{NVTE_FUSED_ATTN: 1, NVTE_FLASH_ATTN: 1}}\n")
    assert isinstance(examined(name), list)
    name = write(
        f"extends: {BASE}\nENV_VARS: {{NVTE_FUSED_ATTN: 0}}\nMODEL_ARGS: {{--attention-backend: flash}}\n", "flash.yaml"
    )
    assert isinstance(examined(name), list)


def test_a_line_with_its_place_gets_no_others(broken: Broken) -> None:
    assert broken("--global-batch-size: [1, 2]").endswith("--global-batch-size takes one value, got 2: '1' '2'")


def test_the_laptops_own_environment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert isinstance(examined(BASE), list)


def test_what_would_load_something_is_not_passed_on() -> None:
    run = validate.run_of(recipe.load(BASE, Unset({})))
    name = {"LD_PRELOAD": "PYTHONSTARTUP", "PYTHONPATH": "PATH"}
    settings = {key: recipe.Setting(("x",), "here") for pair in name.items() for key in pair}
    hostile = run._replace(recipe=run.recipe.__class__(**{**vars(run.recipe), "env_vars": settings}))
    assert not {name for name, value in validate.environment(hostile).items() if value == "x"}


def test_a_recipe_without_cluster_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("MODEL_ARGS: {--num-layers: 2}\n")
    with pytest.raises(ValueError, match="names no CLUSTER; add one, or pass --cluster with one of: a100-ib"):
        validate.run_of(recipe.load(str(tmp_path / "bare.yaml"), {}))


@pytest.mark.parametrize("name", ["h100-ib", "a100-ib", "this-cpu"])
def test_what_is_assumed_is_gone_afterwards(name: str) -> None:
    import megatron.core.utils

    targets = (
        "torch.cuda:get_device_properties",
        "torch.cuda:is_available",
    )
    before = [find(target).value for target in targets], megatron.core.utils._te_version
    with assumed(load_cluster(name)):
        assert torch.cuda.is_available()
    assert ([find(target).value for target in targets], megatron.core.utils._te_version) == before


def test_a_cluster_says_which_gpu_megatron_hears_of() -> None:
    found: dict[str, Any] = {name: gpu_of(load_cluster(name)) for name in ("a100-ib", "h100-ib", "this-cpu")}
    assert found["this-cpu"] is None
    assert (found["a100-ib"].capability, found["h100-ib"].capability) == ((8, 0), (9, 0))


@pytest.mark.parametrize(("flags", "status"), [(["--lr", "1e-3"], 0), (["--context-parallel-size", "4"], 1)])
def test_the_command_says_what_it_assumed_or_one_line(flags: list[str], status: int) -> None:
    words = [sys.executable, "-m", "megatron_cp", "validate", "quickstart", *flags, "--cluster", "this-cpu"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    if status:
        assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
        assert "needs a multiple of 4 processes, got 2" in ended.stderr
    else:
        assert ended.stdout == "quickstart: valid for 2 processes on this-cpu\n  assumed: CPUs, no transformer-engine\n"
