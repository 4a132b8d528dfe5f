"""The data of a planned run for Megatron's `pretrain`: a feed for training, validation and test each."""

import sys
from collections.abc import Sequence, Sized

import torch
from megatron.core import parallel_state
from megatron.training import get_args

from megatron_cp.batches.order import DocumentOrder
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.comm import Fabric, GroupFabric
from megatron_cp.errors import Refused
from megatron_cp.megatron.batches.documents import CorpusDocuments
from megatron_cp.megatron.batches.feed import DocumentFeed, FeedSettings
from megatron_cp.megatron.batches.request import problem_of_run
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.run import say

DEFAULT_SPLIT = "969,30,1"
"""Megatron's own."""
PARTS = ("training", "validation", "test")


class PlannedFeeds:
    """The steps of training, validation and test, as Megatron asks for them, for each model chunk of a rank.

    fabrics: the data-parallel ranks of this stage, for each chunk
    """

    # every rank builds its feeds, not the first of each tensor-parallel group alone
    is_distributed = True

    def __init__(self) -> None:
        self.fabrics: list[Fabric] = []

    def __call__(self, samples: Sequence[int | None], vp_stage: int | None = None) -> tuple[DocumentFeed | None, ...]:
        """Return the steps of each part; None for one that the run does not ask for.

        Every rank makes them: all know the plan of a step by the lengths in the corpus's index, and read the tokens of
        their own documents alone.
        """
        args = get_args()
        flags = AttentionFlags.of(args)
        corpus = CorpusDocuments(args.data_path[-1], args.seq_length, args.mmap_bin_files)
        problem, tensor = problem_of_run(args, sys.argv[1:]), args.tensor_model_parallel_size
        _check_longest(problem, corpus, args.data_path[-1])
        settings = FeedSettings(
            algorithm=flags.plan or "",
            problem=problem,
            longest=args.seq_length,
            layout=flags.document_layout,
            tensor=tensor,
            split=tensor if args.sequence_parallel else 1,
            device=torch.device(torch.cuda.current_device()),
        )
        fabric = GroupFabric(parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.fabrics.append(fabric)
        starts = (args.consumed_train_samples, args.consumed_valid_samples, 0)
        batches = (args.global_batch_size, args.eval_global_batch_size, args.eval_global_batch_size)
        numbers = [corpus.numbers(args.split or DEFAULT_SPLIT, part) for part in range(len(PARTS))]
        if not vp_stage:
            for line in _lines(settings, corpus, numbers):
                say(line)
        # a split may leave the test set without documents, which Megatron then leaves out
        wanted = [bool(number) and (part == 0 or len(numbers[part]) > 0) for part, number in enumerate(samples)]
        return tuple(
            DocumentFeed(corpus, DocumentOrder(found, args.seed), start, batch, settings, fabric) if runs else None
            for found, start, batch, runs in zip(numbers, starts, batches, wanted, strict=True)
        )


def _check_longest(problem: BatchProblem, corpus: CorpusDocuments, prefix: str) -> None:
    """Refuse a document that no group holds before any step is planned; ValueError with its number."""
    at, holds = int(corpus.lengths.argmax()), problem.degrees[-1] * problem.capacity
    if corpus.lengths[at] > holds:
        raise Refused(
            f"document {at} of {prefix} has {corpus.lengths[at]:,} tokens, and the largest group holds {holds:,}, "
            f"{problem.degrees[-1]} ranks of {problem.capacity:,}; raise --cp-tokens-per-rank, take more ranks, or cut "
            f"documents with --seq-length {holds}"
        )


def _lines(settings: FeedSettings, corpus: CorpusDocuments, numbers: Sequence[Sized]) -> list[str]:
    problem = settings.problem
    empty = int((corpus.lengths == 0).sum())
    counts = ", ".join(f"{len(found)} for {part}" for part, found in zip(PARTS, numbers, strict=True))
    return [
        f"--cp-plan {settings.algorithm}: groups of {', '.join(map(str, problem.degrees))} of {problem.ranks} ranks, "
        f"at most {problem.capacity:,} tokens of a rank in a microbatch",
        f"documents: {counts}; {corpus.cut} cut to {settings.longest:,} tokens, {empty} of one token left out",
    ]
