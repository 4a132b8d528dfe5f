"""Flags of a model's recipe that a plan takes along, and those in whose place it chooses."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.context.trace.record import record
from megatron_cp.experts.copies import ExpertCopies
from megatron_cp.planner.flags import MODELLED
from megatron_cp.planner.model import model_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_flags import CHOSEN, KEPT, chosen, kept
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plan_request import FixedSizes
from megatron_cp.planner.search import search
from megatron_cp.recipe.recipe import load
from tests.planner.test_experts import REQUEST, mixtral

ISLANDS = "--local-sgd-steps 8 --num-distributed-optimizer-instances 2"


def test_what_is_kept_or_chosen_is_modelled() -> None:
    assert set(KEPT) | CHOSEN <= MODELLED
    assert not set(KEPT) & CHOSEN
    assert {name for names in KEPT.values() for name in names} <= {field.name for field in fields(Parallel)}


def test_flags_that_are_given_are_kept() -> None:
    assert kept(mixtral()) == {}
    found = kept(mixtral(f"{ISLANDS} --grad-reduce-in-bf16 --moe-placement lina --pp-offload 2"))
    assert found == {
        "local_steps": 8,
        "instances": 2,
        "fp32_grads": False,
        "expert_copies": ExpertCopies("lina"),
        # copies are of whole experts
        "etp": 1,
    }
    assert chosen(mixtral("--pp-offload 2"))["--pp-offload"] == "2"


def test_what_is_of_an_exchange_that_a_run_chooses_goes_with_it() -> None:
    words = "--moe-comm-type tutel --moe-degrees 1,2 --moe-tuning steps --moe-cluster dgx-h100-ib"
    assert set(words.split()[::2]) <= set(chosen(mixtral(words)))
    # copies of experts have costs too
    assert "--moe-cluster" not in chosen(mixtral(f"{words} --moe-placement lina"))


def test_every_plan_has_them_and_sizes_divide() -> None:
    run = mixtral(f"{ISLANDS} --grad-reduce-in-bf16 --moe-placement lina")
    request = replace(
        REQUEST, model=model_of(run), kept=kept(run), fixed=FixedSizes(tp=2, cp=1, pp=1, micro_batch=1), headroom=0.0
    )
    found = search(request, record, 3)
    for one in found.options:
        sizes = one.parallel
        assert (sizes.local_steps, sizes.instances, sizes.fp32_grads) == (8, 2, False)
        assert sizes.expert_copies.policy == "lina"
        # copies are dealt out by one dispatcher alone
        assert sizes.dispatch.dispatcher == "alltoall"
        assert sizes.expert_tp == 1
    for line in (
        "--moe-placement: lina",
        "--expert-tensor-parallel-size: 1",
        "--transformer-impl: local",
        "--no-gradient-accumulation-fusion: true",
    ):
        assert line in as_recipe(found.best, "models/mixtral-8x7b"), line
    # three instances divide none of 32 data-parallel ranks
    with pytest.raises(ValueError, match="sizes that the recipe's flags divide"):
        search(replace(request, gpus=8, global_batch=8, kept={"instances": 3}), record, 1)


def test_plan_says_what_it_chooses_itself() -> None:
    words = (
        "--seq 2K --gpus 8 --cluster dgx-h100 --tokens-per-batch 64K --tp 1 --cp 1 --pp 1 --micro-batch-size 1 --top 1"
    )
    model = "-- torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 4 --hidden-size 512 --num-attention-heads 8"
    more = (
        "--seq-length 1024 --max-position-embeddings 1024 --vocab-size 1024 --pp-offload 2 --mlp-chunks-for-training 4"
    )
    told = CliRunner().invoke(app, ["plan", *words.split(), *model.split(), *more.split()], catch_exceptions=False)
    assert "the plan's own choice in the place of the recipe's: " in told.stdout
    assert "--pp-offload 2" in told.stdout.splitlines()[-1] + told.stdout.splitlines()[-2]
    assert "--mlp-chunks-for-training" not in told.stdout


@pytest.mark.parametrize(("length", "planned"), [("2K", None), ("128K", "full")], ids=["none", "full"])
def test_the_written_recipe_takes_back_what_the_plan_replaces(length: str, planned: str | None, tmp_path: Path) -> None:
    model, written = tmp_path / "model.yaml", tmp_path / "planned.yaml"
    model.write_text(
        "extends: models/llama3.1-8b\nMODEL_ARGS:\n  --pp-slices: 4\n  --pp-offload: 2\n"
        "  --pp-schedule: 1f1b\n  --fp8-format: hybrid\n  --recompute-granularity: selective\n"
        "  --recompute-modules: core_attn\n"
    )
    words = f"--seq {length} --gpus 8 --cluster dgx-h100 --tokens-per-batch 4M --tp 8 --cp 1 --pp 1 --top 1"
    asked = ["plan", *words.split(), "--model", str(model), "--write", str(written)]
    told = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert "--pp-slices 4, --pp-offload 2" in told.stdout.replace("\n", " ")
    flags = load(str(written), {"DATA_PATH": "corpus"}).model_args
    assert {"--pp-slices", "--pp-offload", "--pp-schedule", "--fp8-format", "--recompute-modules"}.isdisjoint(flags)
    assert (flags["--recompute-granularity"].text if "--recompute-granularity" in flags else None) == planned
    assert flags["--tensor-model-parallel-size"].text == "8"
    line = CliRunner().invoke(app, ["render", str(written)], env={"DATA_PATH": "corpus"}, catch_exceptions=False)
    assert "--tensor-model-parallel-size 8" in line.stdout
    assert not any(word in line.stdout for word in ("--pp-slices", "--pp-offload"))
