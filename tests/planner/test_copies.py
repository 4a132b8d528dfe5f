"""Copies of busy experts in the estimate of a step: rows, memory, bytes and seconds, worked out by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.experts import PLACEMENTS
from megatron_cp.experts.copies import NO_COPIES, ExpertCopies, SharedExperts, copied, sent_bytes
from megatron_cp.experts.dispatch_cost import DispatchSize, ExpertRanks, PassSeconds, dispatch_bytes, dispatch_seconds
from megatron_cp.experts.routed import RoutedRows, Routing
from megatron_cp.experts.slots import lent_bytes
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.placements import placed, placement_why, placements
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plans import label
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.recipe import recipe
from tests.planner.test_experts import mixtral

H100 = load_cluster("dgx-h100-ib")
LOADS = (0.4, 0.2, 0.2, 0.2)
LAYERS, MICROS, TOKENS = 2, 2, 1024
# 4 experts of 3 x 1024 x 512 numbers in bfloat16 on 4 ranks of a node
MODEL = Transformer(
    name="mixture",
    layers=LAYERS,
    hidden=1024,
    ffn=2048,
    heads=8,
    kv_heads=8,
    head_dim=128,
    vocab=1024,
    experts=4,
    top_k=2,
    expert_ffn=512,
    routing=Routing(loads=LOADS),
)
EXPERT = 2 * 3 * 1024 * 512
SHARED = Parallel(dp=4, ep=4, global_batch=4 * MICROS)
# both slots of the busiest expert's equal shares, then one each of the next: hosted are 1, 0, 0 and 2
LINA = ExpertCopies("lina", slots=1, ahead=0)


def of(copies: ExpertCopies = LINA, **changes: Any) -> Estimate:
    return estimate(MODEL, replace(SHARED, expert_copies=copies, **changes), H100, TOKENS)


def test_rows_of_ranks_and_rows_on_their_way() -> None:
    size = SharedExperts(1024, 512, 3, 4)
    found = copied(LINA, tuple(2 * load for load in LOADS), TOKENS, size, MICROS)
    assert found.plan.hosted == ((1,), (0,), (0,), (2,))
    # in rows of a rank: three with expert 0 have .4 + .4 / 3 of it, and .2 + .2 of one that two have; the last .4 + .8
    assert found.rows == pytest.approx(RoutedRows(2 * 1.0, 2 * 1.2))
    # .4, .4, .4 and .6 leave, at most .2 + .6 arrive; of an even load a fourth stays
    assert found.travelling == pytest.approx(RoutedRows(2 * 1.8 / 4 * 4 / 3, 2 * 0.8 * 4 / 3))
    # the first rank lends two and hosts one
    assert (found.hosts, found.port, found.moved) == (1, 2, 3)
    none = copied(NO_COPIES, tuple(2 * load for load in LOADS), TOKENS, size, MICROS)
    assert (none.plan.copies, none.rows, none.travelling) == (
        0,
        RoutedRows(2.0, 3.2),
        pytest.approx(RoutedRows(2, 3.2)),
    )


def test_a_rank_sends_its_part_of_what_a_run_counts() -> None:
    plan = copied(LINA, tuple(2 * load for load in LOADS), TOKENS, SharedExperts(1024, 512, 3, 4), MICROS).plan
    # weights of four copies and their gradients in two microbatches
    assert lent_bytes(plan, EXPERT, MICROS) == 4 * EXPERT * 3
    alone, apart = (sent_bytes(plan, EXPERT, MICROS, nodes) for nodes in ((0, 0, 0, 0), (0, 0, 1, 1)))
    assert alone == (3 * EXPERT, 0.0)
    # expert 0 on the third rank goes to the other node
    assert apart == pytest.approx((3 / 4 * 3 * EXPERT, 1 / 4 * 3 * EXPERT))


def test_bytes_of_a_step() -> None:
    size = DispatchSize(TOKENS, 1.2 * TOKENS, 2 * 1024, 4)
    rows = dispatch_bytes(of().parallel.dispatch, size, ExpertRanks(4), H100)
    found = of().traffic
    assert found.inside.expert == pytest.approx(LAYERS * (MICROS * rows.inside + 3 * EXPERT))
    assert found.between.expert == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_seconds_of_weights_once_and_of_gradients_in_each_microbatch(ahead: int) -> None:
    link = H100.inside
    # two copies leave the busiest port
    once = 3 * link.least_s + 2 * EXPERT / link.rate("gather")
    size = DispatchSize(TOKENS, 2 * 0.8 * 4 / 3 * TOKENS, 2 * 1024, 4)
    rows = dispatch_seconds(of().parallel.dispatch, size, ExpertRanks(4), H100, PassSeconds(0.0, 0.0)).total
    # a layer before it computes for longer than copies travel; nothing is before the first one
    waiting = 1 if ahead else LAYERS
    found = of(LINA._replace(ahead=ahead))
    assert found.parts.collectives == pytest.approx(LAYERS * MICROS * rows + waiting * (1 + MICROS) * once)
    assert placed(found).waited == pytest.approx(waiting * (1 + MICROS) * once)
    # gradients of layers that are computed again are waited for there
    again = of(LINA._replace(ahead=ahead), recompute="full").parts.collectives
    assert again >= found.parts.collectives + (LAYERS - waiting) * MICROS * once


def test_a_recomputation_sends_no_copies_again() -> None:
    size = DispatchSize(TOKENS, 2 * 0.8 * 4 / 3 * TOKENS, 2 * 1024, 4)
    rows = dispatch_seconds(of().parallel.dispatch, size, ExpertRanks(4), H100, PassSeconds(0.0, 0.0))
    more = of(recompute="full").parts.collectives - of().parts.collectives
    assert more == pytest.approx(LAYERS * MICROS * rows.forward)


def test_memory_of_hosted_weights_and_of_a_layer_on_its_way() -> None:
    none, lina = (of(copies).worst_memory for copies in (NO_COPIES, LINA))
    assert lina.weights - none.weights == LAYERS * EXPERT
    assert lina.buffers - none.buffers == 3 * EXPERT
    # those of the layer ahead too
    assert of(LINA._replace(ahead=1)).worst_memory.buffers - none.buffers == 2 * 3 * EXPERT
    assert (lina.gradients, lina.optimizer) == (none.gradients, none.optimizer)
    assert lina.activations < none.activations
    # a stage of a pipeline has the copies of its own layers
    halves = [of(copies, pp=2, dp=4).worst_memory.weights for copies in (NO_COPIES, LINA)]
    assert halves[1] - halves[0] == EXPERT


def test_experts_of_neighbours_are_lent_in_parts() -> None:
    none, lina = (
        estimate(MODEL, replace(SHARED, tp=2, sp=True, ep=4, expert_copies=copies), H100, TOKENS).worst_memory
        for copies in (NO_COPIES, LINA)
    )
    assert lina.weights - none.weights == LAYERS * EXPERT / 2


def test_the_busiest_rank_has_less_to_compute() -> None:
    # of so many rows that calls of smaller products do not count
    none, lina = (estimate(MODEL, of(copies).parallel, H100, 16 * TOKENS) for copies in (NO_COPIES, LINA))
    assert lina.parts.products < none.parts.products
    assert lina.seconds < none.seconds
    # where loads are even copies cost and gain nothing
    even = [estimate(replace(MODEL, routing=Routing()), one.parallel, H100, TOKENS).seconds for one in (none, lina)]
    assert even[0] < even[1]


def test_each_policy_is_weighed_beside_none() -> None:
    weighed = placements(of(NO_COPIES))
    assert {one.asked.policy for one in weighed} == {"none", *PLACEMENTS.names}
    assert [one.seconds for one in weighed] == sorted(one.seconds for one in weighed)
    by_name = {one.asked.policy: one for one in weighed}
    assert by_name["none"][1:] == (of(NO_COPIES).seconds, pytest.approx(1.6), 0, 0, 0)
    ahead = of(LINA._replace(ahead=1)).seconds
    assert by_name["lina"][1:] == pytest.approx((ahead, 1.2, LAYERS * EXPERT, LAYERS * 3 * EXPERT, 0), abs=1e-3)
    assert placed(of()).seconds == of().seconds
    told = placement_why(of(LINA._replace(ahead=1)))
    assert told.startswith("placement of copies with lina: ")
    assert str(by_name["lina"]) in told
    assert "none" in told


def test_loads_of_another_number_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="loads of 3 experts are given for 4"):
        estimate(replace(MODEL, routing=Routing(loads=(0.5, 0.3, 0.2))), SHARED, H100, TOKENS)


def test_flags_say_which_copies(tmp_path: Any) -> None:
    flags = "--moe-placement lina --moe-replica-slots 2 --expert-model-parallel-size 8"
    run = mixtral(flags)
    found = parallel_of(run, 32)
    assert found.expert_copies == ExpertCopies("lina", 2, "dgx-h100", 1)
    # as in training, copies imply the dispatcher
    assert found.dispatch.dispatcher == "alltoall"
    assert set(unmodelled(run)) == set(unmodelled(mixtral("--expert-model-parallel-size 8")))
    other = parallel_of(mixtral(f"{flags} --moe-cluster h100-ib --moe-copies-ahead 0"), 32).expert_copies
    assert (other.cluster, other.ahead) == ("h100-ib", 0)
    with pytest.raises(ValueError, match="unknown"):
        parallel_of(mixtral("--moe-placement linna"), 32)


def test_a_recipe_of_a_plan_with_copies_says_so(tmp_path: Any) -> None:
    run = mixtral("--expert-model-parallel-size 8 --global-batch-size 8")
    copies = ExpertCopies("flexmoe", 2)
    sizes = replace(parallel_of(run, 32), expert_copies=copies, distributed_optimizer=True)
    assert "EP=8 flexmoe 2" in label(sizes).replace(" (allgather)", "")
    found = estimate(replace(MODEL, experts=8, routing=Routing()), replace(sizes, global_batch=8), H100, TOKENS)
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(found, "models/mixtral-8x7b"))
    again = recipe.load(str(file), {"DATA_PATH": "corpus"})
    assert parallel_of(again, 32).expert_copies == copies
    assert again.flag("--transformer-impl", "") == "local"


def test_estimate_prints_a_step_with_and_without_each_policy() -> None:
    flags = "--num-experts 8 --expert-model-parallel-size 4 --moe-placement flexmoe --moe-replica-slots 2 --skew 1.2"
    command = ["estimate", "llama3.1-8b-8k-h100x8", *flags.split()]
    told = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "placement of copies with flexmoe: " in told
    found = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    by_name = {one["policy"]: one for one in found["experts"]["placements"]}
    assert by_name["flexmoe"]["seconds"] == pytest.approx(found["step_seconds"])
    assert by_name["flexmoe"]["slots"] == 2
    assert by_name["flexmoe"]["uneven"] < by_name["none"]["uneven"]


def test_loads_of_a_run_stand_in_for_a_law(tmp_path: Any) -> None:
    folder = tmp_path / "tokens_per_expert"
    folder.mkdir()
    for rank, tokens in enumerate(([40, 20], [20, 20])):
        line = {"iter": 1, "block": "decoder", "layer": 1, "tpe": [tokens]}
        (folder / f"rank{rank}.jsonl").write_text(json.dumps(line) + "\n")
    flags = "--num-experts 4 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    command = ["estimate", "llama3.1-8b-8k-h100x8", *flags.split(), "--expert-loads", str(tmp_path)]
    told = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    # .4 + .2 of all on the first of two ranks
    assert "the busiest rank has 1.20 times the mean" in told
    both = CliRunner().invoke(app, [*command, "--skew", "1.2"])
    assert "--skew 1.2 and --expert-loads both load the experts; give one of the two" in str(both.exception)
