"""--cp-keep-attention in the real pretrain(): no bit of a run changes, and nothing of attention is done twice."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_cp.megatron.process.launch import launched
from megatron_cp.megatron.rebind import replace, restore
from tests.megatron.pretraining import losses_of_each_iteration, start_from_names, tiny
from tests.megatron.test_packed import corpus_of_documents
from tests.megatron.test_parity import LATENT, OPTIMIZER, PIPELINE, RECOMPUTED, TENSOR, context
from tests.ranks import run_ranks


class Run(NamedTuple):
    """One rank's losses, the bytes that its attention has sent, and its kernel's forward calls."""

    log: list[dict[str, Any]]
    sent: int
    calls: int


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    calls: list[int] = []

    def counting(old: Any) -> Any:
        def forward(*args: Any, **choices: Any) -> Any:
            calls.append(1)
            return old(*args, **choices)

        return forward

    done = replace("megatron_cp.context.task:tile_forward", counting)
    try:
        yield calls
    finally:
        restore(done)


def trained(flags: list[str]) -> Run:
    from megatron_cp.megatron.layers.verify import core_attentions
    from megatron_cp.megatron.process import pretrain

    built: list[Any] = []

    def prepare(config: Any) -> None:
        start_from_names(config)
        config.pre_wrap_hooks.append(lambda models: built.extend(models) or models)

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags), losses_of_each_iteration() as log, counted_calls() as calls:
        pretrain.run(prepare=prepare)
    return Run(log, sum(core.plan.sent for _, core in core_attentions(built)), len(calls))


BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
OFFLOAD = "--pipeline-model-parallel-size 4 --num-layers 4 --global-batch-size 8 --pp-schedule 1f1b --pp-offload 2"
# ranks, how attention is recomputed, the rest of the run
CASES = {
    "selective, sinks": (2, SELECTIVE, f"{context('ulysses', 2)} --softmax-type learnable"),
    "one layer of two, dropout": (
        2,
        BLOCK,
        f"{context('zigzag', 2)} --attention-dropout 0.1 --cp-kernel reference",
    ),
    "tensor and sequence parallel, distributed optimizer, multi-token prediction": (
        4,
        RECOMPUTED,
        f"{context('zigzag', 2)} {TENSOR} {OPTIMIZER} --mtp-num-layers 1",
    ),
    "slices": (4, RECOMPUTED, f"{context('zigzag', 2)} {PIPELINE} --pp-schedule 1f1b --pp-slices 2"),
    "zb-h1": (4, RECOMPUTED, f"{context('ulysses', 2)} {PIPELINE} --pp-schedule zb-h1"),
    "offload": (4, RECOMPUTED, f"{OFFLOAD} --cp-comm-type zigzag"),
    "latent attention, packed documents": (
        2,
        RECOMPUTED,
        f"{context('zigzag', 2)} {LATENT} --cp-latent --dataloader-inter-document-masking",
    ),
    # the other loops are among the cases above, and tests/context/test_keep.py has all
    "other backends": (4, RECOMPUTED, f"{context('usp distflash fpdt wallfacer', 4)} --num-layers 4"),
}


def compare(ranks: int, recompute: str, others: str, data: str = "") -> list[list[Run]]:
    """The ranks' runs without recomputation, with attention kept, and with all of it repeated."""
    without = "--mock-data" if data else ""
    if LATENT in others:
        without, others = f"{without} --group-query-attention", f"{others} --num-query-groups 4"
    return [
        run_ranks(ranks, trained, tiny(others, data, added, "--train-iters 2", without=without))
        for added in ("", f"{recompute} --cp-keep-attention", recompute)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_attention_is_computed_and_sent_once_and_no_bit_changes(case: str, tmp_path: Path) -> None:
    ranks, recompute, others = CASES[case]
    data = corpus_of_documents(tmp_path) if "inter-document" in others else ""
    for once, kept, twice in zip(*compare(ranks, recompute, others, data), strict=True):
        assert kept.log == once.log == twice.log
        assert kept.sent == once.sent
        assert kept.calls == once.calls
        assert 0 < kept.calls < twice.calls
        assert kept.sent < twice.sent or "context-parallel-size" not in others
