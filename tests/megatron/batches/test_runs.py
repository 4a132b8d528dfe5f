"""Planned batches through the real pretrain(): losses and norms are those of one rank, whatever the groups."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_cp import runlog
from megatron_cp.batches.order import DocumentOrder
from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.megatron.batches.feed import DocumentFeed, FeedSettings
from megatron_cp.pipeline import SCHEDULES, Rule
from megatron_cp.pipeline.action import flat
from megatron_cp.pipeline.build import build
from tests.batches.problems import problem
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks, run_ranks_with_log

LONGEST = 40


def counted(flags: list[str]) -> tuple[list[dict[str, Any]], set[int]]:
    """The losses of a run, and the sizes of the groups in which this rank's attention ran."""
    from megatron_cp.megatron.layers import attention

    degrees, old = set(), attention.attend

    def attend(q: Any, k: Any, v: Any, plan: Any, **kwargs: Any) -> torch.Tensor:
        degrees.add(plan.cp.size)
        return old(q, k, v, plan, **kwargs)

    attention.attend = attend
    try:
        return pretrain_losses(flags), degrees
    finally:
        attention.attend = old


def write_corpus(prefix: str, lengths: list[int]) -> None:
    numbers = random.Random(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        tokens = np.array([numbers.randrange(126) for _ in range(length)])
        builder.add_document(tokens, [length])
    builder.finalize(f"{prefix}.idx")
    builder.data_file.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of short and long documents, some of one token and some that are cut."""
    prefix, numbers = str(tmp_path_factory.mktemp("planned") / "corpus"), random.Random(1)
    write_corpus(prefix, [numbers.choice([1, 2, 5, 9, 14, 20, 30, LONGEST + 1, 50]) for _ in range(100)])
    return prefix


def planned(corpus: str, *flags: str) -> list[str]:
    data = f"--data-path {corpus} --split 100,0,0 --seq-length {LONGEST} --max-position-embeddings {LONGEST}"
    steps = "--micro-batch-size 1 --global-batch-size 12 --train-iters 5 --calculate-per-token-loss"
    return tiny(data, steps, *flags, without="--mock-data")


@pytest.fixture(scope="module")
def alone(corpus: str) -> Any:
    """Runs on one rank, by their flags, each made once."""
    runs: dict[str, list[dict[str, Any]]] = {}

    def run(flags: str) -> list[dict[str, Any]]:
        if flags not in runs:
            one = planned(corpus, f"--cp-plan balanced --cp-tokens-per-rank 48 {flags}")
            runs[flags], degrees = run_ranks(1, counted, one)[0]
            assert degrees == {1}
        return runs[flags]

    return run


def assert_equal_runs(run: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    assert len(run) == len(one) == 5
    for ours, theirs in zip(run, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


SMALL = "--cp-tokens-per-rank 12"
DISTRIBUTED = "--use-distributed-optimizer"
PIPELINE = "--pipeline-model-parallel-size 2"
CHUNKS = f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2 --num-layers 4"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0 --moe-token-dispatcher-type alltoall"
LEARNED = "--position-embedding-type learned_absolute"
# flags, those of the model, ranks, and degrees that must be used
CASES = {
    "balanced on 2, experts": (f"--cp-plan balanced --cp-tokens-per-rank 24 {EXPERTS}", EXPERTS, 2, {1, 2}),
    "balanced on 3": ("--cp-plan balanced --cp-tokens-per-rank 16", "", 3, {1, 2, 3}),
    "balanced on 3, ulysses": ("--cp-plan balanced --cp-tokens-per-rank 16 --cp-comm-type ulysses", "", 3, {1, 3}),
    "balanced on 4, blocks, recompute": (
        f"--cp-plan balanced {SMALL} {DISTRIBUTED} --cp-comm-type zigzag --cp-document-layout blocks "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "",
        4,
        {1, 2, 3, 4},
    ),
    "flexsp on 2, learned positions": (f"--cp-plan flexsp --cp-tokens-per-rank 24 {LEARNED}", LEARNED, 2, {1, 2}),
    "flexsp on 3": (f"--cp-plan flexsp --cp-tokens-per-rank 20 {DISTRIBUTED}", "", 3, {1, 2}),
    "flexsp on 4, experts divided": (
        f"--cp-plan flexsp {SMALL} {EXPERTS} --expert-model-parallel-size 2 {DISTRIBUTED}",
        EXPERTS,
        4,
        {1, 2, 4},
    ),
    "dcp on 2": ("--cp-plan dcp --cp-tokens-per-rank 24", "", 2, {1, 2}),
    "dcp on 3": ("--cp-plan dcp --cp-tokens-per-rank 20 --overlap-grad-reduce", "", 3, {1, 2}),
    "dcp on 4, documents": (
        f"--cp-plan dcp {SMALL} {DISTRIBUTED} --cp-comm-type all-gather --cp-document-layout document",
        "",
        4,
        {1, 2, 4},
    ),
    "1f1b": (f"--cp-plan dcp --cp-tokens-per-rank 24 {PIPELINE} --pp-schedule 1f1b", "", 4, {1, 2}),
    "zb-h1": (
        f"--cp-plan flexsp --cp-tokens-per-rank 24 {PIPELINE} --pp-schedule zb-h1 {DISTRIBUTED}",
        "",
        4,
        {1, 2},
    ),
    "interleaved, tensor and sequence parallel": (
        f"--cp-plan balanced --cp-tokens-per-rank 24 --tensor-model-parallel-size 2 --sequence-parallel {CHUNKS} "
        f"--pp-schedule interleaved {DISTRIBUTED}",
        "--num-layers 4",
        8,
        {1, 2},
    ),
    "wlb": (
        "--cp-plan wlb --cp-tokens-per-rank 24 --cp-comm-type all-gather --cp-document-layout document",
        "--cp-plan wlb",
        2,
        {2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_rank(corpus: str, alone: Any, case: str) -> None:
    flags, model, ranks, expected = CASES[case]
    results = run_ranks(ranks, counted, planned(corpus, flags))
    found = set().union(*(degrees for _, degrees in results))
    assert expected <= found
    assert_equal_runs(results[0][0], alone(model))


LAYERS = {1: "", 2: "--num-layers 4"}
"""Of models in so many chunks on each of two stages."""


def kinds() -> dict[tuple[int, str, bool], Rule]:
    """The first schedule of each kind: chunks of a stage, their placement, and whether a backward is split."""
    found: dict[tuple[int, str, bool], Rule] = {}
    for rule in SCHEDULES:
        if rule.table and rule.delay is None and not rule.two_copies and rule.name not in ("bpipe", "dualpipe-v"):
            chunks = rule.chunks or 2
            cells = build(rule.name, 2, 4, chunks).table
            split = any(action.kind == "W" for rank in cells for action in flat(rank))
            found.setdefault((chunks, rule.placement, split), rule)
    return found


# the others of a kind differ by the order of a table alone
OTHER_SCHEDULES = [
    rule
    for kind, rule in kinds().items()
    # of 1f1b, zb-h1 and interleaved
    if kind not in [(1, "loop", False), (1, "loop", True), (2, "loop", False)]
]


@pytest.mark.slow
@pytest.mark.parametrize("rule", OTHER_SCHEDULES, ids=lambda rule: rule.name)
def test_schedules_of_every_kind_have_the_losses_of_one_rank(corpus: str, alone: Any, rule: Rule) -> None:
    chunks = rule.chunks or 2
    loops = "--num-virtual-stages-per-pipeline-rank 2" if chunks == 2 and rule.placement == "loop" else ""
    flags = f"--cp-plan balanced --cp-tokens-per-rank 24 {PIPELINE} {LAYERS[chunks]} {loops} --pp-schedule {rule.name}"
    results = run_ranks(4, counted, planned(corpus, flags))
    assert {1, 2} <= set().union(*(degrees for _, degrees in results))
    assert_equal_runs(results[0][0], alone(LAYERS[chunks]))


def validation_losses(corpus: str, ranks: int, tokens: int, split: str) -> list[str]:
    flags = f"--cp-plan balanced --cp-tokens-per-rank {tokens} --split {split} --eval-iters 2 --train-iters 1"
    _, log = run_ranks_with_log(ranks, pretrain_losses, planned(corpus, flags))
    (found,) = filter(None, map(runlog.read_summary, log.splitlines()))
    assert (found["cp_bytes_per_step"] > 0) == (ranks > 1), "the summary counts what groups send"
    return re.findall(r"lm loss value: (\d\.\d{4})", log)


@pytest.mark.slow
@pytest.mark.parametrize(("split", "sets"), [("60,30,10", 2), ("60,40,0", 1)], ids=["and test", "without test"])
def test_evaluation_is_that_of_one_rank(corpus: str, split: str, sets: int) -> None:
    one = validation_losses(corpus, 1, 48, split)
    assert len(one) == sets
    assert validation_losses(corpus, 3, 16, split) == one


class Corpus:
    """Documents of other lengths than a plan's, each token of which is its document's number."""

    lengths = np.array([5, 9, 3, 8])

    def tokens(self, document: int) -> Any:
        return np.full(self.lengths[document] + 1, document)


def first_step(fabric: Any, tensor: int = 1) -> Any:
    settings = FeedSettings(
        algorithm="balanced",
        problem=problem([1], ranks=fabric.size, capacity=8, degrees=range(1, min(2, fabric.size) + 1)),
        longest=9,
        layout="stream",
        tensor=tensor,
        split=tensor,
    )
    order = DocumentOrder(np.arange(4), 0)
    return next(DocumentFeed(Corpus(), order, 0, 4, settings, fabric))  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", [1, 2])
def test_parts_of_a_step_hold_every_token_once(tensor: int) -> None:
    def body(fabric: Any) -> Any:
        step = first_step(fabric, tensor)
        parts = list(step.microbatches())
        assert [part["tokens"].shape[1] // tensor for part in parts] == list(step.tokens_of)
        for part in parts:
            assert part["tokens"].shape[1] % (2 * tensor) == 0
            assert part["stream"].rows.tolist() == part["position_ids"][0].tolist()
            assert int(part["stream"].cu_seqlens_q[-1]) == part["tokens"].shape[1]
        kept = [
            (int(token), int(place))
            for part in parts
            for token, place, mask in zip(part["tokens"][0], part["position_ids"][0], part["loss_mask"][0], strict=True)
            if mask
        ]
        return kept, {part["stream"].group.size for part in parts}

    found = in_process(3, body)
    whole = [(number, at) for number, length in enumerate(Corpus.lengths) for at in range(length)]
    assert sorted(token for kept, _ in found for token in kept) == whole
    assert max(size for _, sizes in found for size in sizes) > 1


def test_a_rank_without_documents_gets_pads_without_loss() -> None:
    def body(fabric: Any) -> Any:
        step = first_step(fabric, tensor=2)
        groups = [step.plan.group_of(slot, fabric.rank) for slot in range(len(step.plan.slots))]
        return [
            (part["tokens"].shape, float(part["loss_mask"].sum()))
            for group, part in zip(groups, step.microbatches(), strict=True)
            if not group.documents
        ]

    found = [pad for rank in in_process(9, body) for pad in rank]
    assert found
    assert set(found) == {((1, 4), 0.0)}


def test_steps_have_one_text_on_all_ranks_and_a_refusal_where_no_group_holds_a_document() -> None:
    texts = in_process(3, lambda fabric: first_step(fabric).text)
    assert len(set(texts)) == 1
    assert "9 tokens is longer than the largest group holds" in first_step(SingleFabric()).refusal
