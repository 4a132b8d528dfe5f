"""Optimizer states in files: fewer bytes of memory, their time, and the tokens of a step that make it small."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cp.context.trace.record import record
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import estimate
from megatron_cp.planner.model import model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plan_request import PlanRequest
from megatron_cp.planner.search import search
from megatron_cp.planner.tiers import FREE, disk_rate, on_disk_seconds, tiers, token_seconds
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

H100 = load_cluster("dgx-h100")
LLAMA = model_of(recipe.load("models/llama2-13b", Unset({})))
SEQ = 8192
RUN = Parallel(tp=4, dp=2, sp=True, global_batch=16)


@pytest.mark.parametrize(("weights", "size"), [(False, 8), (True, 12)])
def test_what_is_in_files_takes_time_in_the_place_of_memory(weights: bool, size: int) -> None:
    plain = estimate(LLAMA, RUN, H100, SEQ, record)
    files = estimate(LLAMA, replace(RUN, state_dir="/nvme", state_weights=weights), H100, SEQ, record)
    moved = size * LLAMA.parameters / RUN.world
    # norms are on every rank of tensor parallelism
    assert plain.worst_memory.optimizer - files.worst_memory.optimizer == pytest.approx(moved, rel=1e-3)
    assert files.worst_memory.optimizer == pytest.approx((12 - size) * LLAMA.parameters / RUN.world, rel=1e-3)
    assert files.seconds - plain.seconds == pytest.approx(2 * moved / (0.8 * 25e9 / 8), rel=1e-3)
    assert files.parts.optimizer - plain.parts.optimizer == pytest.approx(files.seconds - plain.seconds)


def test_from_the_tokens_on_files_take_that_share_of_the_computing() -> None:
    found = tiers(LLAMA, H100, SEQ)
    assert found.host
    assert found.disk
    computing = found.disk * token_seconds(LLAMA, H100, SEQ) / RUN.world
    assert on_disk_seconds(H100, 12 * LLAMA.parameters / RUN.world) == pytest.approx(FREE * computing)
    # the rates of the two
    assert found.disk / found.host == pytest.approx(0.75 * 64 / (0.8 * 25 / 8))
    longer = tiers(LLAMA, H100, 128 * 1024)
    assert longer.disk
    assert longer.disk < found.disk / 2


def test_a_cluster_without_disks_is_refused_and_one_of_a_node_without_ranks(tmp_path: Path) -> None:
    bare = replace(H100, disk_bytes_per_s=None)
    assert disk_rate(bare) is None
    assert tiers(LLAMA, bare, SEQ).disk is None
    assert on_disk_seconds(bare, 0) == 0
    with pytest.raises(ValueError, match="has no rate of a node's disks; add disk: peak_gb_per_s"):
        estimate(LLAMA, replace(RUN, state_dir="/nvme"), bare, SEQ, record)
    file = tmp_path / "mine.yaml"
    text = Path(__file__).parents[2].joinpath("configs/clusters/this-cpu.yaml").read_text()
    file.write_text(text + "disk:\n  peak_gb_per_s: 2\n  efficiency: 0.5\n")
    if "ranks_per_node" not in text:
        with pytest.raises(ValueError, match=r"mine.yaml:\d+: .*; give ranks_per_node too"):
            load_cluster(str(file))
        file.write_text(f"{file.read_text()}ranks_per_node: 4\n")
    assert load_cluster(str(file)).disk_bytes_per_s == pytest.approx(1e9 / load_cluster(str(file)).ranks_per_node)


def test_a_plan_with_files_is_a_recipe_with_them(tmp_path: Path) -> None:
    request = PlanRequest(
        model=LLAMA, seq=SEQ, gpus=8, cluster=H100, global_batch=16, state_dir="/nvme", schedules=("1f1b",)
    )
    best = search(request, record, 1).options[0]
    assert best.parallel.disk_bytes == 12
    file = tmp_path / "plan.yaml"
    file.write_text(as_recipe(best, "models/llama2-13b"))
    again = recipe.load(str(file), Unset({"DATA_PATH": "text"}))
    assert parallel_of(again, LLAMA.layers).disk_bytes == 12
