"""Pairs of a schedule run as Megatron's schedule plans: the order of their nodes, and the step without them."""

import contextlib

import pytest
import torch

from megatron_cp.megatron.rebind import replace, restore_all
from megatron_cp.pipeline.action import Overlap
from megatron_cp.pipeline.build import build
from tests.megatron.pipeline.test_schedules import CHUNKS, EXPERTS, MODEL, TWO, refusal
from tests.megatron.pretraining import pretrain_losses, tiny, trained
from tests.ranks import run_ranks

OVERLAPPED = "--overlap-moe-expert-parallel-comm"
EARLY = "--ep-overlap-early-attn-memory-release"
PLANS = "megatron.core.models.common.model_chunk_schedule_plan"
NODES = "megatron.core.pipeline_parallel.utils:ScheduleNode"
STEPS, MICROS, LAYERS = 2, 4, 2
SPREAD = (TWO, EXPERTS, "--expert-model-parallel-size 2 --bf16 --global-batch-size 16 --train-iters 2")

# a layer of the forward and one of the backward
BESIDE = [
    ("B", "moe_combine", "messages"),
    ("F", "pre_dispatch_computation", "products"),
    ("B", "mlp", "products"),
    ("F", "moe_dispatch", "messages"),
    ("B", "moe_dispatch", "messages"),
    ("F", "mlp", "products"),
    ("F", "moe_combine", "messages"),
    ("B", "pre_dispatch_computation", "products"),
]


def recorded(flags):
    """What a run leaves behind; per plan whether it has a forward and a backward, and its nodes in their order."""
    plans, done = [], []

    def noted(kind):
        def of(run):
            def node(self, *args):
                from megatron.core.pipeline_parallel.utils import get_comm_stream

                made = run(self, *args)
                stream = "messages" if self.stream is get_comm_stream() else "products"
                if plans and plans[-1][2] is not None:
                    plans[-1][2].append((kind, self.name, stream))
                return made

            return node

        return of

    def chunk(run):
        def plan(forward, backward, **rest):
            plans.append([forward is not None, backward is not None, []])
            made = run(forward, backward, **rest)
            # the loss comes after
            plans.append([False, False, None])
            return made

        return staticmethod(plan)

    with contextlib.ExitStack() as undo:
        undo.callback(restore_all, done)
        done.append(replace(f"{NODES}._forward", noted("F")))
        done.append(replace(f"{NODES}._backward", noted("B")))
        done.append(replace(f"{PLANS}:TransformerModelChunkSchedulePlan.run", chunk))
        log, parameters = trained(flags)
    return log, parameters, [plan for plan in plans if plan[2] is not None]


def both(*flags):
    """All ranks of a run with pairs that overlap, and of the same run in turn, without the flags about overlap."""
    words = tiny(MODEL, *SPREAD, *flags)
    return run_ranks(4, recorded, [*words, OVERLAPPED]), run_ranks(4, recorded, [w for w in words if w != EARLY])


def assert_equal(combined, in_turn):
    for (log, parameters, _), (expected, values, plans) in zip(combined, in_turn, strict=True):
        assert log == expected
        assert plans == []
        for (name, value), (_, other) in zip(parameters, values, strict=True):
            assert torch.equal(value, other), name


