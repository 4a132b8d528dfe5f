"""A plan fits, obeys the rules, beats everything else that was asked for, and comes back from its recipe unchanged."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import estimate
from megatron_cp.planner.memory import MemoryUse
from megatron_cp.planner.model import model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plan_request import HEADROOM, FixedSizes, PlanRequest, sequences
from megatron_cp.planner.plans import Plans
from megatron_cp.planner.search import search
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from tests.cases import slow_unless

# the tests share one search, which takes long
pytestmark = pytest.mark.xdist_group("planner/test_search")
CLUSTER = "dgx-h100-ib"


@cache
def request(gpus: int = 32) -> PlanRequest:
    model = model_of(recipe.load("models/llama3.1-8b", Unset({})))
    return PlanRequest(model=model, seq=32768, gpus=gpus, cluster=load_cluster(CLUSTER), global_batch=16)


# kinds of plans that are searched in a second or two
FEW: dict[str, Any] = {"backends": ("zigzag", "ulysses", "usp"), "schedules": ("1f1b", "zb-h1")}


@cache
def plans() -> Plans:
    return search(replace(request(), **FEW), stretching(record), 5)


def test_every_plan_fits_and_uses_all_gpus() -> None:
    for one in plans().options:
        parallel = one.parallel
        assert one.worst_memory.total <= 0.95 * 80e9
        assert parallel.world == 32
        assert parallel.tp <= 8
        assert 16 % (parallel.dp * parallel.micro_batch) == 0


@pytest.mark.slow
def test_plans_are_ranked_and_the_same_again() -> None:
    every = search(request(), stretching(record), 5).options
    seconds = [one.seconds for one in every]
    assert seconds == sorted(seconds)
    assert [one.parallel for one in search(request(), record, 5).options] == [one.parallel for one in every]


@pytest.mark.parametrize(
    "other",
    [
        Parallel(tp=4, cp=4, dp=2, sp=True, global_batch=16),
        Parallel(tp=8, cp=2, dp=2, sp=True, global_batch=16),
        Parallel(cp=8, dp=4, backend="usp", grid=Grid(4, 2), global_batch=16, recompute="full"),
        Parallel(tp=2, cp=4, pp=4, dp=1, sp=True, global_batch=16, schedule="zb-h1"),
        Parallel(cp=2, dp=16, global_batch=16, backend="ulysses", recompute="full"),
    ],
)
def test_nothing_that_fits_is_faster_than_the_best_plan(other: Parallel) -> None:
    found = estimate(request().model, other, request().cluster, 32768, record)
    assert not found.leaves(HEADROOM) or found.seconds >= plans().best.seconds


def test_the_recipe_of_a_plan_is_the_plan(tmp_path: Path) -> None:
    for one in plans().options:
        file = tmp_path / "planned.yaml"
        file.write_text(as_recipe(one, "models/llama3.1-8b"))
        read = recipe.load(str(file), {"DATA_PATH": "corpus"})
        assert parallel_of(read, 32) == one.parallel
        assert (read.cluster, read.required("--seq-length")) == (CLUSTER, 32768)


@pytest.mark.slow
def test_activations_on_the_host_are_weighed_where_asked(tmp_path: Path) -> None:
    model = model_of(recipe.load("models/llama3.1-70b", Unset({})))
    long = PlanRequest(model=model, seq=2**20, gpus=256, cluster=load_cluster(CLUSTER), global_batch=4)
    best, other = search(replace(long, offload=True), record, 1).best, search(long, record, 1).best
    assert other.parallel.recompute == "full"
    assert best.parallel.moves
    assert best.parallel.recompute == "none"
    assert best.seconds < 0.9 * other.seconds
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(best, "models/llama3.1-70b"))
    assert parallel_of(recipe.load(str(file), {"DATA_PATH": "corpus"}), 256) == best.parallel


def test_slices_are_weighed_where_asked(tmp_path: Path) -> None:
    fixed = FixedSizes(tp=8, cp=2, pp=2, dp=1, vp=1, micro_batch=1)
    asked = replace(request(), global_batch=2, backends=("zigzag",), schedules=("1f1b",), fixed=fixed)
    (whole,), (sliced,) = (search(replace(asked, slices=slices), record, 1).options for slices in ((), (4,)))
    assert (whole.parallel.slices, sliced.parallel.slices) == (1, 4)
    assert sliced.seconds < whole.seconds
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(sliced, "models/llama3.1-8b"))
    assert parallel_of(recipe.load(str(file), {"DATA_PATH": "corpus"}), 32) == sliced.parallel
    assert "4 slices" in file.read_text()


def test_overlap_of_linears_is_taken_where_asked_and_where_no_weight_gradient_waits(tmp_path: Path) -> None:
    fixed = FixedSizes(tp=8, cp=2, pp=2, dp=1, vp=1, micro_batch=1)
    asked = replace(request(), backends=("zigzag",), fixed=fixed, tp_overlap=True)
    (whole,), (split,) = (search(replace(asked, schedules=(name,)), record, 1).options for name in ("1f1b", "zb-h1"))
    (alone,) = search(replace(asked, schedules=("1f1b",), tp_overlap=False), record, 1).options
    assert (whole.parallel.tp_overlap, split.parallel.tp_overlap, alone.parallel.tp_overlap) == (True, False, False)
    assert whole.seconds < alone.seconds
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(whole, "models/llama3.1-8b"))
    assert parallel_of(recipe.load(str(file), {"DATA_PATH": "corpus"}), 32) == whole.parallel


def test_two_copies_of_the_model_are_weighed_where_asked(tmp_path: Path) -> None:
    sizes = FixedSizes(tp=8, cp=1, pp=4, micro_batch=1)
    two, offloading = (
        search(replace(request(), schedules=("chimera-zb",), fixed=sizes, offload=offload), record, 1).best
        for offload in (False, True)
    )
    assert two.parallel.schedule == "chimera-zb"
    assert two.parallel == offloading.parallel
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(two, "models/llama3.1-8b"))
    assert parallel_of(recipe.load(str(file), {"DATA_PATH": "corpus"}), 32) == two.parallel


def test_fixed_sizes_are_the_plans() -> None:
    sizes = {"tp": 4, "cp": 2, "pp": 2, "dp": 2, "vp": 2, "micro_batch": 2}
    fixed = replace(request(), fixed=FixedSizes(**sizes), backends=("zigzag",))
    (only,) = search(fixed, record, 5).options
    assert {name: getattr(only.parallel, name) for name in sizes} == sizes
    three = replace(request(24), global_batch=24, fixed=FixedSizes(cp=3, tp=2), backends=("zigzag",))
    assert {one.parallel.cp for one in search(replace(three, seq=24576), record, 2).options} == {3}


def test_headroom_leaves_memory_free() -> None:
    most = 0.4 * 80e9
    found = search(replace(request(), headroom=0.6, backends=("zigzag",), schedules=("1f1b",)), record, 1)
    assert found.best.worst_memory.total <= most
    assert found.best.seconds >= plans().best.seconds


def test_a_much_smaller_plan_that_is_as_fast_is_named() -> None:
    found = plans()
    best = found.best
    memory = tuple(replace_total(one, 0.8) for one in best.memory)
    small = replace(best, memory=memory, parts=best.parts._replace(data=best.parts.data + 0.005 * best.seconds))
    assert replace(found, options=(best, small)).smaller == small
    slow = replace(small, parts=best.parts._replace(data=best.parts.data + 0.02 * best.seconds))
    assert replace(found, options=(best, slow)).smaller is None
    assert replace(found, options=(best, best)).smaller is None


def replace_total(memory: MemoryUse, share: float) -> MemoryUse:
    return MemoryUse(*(share * size for size in memory))


MIXTURE = """
MODEL_ARGS:
  --num-layers: 8
  --hidden-size: 1024
  --num-attention-heads: 8
  --vocab-size: 32000
  --swiglu: true
  --num-experts: 8
  --moe-router-topk: 2
  --optimizer-cpu-offload: true
