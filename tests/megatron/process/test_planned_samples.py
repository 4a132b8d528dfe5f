"""Samples bring the layouts of their documents, planned where they are read; a rank that gets one plans nothing."""

import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from megatron_cp.context.document_choice import choose_layout
from megatron_cp.context.document_layouts import AUTO, BLOCKS, DOCUMENT_LAYOUTS, STREAM, as_numbers, of_numbers
from megatron_cp.context.documents import documents
from megatron_cp.context.masks import CAUSAL
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.layers import batches
from megatron_cp.megatron.layers.batches import (
    PLANNED,
    DocumentPlanner,
    cut_by_documents,
    planner_of,
    plans_samples,
)
from megatron_cp.megatron.process.planned_samples import PlannedSamples, with_layouts
from tests.ranks import run_ranks

LENGTH = 32
CUTS = ([0, 5, 12, LENGTH], [0, 20, 20, LENGTH], [0, LENGTH])


class Texts:
    """Samples of Megatron's kind, with the process that read them."""

    index_split = Split.valid

    def __len__(self) -> int:
        return len(CUTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ends = torch.full((LENGTH + 1,), LENGTH, dtype=torch.int32)
        ends[: len(CUTS[index])] = torch.tensor(CUTS[index])
        return {"tokens": torch.arange(LENGTH), "cu_seqlens": ends, "process": torch.tensor(os.getpid())}


def arguments(**changes: Any) -> Any:
    given = {
        "dataloader_inter_document_masking": True,
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 1,
        "cp_document_layout": BLOCKS,
        "cp_comm_type": ["all-gather"],
        "cp_cluster": None,
        "position_embedding_type": "rope",
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "params_dtype": torch.bfloat16,
        "seq_length": LENGTH,
        "micro_batch_size": 1,
        "eval_micro_batch_size": 1,
    }
    return SimpleNamespace(**{**given, **changes})


CHOOSING = arguments(cp_document_layout=AUTO, cp_cluster="dgx-h100-ib")


@pytest.mark.parametrize("name", DOCUMENT_LAYOUTS)
def test_a_sample_brings_the_layout_of_its_documents(name: str) -> None:
    found = PlannedSamples(Texts(), DocumentPlanner(name, 2))
    assert len(found) == len(CUTS)
    for index, ends in enumerate(CUTS):
        sample, plain = found[index], Texts()[index]
        assert of_numbers(sample.pop(PLANNED).tolist(), 2) == documents(ends).planned(name, 2)
        assert all(torch.equal(sample[key], plain[key]) for key in plain)
        assert sample.keys() == plain.keys()


def read_by_a_worker() -> tuple[list[bool], list[list[list[int]]], set[str]]:
    """Of each batch: whether another process read it, and its layout; and the types of the layouts."""
    planner = planner_of(CHOOSING)

    def never(*args: Any) -> Any:
        raise AssertionError("a worker asked for the device")

    torch.cuda.get_device_name = never
    batches.default_cluster = batches.device_of_run = batches.load_cluster = never
    loader = DataLoader(
        PlannedSamples(Texts(), planner), batch_size=1, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    read = list(loader)
    return (
        [int(batch["process"]) != os.getpid() for batch in read],
        [batch[PLANNED].tolist() for batch in read],
        {str(batch[PLANNED].dtype) for batch in read},
    )


def test_the_workers_of_the_data_loader_plan_and_ask_for_no_device() -> None:
    ((elsewhere, layouts, types),) = run_ranks(1, read_by_a_worker)
    assert all(elsewhere)
    planner = planner_of(CHOOSING)
    assert layouts == [[as_numbers(planner.layout(documents(ends)))] for ends in CUTS]
    # without which Megatron broadcasts no ends
    assert types == {"torch.int32"}


def test_auto_asks_for_its_cluster_before_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, asked = load_cluster("dgx-h100-ib"), []
    monkeypatch.setattr(batches, "default_cluster", lambda device: asked.append(device) or cluster)
    planner = planner_of(arguments(cp_document_layout=AUTO, tensor_model_parallel_size=2))
    assert len(asked) == 1
    assert planner.sizes is not None
    assert (planner.sizes.heads, planner.sizes.kv_heads, planner.cluster) == (2, 1, cluster.every(2))
    for ends in ([0, 64], [0, *range(4, 65, 4)]):
        made = documents(ends)
        sizes = planner.sizes._replace(seq=64)
        name = choose_layout(made.mask(CAUSAL), 2, sizes, cluster.every(2), moved=False)
        assert planner.layout(made) == made.planned(name, 2)
    assert len(asked) == 1


def test_auto_without_a_choice_is_the_stream_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "default_cluster", lambda device: pytest.fail("asked for a cluster"))
    assert planner_of(arguments(cp_document_layout=AUTO, cp_comm_type="ulysses")) == DocumentPlanner(STREAM, 2)


def test_a_planner_goes_to_a_process_of_another_kind() -> None:
    planner = planner_of(CHOOSING)
    assert pickle.loads(pickle.dumps(planner)) == planner


def test_all_datasets_of_a_run_bring_layouts() -> None:
    blend = Texts()
    blend.split = Split.train
    train, (first, second), test = with_layouts([blend, [Texts(), Texts()], None], DocumentPlanner(BLOCKS, 2))
    # Megatron looks at these for the batch size of an evaluation
    assert (train.split, first.split, second.split) == (Split.train, Split.valid, Split.valid)
    assert PLANNED in train[0]
    assert PLANNED in second[2]
    assert test is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"micro_batch_size": 2}, False),
        ({"eval_micro_batch_size": 2}, False),
        ({"cp_document_layout": STREAM}, False),
        ({"context_parallel_size": 1}, False),
        ({"mtp_num_layers": 1}, False),
    ],
)
def test_a_sample_that_is_a_microbatch_is_planned_with_it(changes: dict[str, Any], expected: bool) -> None:
    assert plans_samples(arguments(**changes)) is expected


def test_a_rank_takes_the_layout_of_its_sample_as_it_would_plan_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: group)
    tokens, ends = torch.arange(100, 100 + LENGTH)[None], torch.tensor([CUTS[0]], dtype=torch.int32)
    whole = {"tokens": tokens, "labels": None, "loss_mask": None, "position_ids": tokens - 100, "cu_seqlens": ends}
    here = cut_by_documents(whole, arguments())
    brought = PlannedSamples(Texts(), planner_of(arguments()))[0][PLANNED][None]
    monkeypatch.setattr(batches, "planner_of", lambda args: pytest.fail("planned again"))
    found = cut_by_documents(whole, arguments(), brought)
    assert torch.equal(found["tokens"], here["tokens"])
    assert torch.equal(found["tokens"] - 100, found["position_ids"])
    assert found["labels"] is None
    assert torch.equal(found["stream"].rows, here["stream"].rows)
    assert found["stream"].documents.layout == here["stream"].documents.layout
    assert found["stream"].documents.term == here["stream"].documents.term
