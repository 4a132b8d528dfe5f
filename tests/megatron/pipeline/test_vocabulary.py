"""Through the real pretrain(), output layer and embedding over all pipeline ranks train as those on one rank."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_cp.megatron.arguments.pipeline import check_schedule
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import Executor
from megatron_cp.pipeline.simulate import peaks
from tests.megatron import pretraining
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

MODEL = "--num-layers 4 --global-batch-size 8 --train-iters 3"
TWO = "--pipeline-model-parallel-size 2"
HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
UNTIED = "--untie-embeddings-and-output-weights"


class Counting(Executor):
    """An executor that notes the most microbatches whose activations it has kept."""

    most = 0

    def _forward(self, stage: int, micro: int, *rest) -> None:
        super()._forward(stage, micro, *rest)
        Counting.most = max(Counting.most, len(self._made))


def trained(flags):
    """This rank's losses, its parameters, its most microbatches in flight, and the losses of evaluations."""
    found, Counting.most = [], 0
    done = [
        replace("megatron_cp.megatron.pipeline.schedule:Executor", lambda _: Counting),
        replace("megatron.training.training:evaluate", lambda old: pretraining.noting(old, found)),
    ]
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        for each in done:
            restore(each)
    return log, dict(parameters), Counting.most, found


def losses_of(logs):
    return next(log for log in logs if log[0]["loss"] is not None)


CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"
# ranks, schedule, barriers, microbatches, flags; three ranks have 42, 43 and 43 rows
TIED = "tied, sequence parallel, on the V"
EVALUATED = "--eval-interval 3 --eval-iters 2"
CASES = {
    "one barrier": (2, "1f1b", 1, 8, TWO),
    "split backwards": (2, "zb-h1", 1, 8, TWO),
    "uneven, evaluated": (
        3,
        "1f1b",
        2,
        8,
        f"--pipeline-model-parallel-size 3 --num-layers 3 --global-batch-size 16 {EVALUATED}",
    ),
    "chunks, data parallel, overlapped": (
        4,
        "interleaved",
        1,
        4,
        f"{TWO} {CHUNKS} --global-batch-size 16 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "chunks of four ranks, evaluated": (
        4,
        "interleaved",
        2,
        8,
        f"--pipeline-model-parallel-size 4 {CHUNKS} --num-layers 8 --global-batch-size 16 "
        # Adam turns the sign of a gradient near zero into a step
        f"{EVALUATED} --optimizer sgd",
    ),
    "on the V, evaluated": (2, "zb-v", 1, 8, f"{TWO} {CHUNKS} --global-batch-size 16 {EVALUATED}"),
    TIED: (4, "zb-v", 2, 4, f"{TWO} {CHUNKS} --tensor-model-parallel-size 2 --sequence-parallel"),
}


def most_of(name: str, p: int, m: int, v: int, barriers: int) -> list[int]:
    """The most chunks of each rank between forward and input gradient, as simulated."""
    where = place(SCHEDULES.get(name), p, v)
    costs = uniform(where, (1.0, 1.0, 1.0, 0.0))
    schedule = build(name, p, m, v, costs=costs, barriers=barriers)
    return [round(peak * v) for peak in peaks(schedule, uniform(where, (1.0, 1.0, 1.0, 0.0), (1.0, 0.0)))]


def whole(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: value for rank in ranks for name, value in rank.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_one_on_the_last_rank(case):
    ranks, name, barriers, m, flags = CASES[case]
    tied = UNTIED if case == TIED else ""
    shared = f"--pp-schedule {name} --pp-vocab-parallel {barriers}"
    ours = run_ranks(ranks, trained, tiny(MODEL, flags, shared, without=tied))
    plain = run_ranks(ranks, trained, tiny(MODEL, flags, without=tied))
    p = int(flags.split()[1])
    replicas = ranks // p
    for step, other in zip(losses_of([log for log, *_ in ours]), losses_of([log for log, *_ in plain]), strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    for number in range(replicas):
        found, expected = (whole([named for _, named, *_ in run[number::replicas]]) for run in (ours, plain))
        assert found.keys() - {HEAD, EMBEDDING} == expected.keys() - {HEAD, EMBEDDING}
        for other in expected.keys() - {HEAD, EMBEDDING}:
            assert (found[other] - expected[other]).abs().max() <= 1e-5 * expected[other].abs().max(), other
        for other in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
            rows = [named[other] for _, named, *_ in ours[number::replicas]]
            # the chunk with the last stage runs up the ranks
            rows = rows[::-1] if other == HEAD and name == "zb-v" else rows
            # a weight moves by 3e-3 in these steps
            torch.testing.assert_close(torch.cat(rows), expected[other], rtol=0, atol=1e-6)
    chunks = 2 if CHUNKS in flags else 1
    assert [most for *_, most, _ in ours[::replicas]] == most_of(name, p, m, chunks, barriers)
    for (*_, found), (*_, expected) in zip(ours, plain, strict=True):
        assert len(found) == len(expected)
        for losses, others in zip(found, expected, strict=True):
            assert losses == pytest.approx(others, rel=1e-6)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's model and optimizer."""
    reader = FileSystemReader(folder / "iter_0000002")
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "properties")
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.slow
def test_megatrons_own_first_weights_are_shared_out():
    # 42, 43 and 43 rows, those of the output layer in reverse
    flags = tiny("--pipeline-model-parallel-size 3 --num-layers 6 --train-iters 2 --pp-schedule zb-v", CHUNKS)
    ours, plain = (
        run_ranks(3, pretrain_losses, [*flags, *more], False)[0] for more in (["--pp-vocab-parallel", "1"], [])
    )
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in plain], rel=1e-6)
    assert [step["grad_norm"] for step in ours] == pytest.approx([step["grad_norm"] for step in plain], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("tied", "schedule"),
    [(False, f"zb-v {CHUNKS}"), (True, f"interleaved {CHUNKS}"), (False, "1f1b")],
    ids=["zb-v", "interleaved, tied", "1f1b"],
)
def test_checkpoints_move_to_and_from_the_ordinary_form_bit_by_bit(tied, schedule, tmp_path):
    flags = tiny(
        TWO,
        "--num-layers 4",
        "--train-iters 2 --save-interval 5 --override-opt-param-scheduler",
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        without=UNTIED if tied else "",
    )
    cut = f"--pp-schedule {schedule} --pp-vocab-parallel 1 --tensor-model-parallel-size 2".split()
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run_ranks(2, pretrain_losses, [*flags, "--save", str(first)])
    # nothing is left to train: what is loaded is saved
    run_ranks(4, pretrain_losses, [*flags, *cut, "--load", str(first), "--save", str(second)])
    if not tied:
        run_ranks(2, pretrain_losses, [*flags, "--load", str(second), "--save", str(third)])
    expected = tensors(first)
    assert expected[EMBEDDING].shape == (128, 32)
    assert (HEAD in expected) is not tied
    for folder in (second,) if tied else (second, third):
        found = tensors(folder)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("name", ["logits_save_dir", "logits_load_dir"])
def test_logits_that_no_rank_has_are_not_read(name):
    asked = Namespace(pp_schedule="1f1b", pp_vocab_parallel=1, pipeline_model_parallel_size=2, **{name: "somewhere"})
    with pytest.raises(ValueError, match="leave --logits-save-dir and --logits-load-dir out, or --pp-vocab"):
        check_schedule(asked)
