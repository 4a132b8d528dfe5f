"""Choices of experts that are logged by the real pretrain() are those of all routing maps, each counted once."""

import functools
import re
import sys
from collections import defaultdict

import pytest
import torch

from megatron_cp import report, runlog
from tests.megatron.pretraining import preset, tiny
from tests.ranks import run_ranks_with_log

EXPERTS = 8
MOE = f"""
--cp-kernel auto --num-experts {EXPERTS} --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-ffn-hidden-size 48
--moe-token-dispatcher-type alltoall --train-iters 4
"""
TWICE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def counted(flags):
    """Per layer of the model and step: choices, and those that each expert got, of this rank, from logits and maps."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args

    from megatron_cp.megatron.process import pretrain
    from megatron_cp.megatron.process.launch import launched

    found = defaultdict(lambda: defaultdict(int))

    def noted(router, routing, logits, **rest):
        gates, sent = routing(logits, **rest)
        if router.training and torch.is_grad_enabled():
            wanted = torch.zeros_like(sent).scatter(
                1, logits.detach().view(len(sent), -1).topk(router.topk).indices, True
            )
            got = (wanted & sent).sum(0)
            found[router.layer_number][get_args().curr_iteration + 1] += torch.tensor(
                [int(wanted.sum()), *got.tolist()]
            )
        return gates, sent

    def watch(models):
        for router in (module for model in models for module in model.modules() if isinstance(module, TopKRouter)):
            routing = router.routing
            router.routing = functools.partial(noted, router, routing)
        return models

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags):
        pretrain.run(prepare=lambda config: config.pre_wrap_hooks.append(watch))
    return {layer: {step: counts.tolist() for step, counts in steps.items()} for layer, steps in found.items()}


def summed(ranks, every):
    """Counts of all ranks, of as many steps as there are from one log to the next."""
    total = defaultdict(lambda: defaultdict(list))
    for rank in ranks:
        for layer, steps in rank.items():
            for step, counts in steps.items():
                before = total[f"decoder layer {layer}"][-(-step // every) * every]
                before[:] = map(sum, zip(before or [0] * len(counts), counts, strict=True))
    return total


PADDED = "--moe-expert-capacity-factor 0.5 --moe-pad-expert-input-to-capacity --eval-interval 2 --eval-iters 1"
GSHARD = f"{preset('gshard')} --moe-expert-capacity-factor 1.0 --moe-group-tokens 8"
SPLIT = (
    "--pipeline-model-parallel-size 2 --pp-schedule zb-h1 --tensor-model-parallel-size 2 --sequence-parallel "
    "--expert-tensor-parallel-size 1"
)
# ranks, flags, steps from one log to the next
CASES = {
    "padded to the capacity, evaluated": (1, PADDED, 2),
    "gshard, CP 2 x EP 2, recomputed": (
        2,
        f"{GSHARD} --context-parallel-size 2 --expert-model-parallel-size 2 {TWICE}",
        1,
    ),
    "PP 2 x TP 2": (
        4,
        f"{SPLIT} --moe-expert-capacity-factor 0.75",
        1,
    ),
    "dropless, more experts in the second layer": (1, f"--moe-layer-experts 2:{2 * EXPERTS}", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_choices_are_those_of_the_routing_maps(case, tmp_path):
    world_size, flags, every = CASES[case]
    flags = tiny(MOE, flags, f"--log-interval {every} --save {tmp_path} --save-interval 4")
    ranks, log = run_ranks_with_log(world_size, counted, flags)
    expected = summed(ranks, every)
    noted = runlog.experts(tmp_path)
    made = {layer: {step: [one.made, *one.tokens] for step, one in steps.items()} for layer, steps in noted.items()}
    assert made == expected
    # 4 sequences of 32 tokens with 2 choices
    assert {counts[0] for steps in made.values() for counts in steps.values()} == {every * 4 * 32 * 2}
    assert set(made) == {"decoder layer 1", "decoder layer 2"}
    shares = [float(share) for share in re.findall(rf"{re.escape(runlog.DROPPED)}: ([\d.]+) ", log)]
    dropped = [
        100 * sum(steps[step].dropped for steps in noted.values()) / sum(steps[step].made for steps in noted.values())
        for step in range(every, 5, every)
    ]
    (tmp_path / "run.log").write_text(log)
    run = report.read(tmp_path)
    curves, rows = report.curves(run, report.Reference()), report.table(run, {}, report.Reference())
    if case.startswith("dropless"):
        assert (shares, set(dropped)) == ([], {0.0})
        assert rows[report.DROPPED].startswith("0, dropless")
    else:
        assert min(dropped) > 0
        assert shares == pytest.approx(dropped, abs=1e-4)
        assert curves[f"all layers: {report.DROPPED}"] == pytest.approx(
            dict(zip(range(every, 5, every), shares, strict=True))
        )
        layer = noted["decoder layer 2"]
        assert curves[f"decoder layer 2: {report.DROPPED}"] == {
            n: 100 * one.dropped / one.made for n, one in layer.items()
        }
    assert set(curves[f"decoder layer 1: {report.BUSIEST}"]) == set(range(every, 5, every))