"""


@pytest.mark.slow
def test_a_file_of_ones_own_is_planned_in_fp8(tmp_path: Path) -> None:
    own, written = tmp_path / "mixture.yaml", tmp_path / "planned.yaml"
    own.write_text(MIXTURE)
    words = "--seq 4K --gpus 8 --cluster dgx-h100 --tokens-per-batch 32K --schedules 1f1b --top 2 --precision fp8"
    command = ["plan", "--model", str(own), *words.split(), "--write", str(written)]
    told = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "not in the estimate: --optimizer-cpu-offload" in told
    read = recipe.load(str(written), {"DATA_PATH": "corpus"})
    parallel = parallel_of(read, 8)
    assert (parallel.precision, parallel.world, model_of(read).experts) == ("fp8", 8, 8)
    assert told.splitlines()[0].startswith("mixture on 8 GPUs of dgx-h100")
    done = CliRunner().invoke(app, ["plan", "--model", str(own), *words.split(), "--json"], catch_exceptions=False)
    assert len(json.loads(done.stdout)) == 2
    assert "not in the estimate: --optimizer-cpu-offload\n" in done.stderr


def test_it_says_why_and_what_was_left_out() -> None:
    found = plans()
    assert " is bound by " in found.why
    assert "longer, most of it for " in found.why or "is as fast" in found.why
    # others fit too, they were not asked for
    assert replace(found, options=found.options[:1]).why.endswith(f"is bound by {found.best.bound_by}")
    assert found.left_out["memory"] > 0
    assert found.left_out["tensor parallel inside a node"] == 2


@pytest.mark.parametrize(("gpus", "batch"), [(1, 1), (4, 16)])
def test_what_fits_nowhere_names_the_gpus_that_can_hold_it(gpus: int, batch: int) -> None:
    small = replace(request(), gpus=gpus, global_batch=batch, seq=131072, **FEW)
    with pytest.raises(ValueError, match=r"fits on \d GPUs of dgx-h100-ib; left out by: memory ") as refused:
        search(small, record)
    named = int(re.search(r"; (\d+) GPUs can hold it$", str(refused.value))[1])
    assert search(replace(small, gpus=named), record, 1).best.fits
    with pytest.raises(ValueError, match="no split"):
        search(replace(small, gpus=named // 2), record)


@pytest.mark.parametrize(
    ("gpus", "asked", "batch"),
    [(64, 32, 32), (16384, 128, 128), (16, 20, 20), (8, 4194, 4192), (24, 512, 504), (7, 512, 511), (96, 32, 30)],
)
def test_a_batch_is_one_that_ranks_can_share(gpus: int, asked: int, batch: int) -> None:
    assert sequences(asked * 1000, 1000, gpus) == batch


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ("--model llama4", "no model 'llama4'"),
        ("--precision int8", "int8"),
        ("--seq 4Q", "unknown unit 'Q'"),
        ("--cluster h10-ib", "did you mean 'h100-ib'"),
        ("--backends zigzig", "did you mean 'zigzag'"),
        ("--schedules 1f1bb", "did you mean '1f1b'"),
        ("--moe-exchanges tow-hop", "unknown exchange of experts 'tow-hop'; did you mean 'two-hop'"),
        ("--moe-pieces none", "--moe-pieces takes a count"),
        ("--pp-vocab-parallel 1,3", "takes 1 or 2 barriers, got 3"),
        ("--cluster dgx-h100 --gpus 16", "dgx-h100 is one node of 8 GPUs, got 16"),
        ("--cluster dgx-h100 --model llama3.1-405b", "8 GPUs of dgx-h100; .*; no number of them can hold it"),
        ("--gpus 12", "12 GPUs must be a whole number of nodes of 8; ask for 8 or 16"),
        ("--cluster this-cpu", "no rates of bfloat16 matrix products"),
        ("--tokens-per-batch 8K", "must be at least a sequence of 32,768 tokens"),
        ("--write nowhere/plan.yaml", "no folder nowhere"),
        ("--tp 8 --cp 3", "TP 8 x CP 3 = 24 ranks do not divide 8 GPUs"),
        ("--tp 2 --cp 1 --pp 1 --dp 2", "TP 2 x CP 1 x PP 1 x DP 2 = 4 ranks are not 8 GPUs"),
        ("--vp 2 --pp 1", "2 virtual stages need a pipeline"),
        ("--gpus 64 --tp 16", "no split with tp 16 of llama3.1-8b .*tensor parallel inside a node"),
    ],
)
def test_bad_input_is_refused_by_name(changed: str, text: str) -> None:
    words = "plan --model llama3.1-8b --seq 32K --gpus 8 --cluster h100-ib".split() + changed.split()
    with pytest.raises(ValueError, match=text):
        CliRunner().invoke(app, words, catch_exceptions=False)


# sizes that others have published for these: the first two are recipes of Megatron Bridge, the third the first one with
# eight times the context parallelism, then Llama 3 (arXiv:2407.21783, table 4) and USP (arXiv:2405.07719)
PUBLISHED = {
    "llama3.1-8b 131072 64 dgx-h100-ib 32": Parallel(tp=4, pp=2, cp=8, dp=1, sp=True, global_batch=32),
    "llama3.1-70b 32768 256 dgx-h100-ib 128": Parallel(tp=8, pp=4, cp=4, dp=2, sp=True, global_batch=128),
    "llama3.1-8b 1048576 512 dgx-h100-ib 4": Parallel(tp=4, pp=2, cp=64, dp=1, sp=True, global_batch=4),
    "llama3.1-405b 131072 16384 dgx-h100-ib 128": Parallel(
        tp=8, pp=16, vp=8, cp=16, dp=8, sp=True, backend="all-gather", balanced_ends=True, global_batch=128
    ),
    "llama2-7b 212992 16 a800-ib 20": Parallel(
        cp=16, backend="usp", grid=Grid(8, 2), recompute="full", global_batch=20
    ),
}


# the one that is searched fastest
SEARCHED = [case for case in PUBLISHED if case.startswith("llama2-7b")]


@pytest.mark.parametrize("case", slow_unless(SEARCHED, PUBLISHED))
def test_the_best_plan_is_at_least_as_fast_as_what_was_published(case: str) -> None:
    name, *numbers = case.split()
    seq, gpus, batch = int(numbers[0]), int(numbers[1]), int(numbers[3])
    model, cluster = model_of(recipe.load(f"models/{name}", Unset({}))), load_cluster(numbers[2])
    recorded = stretching(record)
    # a best plan among fewer kinds is a bound for the best of all, and found sooner
    fewer = {"backends": ("zigzag", "usp"), "schedules": ("1f1b", "interleaved")} if gpus > 1024 else {}
    request = PlanRequest(model=model, seq=seq, gpus=gpus, cluster=cluster, global_batch=batch, **fewer)
    best = search(request, recorded, 1).best
    assert best.fits
    assert best.seconds <= estimate(model, PUBLISHED[case], cluster, seq, recorded).seconds


def test_the_fastest_plans_of_a_longer_list_are_the_shorter_one() -> None:
    words = "plan --model llama3.1-8b --seq 8K --gpus 8 --cluster dgx-h100 --tokens-per-batch 64K --json"
    few = "--backends zigzag --schedules 1f1b --top"
    one, three = (
        json.loads(CliRunner().invoke(app, f"{words} {few} {top}".split(), catch_exceptions=False).stdout)
        for top in (1, 3)
    )
    assert len(one) == 1
    assert len(three) == 3
    assert one == three[:1]
    assert [plan["step_seconds"] for plan in three] == sorted(plan["step_seconds"] for plan in three)
