"""Sizes of PTD-P (arXiv:2104.04473): by the plan's own splits and the estimate they are the fastest, or nearly so."""

from collections import Counter
from functools import partial
from statistics import median
from typing import NamedTuple

import pytest

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate_where_it_fits
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_request import HEADROOM, FixedSizes, PlanRequest
from megatron_cp.planner.splits import rank_splits
from tests.cases import slow_unless

SELENE = load_cluster("dgx-a100-80g-ib")
SEQ, VOCAB = 2048, 51200


class Row(NamedTuple):
    """A row of the paper's table 1.

    tflops: of a GPU
    longer: share by which the paper's sizes take at most longer than the fastest, by the estimate
    """

    heads: int
    hidden: int
    layers: int
    tp: int
    pp: int
    gpus: int
    batch: int
    tflops: int
    longer: float


ROWS = {
    "1.7B": Row(24, 2304, 24, 1, 1, 32, 512, 137, 0.0),
    "3.6B": Row(32, 3072, 30, 2, 1, 64, 512, 138, 0.07),
    "7.5B": Row(32, 4096, 36, 4, 1, 128, 512, 142, 0.12),
    "18.4B": Row(48, 6144, 40, 8, 1, 256, 1024, 135, 0.14),
    "39.1B": Row(64, 8192, 48, 8, 2, 512, 1536, 138, 0.125),
    "76.1B": Row(80, 10240, 60, 8, 4, 1024, 1792, 140, 0.0),
    "145.6B": Row(96, 12288, 80, 8, 8, 1536, 2304, 148, 0.03),
    "310.1B": Row(128, 16384, 96, 8, 16, 1920, 2160, 155, 0.01),
    "529.6B": Row(128, 20480, 105, 8, 35, 2520, 2520, 163, 0.02),
    "1008B": Row(160, 25600, 128, 8, 64, 3072, 3072, 163, 0.0),
}


def model_of(row: Row) -> Transformer:
    return Transformer(
        name="GPT",
        layers=row.layers,
        hidden=row.hidden,
        ffn=4 * row.hidden,
        heads=row.heads,
        kv_heads=row.heads,
        head_dim=row.hidden // row.heads,
        vocab=VOCAB,
        gated=False,
        tied=True,
    )


def estimated(row: Row, tp: int, pp: int, dp: int) -> Estimate | None:
    """The fastest micro batch of these sizes; None where none fits.

    As the paper trained: nothing sharded, layers recomputed, no fused kernel. In a pipeline more than two sequences
    leave too few microbatches.
    """
    of_sizes = partial(
        Parallel,
        tp=tp,
        pp=pp,
        dp=dp,
        balanced_ends=row.layers % pp != 0,
        global_batch=row.batch,
        distributed_optimizer=False,
        recompute="full",
        flash=False,
    )
    found = (
        estimate_where_it_fits(model_of(row), of_sizes(micro_batch=micro), SELENE, SEQ, HEADROOM)
        for micro in ((1, 2) if pp > 1 else (1, 2, 4, 8))
        if row.batch % (dp * micro) == 0
    )
    return min((one for one in found if one), key=lambda one: one.seconds, default=None)


def papers(row: Row) -> Estimate:
    found = estimated(row, row.tp, row.pp, row.gpus // row.tp // row.pp)
    assert found is not None
    return found


def tflops(row: Row, seconds: float) -> float:
    """TFLOP/s of a GPU as the paper counts them: all pairs, and recomputed layers once more."""
    layers = 96 * row.batch * SEQ * row.layers * row.hidden**2 * (1 + SEQ / (6 * row.hidden))
    return (layers + 6 * row.batch * SEQ * row.hidden * VOCAB) / seconds / row.gpus / 1e12


def fastest(row: Row) -> Estimate:
    """The fastest of the plan's splits that fits."""
    request = PlanRequest(
        model=model_of(row),
        seq=SEQ,
        gpus=row.gpus,
        cluster=SELENE,
        global_batch=row.batch,
        fixed=FixedSizes(cp=1),
    )
    left_out: Counter[str] = Counter()
    found = [estimated(row, one.tp, one.pp, one.dp) for one in rank_splits(request, left_out)]
    assert left_out["tensor parallel inside a node"] or row.gpus % 16
    return min((one for one in found if one), key=lambda one: one.seconds)


# 310.1B takes as long as 1008B, and shows what 529.6B does
@pytest.mark.parametrize("name", slow_unless(["76.1B"], [name for name in ROWS if name != "310.1B"]))
def test_no_split_of_the_plan_is_much_faster_than_the_papers(name: str) -> None:
    row = ROWS[name]
    best, chosen = fastest(row), papers(row)
    assert chosen.seconds <= (1 + row.longer) * best.seconds
    if not row.longer:
        assert (best.parallel.tp, best.parallel.pp) == (row.tp, row.pp)


@pytest.mark.slow
def test_the_papers_throughput_comes_out() -> None:
    errors = [abs(tflops(row, papers(row).seconds) / row.tflops - 1) for row in ROWS.values()]
    assert max(errors) <= 0.09
    assert median(errors) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "seconds"), [(280, 60.1), (350, 50.2), (420, 44.4)])
def test_megatron_turing_nlg_is_estimated_too_fast_by_a_fifth_to_a_quarter(nodes: int, seconds: float) -> None:
    row = ROWS["529.6B"]._replace(batch=1920, gpus=8 * nodes)
    assert -0.25 < papers(row).seconds / seconds - 1 < -0.2