def test_a_pair_runs_the_nodes_of_both_in_turn_and_trains_the_same():
    combined, in_turn = both("--pp-schedule dualpipe")
    assert_equal(combined, in_turn)
    table = build("dualpipe", 2, MICROS, overlapped=True)
    for rank, (_, _, plans) in enumerate(combined):
        cells = table.table[rank // 2]
        pairs = [nodes for forward, backward, nodes in plans if forward and backward]
        assert len(pairs) == STEPS * sum(isinstance(cell, Overlap) for cell in cells) > 0
        # beside the pairs every microbatch has one forward and one backward in each of the two stages
        alone = STEPS * MICROS - len(pairs)
        for kind in ((True, False), (False, True)):
            assert sum((forward, backward) == kind for forward, backward, _ in plans) == alone
        for nodes in pairs:
            inside = [node for node in nodes if not node[1].endswith("_process")]
            assert inside == BESIDE * LAYERS


COMBINED = {
    "Megatron's own order": (CHUNKS,),
    "dualpipe-v, distributed optimizer, reductions and gathers overlapped": (
        f"--pp-schedule dualpipe-v {CHUNKS}",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tensor and sequence parallel, grouped experts, selective recompute": (
        "--pp-schedule dualpipe --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
        "--moe-grouped-gemm --recompute-granularity selective --recompute-modules core_attn",
    ),
    "context parallel, a dense layer, shared experts, dropped tokens, evaluation": (
        "--pp-schedule dualpipe --context-parallel-size 2 --cp-comm-type zigzag --calculate-per-token-loss",
        "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 32 --moe-expert-capacity-factor 1.0",
        f"--hidden-dropout 0.1 --eval-interval 1 --eval-iters 1 {EARLY}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMBINED)
def test_combined_with_other_features_trains_the_same(case):
    combined, in_turn = both(*COMBINED[case])
    assert_equal(combined, in_turn)
    assert all(any(forward and backward for forward, backward, _ in plans) for _, _, plans in combined)


RUNS = f"{TWO} {EXPERTS} --expert-model-parallel-size 2 --bf16 --pp-schedule dualpipe {OVERLAPPED}"
REFUSED = {
    "no forward beside a backward": (f"{TWO} --pp-schedule zb-h1 {OVERLAPPED}", "or take dualpipe-v or dualpipe"),
    "one rank's experts": (f"{TWO} {EXPERTS} --bf16 --pp-schedule dualpipe {OVERLAPPED}", "experts that lie on one"),
    "no experts": (f"{TWO} --bf16 --pp-schedule dualpipe {OVERLAPPED}", "pass --num-experts and an"),
    "dispatcher": (f"{RUNS} --moe-token-dispatcher-type allgather", "does not do a dispatcher that gathers tokens"),
    "float32": (RUNS.replace("--bf16", ""), "does not do float32"),
    "full recompute": (
        f"{RUNS} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "does not do recompute of whole layers",
    ),
    "recomputed experts": (
        f"{RUNS} --recompute-granularity selective --recompute-modules core_attn moe",
        "with other modules than moe",
    ),
    "shared experts": (
        f"{RUNS} --moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap",
        "the overlap of shared experts",
    ),
    "moves": (RUNS.replace("dualpipe", "dualpipe-v") + " --pp-offload 4", "does not do activations that move"),
    "mtp": (f"{RUNS} --mtp-num-layers 1", "does not do multi-token prediction"),
    "slices": (f"{RUNS} --pp-slices 2", "dualpipe has no order for 2 slices"),
    "vocabulary": (f"{RUNS} --pp-vocab-parallel 1", "dualpipe has no place for a vocabulary over all ranks"),
    "vocabulary on the V": (
        RUNS.replace("dualpipe", "dualpipe-v") + " --pp-vocab-parallel 1",
        "does not do an LM head over all ranks",
    ),
    "graphs": (f"{RUNS} --cuda-graph-impl full_iteration", "does not do CUDA graphs"),
    "delayed": (f"{RUNS} --delay-wgrad-compute", "Megatron's own delay of weight gradients"),
    "exchange": (f"{RUNS} --moe-comm-type pipelined --moe-pieces 2", "messages that overlap other microbatches"),
    "lent experts": (
        f"{RUNS} --moe-placement fastermoe --moe-replica-slots 1",
        "messages that overlap other microbatches",
    ),
}


def test_what_pairs_cannot_do_is_refused_in_one_line():
    (lines,) = run_ranks(1, refusal, {name: tiny(MODEL, flags) for name, (flags, _) in REFUSED.items()})
    for name, (_, text) in REFUSED.items():
        assert text in lines[name], (name, lines[name])
        assert "\n" not in lines[name]


def without_a_plan(flags):
    """A run whose forward step returns no plan."""
    from megatron_cp.megatron.process import pretrain

    def forward_step(data_iterator, model):
        raise AssertionError("it is refused before it runs")

    pretrain.forward_step = forward_step
    with pytest.raises(SystemExit) as stop:
        pretrain_losses(flags)
    return str(stop.value)


@pytest.mark.slow
def test_a_forward_step_without_a_plan_is_refused():
    for line in run_ranks(4, without_a_plan, tiny(MODEL, *SPREAD, "--pp-schedule dualpipe", OVERLAPPED)):
        assert "needs a forward step that takes return_schedule_plan" in line
