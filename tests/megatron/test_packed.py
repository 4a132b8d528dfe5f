"""Packed documents through the real pretrain(): the same losses and gradient norms however the stream is cut."""

import random
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_cp.context import BACKENDS
from megatron_cp.context.documents import documents
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL
from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.command_line import check_script, wants_layers
from megatron_cp.megatron.layers import specs
from megatron_cp.megatron.layers.packed import PackedStream, cut_stream, hand_on_documents, positions, stream_of
from megatron_cp.megatron.process.eod_documents import ends_at
from tests.cases import slow_unless
from tests.megatron import spec_run
from tests.megatron.pretraining import pretrain_losses, script_losses, tiny
from tests.megatron.test_parity import LATENT, PIPELINE, RECOMPUTED, TENSOR, assert_equal_runs, context, layers_of
from tests.ranks import RankError, run_ranks, run_ranks_with_log

PACKED = "--dataloader-inter-document-masking"
ENTRY = "tests.megatron.pretrain_script:provider"


def counted(flags: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The losses of a run, and how many of its attention calls had more than one document."""
    from megatron_cp.megatron.layers import attention

    calls, old = [], attention.attend

    def attend(*args: Any, documents: Any = None, **kwargs: Any) -> torch.Tensor:
        calls.append(documents is not None and len(documents.mask(CAUSAL).all) > 1)
        return old(*args, documents=documents, **kwargs)

    attention.attend = attend
    try:
        return pretrain_losses(flags), sum(calls)
    finally:
        attention.attend = old


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flags of a corpus of short documents."""
    return corpus_of_documents(tmp_path_factory.mktemp("packed"))


def corpus_of_documents(folder: Path, multiple: int = 1) -> str:
    """Write short documents of any length, or of one that `multiple` divides; the flags to train on them."""
    prefix, numbers = str(folder / "corpus"), random.Random(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(400):
        tokens = np.array([numbers.randrange(126) for _ in range(multiple * numbers.randrange(2, 52 // multiple))])
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    builder.data_file.close()
    return f"--data-path {prefix} --split 100,0,0 --seq-length 64 --max-position-embeddings 64"


def packed_run(data: str, *flags: str) -> list[str]:
    latent = any("--multi-latent-attention" in flag for flag in flags)
    return tiny(data, *flags, without="--mock-data --group-query-attention" if latent else "--mock-data")


def laid(flags: list[str]) -> tuple[list[dict[str, Any]], set[tuple[bool, str]], set[bool]]:
    """The losses of a run, what its attention calls have, and what its batches have that are cut by their documents.

    Of a call: whether the batch was cut by documents, and the plan's layout; of a batch: whether it brought its layout.
    """
    from megatron_cp.megatron.layers import attention
    from megatron_cp.megatron.process import pretrain

    calls, olds = set(), (attention.attend, attention.attend_latent)
    brought, old_cut = set(), pretrain.cut_by_documents

    def cut_by_documents(whole: Any, args: Any, planned: Any) -> Any:
        brought.add(planned is not None)
        return old_cut(whole, args, planned)

    def attend(q: Any, k: Any, v: Any, plan: Any, *, documents: Any, **kwargs: Any) -> torch.Tensor:
        calls.add(
            (
                documents.layout is not None and documents.layout != layout("zigzag", 64, plan.cp.size),
                plan.document_layout,
            )
        )
        # a weight has no tokens
        return olds[v.shape[0] != q.shape[0]](q, k, v, plan, documents=documents, **kwargs)

    attention.attend = attention.attend_latent = attend
    pretrain.cut_by_documents = cut_by_documents
    try:
        return pretrain_losses(flags), calls, brought
    finally:
        attention.attend, attention.attend_latent = olds
        pretrain.cut_by_documents = old_cut


def losses(ranks: int, data: str, *flags: str) -> list[dict[str, Any]]:
    results = run_ranks(ranks, counted, packed_run(data, PACKED, *flags))
    assert all(packed for _, packed in results), "attention saw one document"
    return results[0][0]


@pytest.fixture(scope="module")
def alone(data: str) -> Any:
    """Runs on one rank, by their flags, each made once."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def run(*flags: str) -> list[dict[str, Any]]:
        if flags not in runs:
            runs[flags] = losses(1, data, *flags)
        return runs[flags]

    return run


def test_documents_change_the_losses(alone: Any, data: str) -> None:
    whole = run_ranks(1, pretrain_losses, packed_run(data))[0]
    assert abs(alone()[0]["loss"] - whole[0]["loss"]) > 1e-3


ONE = "--micro-batch-size 1"
THREE = f"{ONE} --num-layers 3"
SIX = f"{ONE} --num-layers 6 --global-batch-size 6"
# flags of the run, those of the run on one rank that it equals, ranks
CASES = {
    "pipeline, zb-h1, distributed optimizer": (
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 --pp-schedule zb-h1 --use-distributed-optimizer",
        "",
        4,
    ),
    "pipeline, tensor and sequence parallel, four samples": (
        f"{PIPELINE} {TENSOR} --micro-batch-size 4 --global-batch-size 8",
        "--global-batch-size 8",
        4,
    ),
    "interleaved, two samples": (
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        f"--num-layers 4 {RECOMPUTED}",
        f"--num-layers 4 {ONE}",
        4,
    ),
    "on the V, two samples": (
        "--pipeline-model-parallel-size 2 --pp-schedule zb-v --num-layers 4 --global-batch-size 8 --pp-offload 2",
        "--num-layers 4 --global-batch-size 8",
        2,
    ),
    "middle stage, zb-h1, two samples": (
        "--pipeline-model-parallel-size 3 --pp-schedule zb-h1 --num-layers 3",
        THREE,
        3,
    ),
    "middle stage, interleaved": (
        f"--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2 {SIX}",
        SIX,
        3,
    ),
    "tensor and sequence parallel": (f"--context-parallel-size 2 {TENSOR}", "", 4),
}


@pytest.mark.parametrize("name", slow_unless(["pipeline, zb-h1, distributed optimizer"], CASES), ids=lambda name: name)
def test_packed_documents_train_alike_on_all_ranks(alone: Any, data: str, name: str) -> None:
    flags, reference, ranks = CASES[name]
    assert_equal_runs(losses(ranks, data, flags), alone(*([reference] if reference else [])))


@pytest.mark.slow
def test_packed_documents_train_alike_in_layers_of_every_backend(alone: Any, data: str) -> None:
    flags, model = layers_of(BACKENDS.names, 4)
    two = "--train-iters 2"
    assert_equal_runs(losses(4, data, flags, two), alone(model, two), steps=2)


@pytest.mark.slow
def test_a_blend_of_documents_that_fit_megatrons_own_cut_trains_alike(tmp_path: Path) -> None:
    """Without the documents beside one stream, Megatron trains these on wrong positions, without a word."""
    fitting = corpus_of_documents(tmp_path, multiple=4)
    prefix = fitting.split()[1]
    blend = fitting.replace(prefix, f"1 {prefix} 2 {prefix}")
    assert_equal_runs(losses(2, blend, "--context-parallel-size 2"), losses(1, blend))


# flags of the run through the launcher, those of the run on one rank that it equals, ranks
SCRIPTS = {
    "two ranks": ("--context-parallel-size 2 --cp-comm-type p2p", "", 2),
    # which has no dataset of its own
    "middle stage": (f"--pipeline-model-parallel-size 3 {THREE}", THREE, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unmodified_script_trains_on_packed_documents(alone: Any, data: str, name: str) -> None:
    flags, reference, ranks = SCRIPTS[name]
    run = run_ranks(ranks, script_losses, packed_run(data, PACKED, flags), True)[0]
    assert_equal_runs(run, alone(*([reference] if reference else [])))


@pytest.mark.slow
def test_a_layer_spec_alone_trains_on_packed_documents(alone: Any, data: str) -> None:
    flags = f"{data} {PACKED} --context-parallel-size 2 --cp-comm-type p2p"
    _, log = run_ranks_with_log(2, spec_run.train, flags, None, "gpt_layer_spec", (), "--mock-data", ENTRY)
    steps = alone()
    # as Megatron prints them: the mean of the first two losses in the second place
    first, second, *rest = (step["loss"] for step in steps)
    assert spec_run.losses(log) == pytest.approx([first, (first + second) / 2, *rest], rel=1e-6)
    assert spec_run.grad_norms(log) == pytest.approx([step["grad_norm"] for step in steps], abs=6e-4)


@pytest.mark.parametrize(
    ("packed", "stages", "chunks", "refuses"),
    [
        (True, 3, None, True),
        (True, 2, 2, True),
        (True, 2, None, False),
        (True, 1, None, False),
        (False, 3, None, False),
    ],
)
def test_documents_on_stages_without_data_are_refused(
    packed: bool, stages: int, chunks: int | None, refuses: bool
) -> None:
    args = SimpleNamespace(
        dataloader_inter_document_masking=packed,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
    )
    with pytest.raises(Refused, match=r"start the script through megatron_cp\.launch") if refuses else nullcontext():
        specs._refuse_documents_between_ends(args)


@pytest.mark.slow
def test_a_layer_spec_alone_refuses_them_on_every_rank() -> None:
    flags = f"{PACKED} --pipeline-model-parallel-size 3 --num-layers 3"
    with pytest.raises(RankError) as refused:
        run_ranks(3, spec_run.train, flags, None, "gpt_layer_spec", (), "", ENTRY)
    lines = {message.splitlines()[0] for message in refused.value.errors.values()}
    assert len(refused.value.errors) == 3
    assert [line.partition(":")[0] for line in lines] == ["Refused"]
    assert "on 3 pipeline stages" in str(lines)
    assert "through megatron_cp.launch" in str(lines)


GATHERED = "--context-parallel-size 2 --cp-comm-type all-gather"
# flags, flags of the run on one rank, ranks, the batch is cut by its documents; a microbatch of one sample brings its
# layout, of two it is planned by the rank
LAID = {
    "blocks": (f"{GATHERED} --cp-document-layout blocks {ONE}", "", 2, True),
    "blocks, middle stage, zb-h1, distributed optimizer": (
        f"{GATHERED} --cp-document-layout blocks --pipeline-model-parallel-size 3 {THREE} --pp-schedule zb-h1 "
        "--use-distributed-optimizer",
        THREE,
        6,
        True,
    ),
    "blocks, tensor and sequence parallel, recomputed, learned positions": (
        f"{GATHERED} --cp-document-layout blocks {ONE} {TENSOR} {RECOMPUTED} "
        "--position-embedding-type learned_absolute",
        "--position-embedding-type learned_absolute",
        4,
        True,
    ),
    "blocks, a ring and usp": (f"{context('zigzag usp', 4)} --cp-document-layout blocks", "", 4, True),
    "document": (
        f"--context-parallel-size 4 --cp-comm-type all-gather --cp-document-layout document {ONE}",
        "",
        4,
        True,
    ),
    "auto": (f"{GATHERED} --cp-document-layout auto {ONE}", "", 2, None),
    # tokens move inside attention
    "blocks, latent attention": (f"{GATHERED} --cp-document-layout blocks {LATENT}", LATENT, 2, False),
    "blocks, tokens ahead": (
        f"{GATHERED} --cp-document-layout blocks --mtp-num-layers 1 --calculate-per-token-loss",
        "--mtp-num-layers 1 --calculate-per-token-loss",
        2,
        False,
    ),
    "document, latents": (
        f"{context('zigzag', 2)} --cp-document-layout document --cp-latent {LATENT}",
        LATENT,
        2,
        False,
    ),
}


@pytest.mark.parametrize("name", slow_unless(["blocks"], LAID), ids=lambda name: name)
def test_batches_cut_by_their_documents_train_as_on_one_rank(alone: Any, data: str, name: str) -> None:
    flags, reference, ranks, cut = LAID[name]
    results = run_ranks(ranks, laid, packed_run(data, PACKED, flags))
    assert all(calls for _, calls, _ in results), "no layer of ours attended"
    assert cut is None or {held for _, calls, _ in results for held, _ in calls} == {cut}
    assert {name for _, calls, _ in results for _, name in calls} <= {"blocks", "document", "auto"}
    assert [each for *_, each in results] == [set() if cut is False else {ONE in flags}] * ranks
    found = [run for run, *_ in results if run]
    assert_equal_runs(found[0], alone(*([reference] if reference else [])))


def refusal(flags: str, ranks: int = 1) -> str:
    with pytest.raises(RankError) as refused:
        run_ranks(ranks, pretrain_losses, tiny(PACKED, flags))
    (line,) = {message.splitlines()[0].partition("rank ")[2][3:] for message in refused.value.errors.values()}
    return line


def test_samples_between_stages_of_unknown_length_are_refused() -> None:
    model = Noting()
    model.decoder = torch.nn.Module()
    model.decoder.input_tensor = torch.zeros(8, 2, 4)
    hand_on_documents([model])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS)
    with pytest.raises(
        Refused, match="need PackedSeqParams with tokens_per_sample, got none; pass --micro-batch-size 1"
    ):
        model(torch.zeros(1), packed_seq_params=packed)


def test_samples_are_one_stream_in_a_stage_and_apart_between_stages() -> None:
    model = Noting()
    model.decoder, model.post_process = torch.nn.Module(), False
    model.decoder.input_tensor = torch.arange(64.0).reshape(8, 2, 4)
    hand_on_documents([model])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS, tokens_per_sample=8)
    out = model(torch.arange(64.0).reshape(16, 1, 4), packed_seq_params=packed)
    assert model.decoder.input_tensor.shape == (16, 1, 4)
    assert out.shape == (8, 2, 4)
    assert not out._is_view()
    assert torch.equal(out.flatten(), model.decoder.input_tensor.flatten())


# documents end at EOD tokens: flags, ranks
AT_EOD = {
    "pipeline": (f"--context-parallel-size 2 {PIPELINE} --pp-schedule zb-h1", 4),
    "blocks": (f"{GATHERED} --cp-document-layout blocks", 2),
    "masked, tensor and sequence parallel": (
        f"--context-parallel-size 2 {TENSOR} --eod-mask-loss --reset-position-ids",
        4,
    ),
}
STOCK_MASK = "--reset-attention-mask --position-embedding-type learned_absolute"


@pytest.fixture(scope="module")
def with_eod(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flags of a corpus whose documents hold EOD tokens at any place."""
    prefix, numbers = str(tmp_path_factory.mktemp("eod") / "corpus"), random.Random(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(400):
        tokens = np.array([126 if numbers.random() < 0.1 else numbers.randrange(126) for _ in range(30)])
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    builder.data_file.close()
    return f"--data-path {prefix} --split 100,0,0 --seq-length 64 --max-position-embeddings 64"


@pytest.fixture(scope="module")
def under_a_mask(with_eod: str) -> Any:
    """Runs of Megatron's own on one rank, by their flags, each made once."""

    @cache
    def run(*flags: str) -> list[dict[str, Any]]:
        masked = tiny(with_eod, STOCK_MASK, *flags, without="--mock-data --no-create-attention-mask-in-dataloader")
        ((found, ours),) = run_ranks(1, counted, masked)
        assert not ours
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_EOD)
def test_documents_that_end_at_eod_train_as_under_a_mask_tensor(under_a_mask: Any, with_eod: str, name: str) -> None:
    flags, ranks = AT_EOD[name]
    flags = f"{STOCK_MASK} {flags}"
    shared = [word for word in flags.split() if word in ("--eod-mask-loss", "--reset-position-ids")]
    expected = under_a_mask(*shared)
    results = run_ranks(ranks, counted, packed_run(with_eod, flags, "--cp-kernel auto"))
    assert all(packed for _, packed in results), "attention saw one document"
    assert_equal_runs(results[0][0], expected)


def test_documents_end_after_each_eod() -> None:
    assert ends_at(torch.tensor([7, 0, 7, 7, 3]), 7).tolist() == [0, 1, 3, 4, 5, 5]
    assert ends_at(torch.tensor([1, 2, 7]), 7).tolist() == [0, 3, 3, 3]


def test_packed_documents_need_our_layers_without_transformer_engine() -> None:
    assert wants_layers(["--dataloader-inter-document-masking"], te=False)
    assert not wants_layers(["--dataloader-inter-document-masking"], te=True)


def test_scripts_that_hide_documents_by_a_mask_tensor_are_refused() -> None:
    with pytest.raises(Refused, match="pass --dataloader-inter-document-masking instead") as caught:
        check_script(["--reset-attention-mask"], layers=True)
    assert "\n" not in str(caught.value)
    check_script(["--reset-attention-mask"], layers=False)


ENDS = torch.tensor([0, 5, 5, 12, 16, 16], dtype=torch.int32)


def test_a_stream_is_one_document_with_the_ends_beside_it() -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS, max_seqlen_q=7, max_seqlen_kv=7)
    stream = stream_of(packed)
    assert stream.cu_seqlens_q.tolist() == stream.cu_seqlens_kv.tolist() == [0, 16]
    assert stream.max_seqlen_q == stream.max_seqlen_kv == 16
    assert [(piece.q.start, piece.q.stop) for piece in stream.documents.mask(CAUSAL).all] == [(0, 5), (5, 12), (12, 16)]


def test_documents_that_are_cut_one_by_one_are_refused() -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS, cu_seqlens_q_padded=ENDS)
    with pytest.raises(ValueError, match="takes documents of one stream, got padded documents"):
        stream_of(packed)


def test_a_batch_cut_by_its_documents_brings_its_positions() -> None:
    made = documents([0, 5, 12, 16])
    held = made.planned("blocks", 2)
    stream = cut_stream(made, held, torch.device("cpu"))
    for taken, mine in zip(layout("zigzag", 16, 2), held, strict=True):
        assert stream.rows[positions(taken)].tolist() == positions(mine).tolist()
    model = Noting()
    model.rotary_pos_emb = torch.nn.Identity()
    hand_on_documents([model])
    model(torch.zeros(1), packed_seq_params=stream)
    angles = torch.arange(16.0)
    assert model.rotary_pos_emb(angles).tolist() == stream.rows.tolist()
    model(torch.zeros(1))
    assert model.rotary_pos_emb(angles) is angles


class Noting(torch.nn.Module):
    """A model that keeps the parameters that it is called with."""

    def forward(self, x: torch.Tensor, packed_seq_params: Any = None) -> torch.Tensor:
        self.found = packed_seq_params
        return x


def test_a_model_hands_on_the_stream_of_each_microbatch_once() -> None:
    model = Noting()
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert hand_on_documents([wrapped]) == hand_on_documents([wrapped])
    assert len(model._forward_pre_hooks) == 1
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS)
    model(torch.zeros(1), packed_seq_params=packed)
    stream = model.found
    assert isinstance(stream, PackedStream)
    model(torch.zeros(1), packed_seq_params=stream)
    assert model.found is stream
    model(torch.zeros(1))
    assert model.found is None
