"""Estimate a vocabulary that lies on all ranks of a pipeline (arXiv:2411.05288): what it takes, holds and sends.

Counted are the products, the passes over memory and the messages of `megatron_cp.pipeline.vocabulary_head` and
`vocabulary_embedding`. A rank has the mean number of rows: parts differ by one. Left out are labels and gradients of
losses, 12 bytes a token, beside the output of the last stage, and the tokens of a step.
"""

from typing import NamedTuple

from megatron_cp.hardware.cluster import Collective
from megatron_cp.hardware.operations import Product, collective_seconds
from megatron_cp.pipeline.costs import MeetingTimes
from megatron_cp.planner.work import LOSS_BYTES, PassTimes, RankConfig, Seconds, hidden_state_seconds, product_seconds

STATISTICS = 12
"""Bytes a token of what each rank's S tells all others: its largest logit, its sum and the label's logit in float32."""


class HeadTimes(NamedTuple):
    """Times of S and T of one microbatch on every rank."""

    logits: Seconds
    logits_back: Seconds


class EndTimes(NamedTuple):
    """Times of one microbatch beside layers, S and T: of every rank, and what the first and the last one add."""

    every: PassTimes
    first: PassTimes
    last: PassTimes


def head_times(rank: RankConfig) -> HeadTimes:
    """Return the times of S and T: three products, of which S makes two with one barrier, and one with two.

    Both take no time where the vocabulary lies on the ranks at the ends.
    """
    model, parallel, cluster = rank.model, rank.parallel, rank.cluster
    if not parallel.barriers:
        return HeadTimes(Seconds(), Seconds())
    one, stored = parallel.barriers == 1, parallel.bytes
    columns, wide = _columns(rank), rank.tokens * model.hidden
    product = product_seconds(rank, Product(rank.tokens, model.hidden, columns), rank.dtype)
    # bytes per logit: with one barrier S casts back; T multiplies twice by a number of each token, and casts back
    logits, logits_back = LOSS_BYTES + (4 + stored if one else 0), 16 + 4 + stored
    # bytes per element of hidden states: with one barrier rows of labels are read, masked, and joined with the other
    # part of the gradient; with two T casts its part to float32
    states, states_back = (8 * stored, 0) if one else (0, stored + 4)
    # the product is added to the gradients
    added = (stored + 2 * _gradient_bytes(rank)) * columns * model.hidden
    rate, touched = cluster.loss_bytes_per_s or cluster.touch_bytes_per_s, cluster.touch_bytes_per_s
    gather = hidden_state_seconds(rank)[0] if parallel.sp else 0.0
    return HeadTimes(
        Seconds(
            products=(2 if one else 1) * product,
            memory=logits * rank.tokens * columns / rate + states * wide / touched,
            collectives=gather,
        ),
        Seconds(
            products=(1 if one else 2) * product,
            memory=logits_back * rank.tokens * columns / rate + (states_back * wide + added) / touched,
        ),
    )


def end_times(rank: RankConfig) -> EndTimes:
    """Return the times of lookups and of their gradients, and of what the last rank makes of the parts of a gradient.

    The first rank adds up lookups over tensor-parallel ranks, the last one the gradient of its output.
    """
    parallel, touched = rank.parallel, rank.cluster.touch_bytes_per_s
    stored, wide = parallel.bytes, rank.tokens * rank.model.hidden
    gather, scatter, reduce = hidden_state_seconds(rank)
    summed = Seconds(collectives=scatter if parallel.sp else reduce)
    # rows are read and masked; backward: masked, cast, and added to rows that are read
    looked_up, returned = 4 * stored, 3 * stored + 4 * _gradient_bytes(rank)
    # of each rank's parts: both scaled, added, and added to the sum, in float32; then scaled and cast
    joined = parallel.pp * (2 * stored + 32) + 8 if parallel.barriers == 1 else 0
    joined += 4 + stored
    return EndTimes(
        PassTimes(
            Seconds(memory=looked_up * wide / touched),
            Seconds(memory=returned * wide / touched, collectives=gather if parallel.sp else 0.0),
        ),
        PassTimes(summed),
        PassTimes(input=Seconds(memory=joined * wide / touched).plus(summed)),
    )


def meeting_times(rank: RankConfig) -> MeetingTimes:
    """Return the times of the messages that S, T and the last rank's backward wait for.

    With one barrier the last rank receives two tensors of hidden states from each other rank, behind the statistics.
    """
    parallel, cluster = rank.parallel, rank.cluster
    p, stride = parallel.pp, parallel.world // parallel.pp
    wide = rank.tokens * rank.model.hidden
    statistics = collective_seconds(cluster, "gather", p * STATISTICS * rank.tokens, p, stride)
    if parallel.barriers == 1:
        # the ranks at the ends of the pipeline lie farthest apart
        farthest = cluster.link(0, parallel.world - stride)
        gradient = statistics + farthest.hop_seconds((p - 1) * 2 * parallel.bytes * wide)
    else:
        gradient = _onto_one(rank, 4 * wide)
    return MeetingTimes(_to_all(rank), statistics, gradient)


def embedding_seconds(rank: RankConfig, returned: int) -> float:
    """Return the seconds before the first forward, and behind the last backward of the first rank.

    returned: gradients of the embedding that come to all ranks at the end; the others are behind S
    """
    return _onto_one(rank, rank.parallel.bytes * rank.tokens * rank.model.hidden) + returned * _to_all(rank)


def head_bytes(rank: RankConfig) -> float:
    """Return the most bytes of logits: exponentials of two microbatches, and while T runs two tensors and their cast.

    Those are in float32 but for the cast.
    """
    return (16 + rank.parallel.bytes) * rank.tokens * _columns(rank)


def message_bytes(rank: RankConfig, last: bool) -> float:
    """Return the most bytes of messages: hidden states, embeddings, and parts of the gradient.

    The output of the last stage is there for three microbatches, one on its way; embeddings for three, and one gradient
    of them. With one barrier a rank keeps two parts of the gradient for two microbatches; the last rank has those of
    all ranks and its own for one, and adds them up in four tensors of float32. With two barriers there is one part in
    float32 of two microbatches, and the product before its cast.
    """
    parallel, hidden = rank.parallel, rank.model.hidden
    stored, wide = parallel.bytes, rank.tokens * hidden
    kept = stored * (rank.split_tokens * hidden + 2 * wide) + 4 * stored * wide
    if parallel.barriers == 2:
        return kept + (8 + stored) * wide
    return kept + (2 * (parallel.pp + 1) * stored + 16 if last else 4 * stored) * wide


def sent_bytes(rank: RankConfig) -> float:
    """Return the bytes that a rank sends of one microbatch, a mean over the ranks of the pipeline.

    The output of the last stage and the gradient of the embedding go to all ranks; embeddings, and parts of the
    gradient of that output, come to one.
    """
    parallel, hidden = rank.parallel, rank.model.hidden
    p, stored, wide = parallel.pp, parallel.bytes, rank.tokens * hidden
    parts = 2 * stored if parallel.barriers == 1 else 4
    to_one, to_all = (stored + parts) * wide, 2 * stored * rank.split_tokens * hidden
    # a ring passes on whole tensors, on all ranks but one; each rank's statistics pass all others
    return (p - 1) / p * (to_one + to_all) + (p - 1) * STATISTICS * rank.tokens


def _columns(rank: RankConfig) -> float:
    return rank.model.vocab / rank.parallel.tp / rank.parallel.pp


def _gradient_bytes(rank: RankConfig) -> int:
    return 4 if rank.parallel.fp32_grads or rank.parallel.precision == "float32" else 2


def _to_all(rank: RankConfig) -> float:
    """Return the seconds in which hidden states go from one rank to all."""
    return _in_ring(rank, "gather", rank.parallel.bytes * rank.split_tokens * rank.model.hidden)


def _onto_one(rank: RankConfig, size: float) -> float:
    """Return the seconds in which tensors of `size` bytes of all ranks are added up on one."""
    return _in_ring(rank, "scatter", size)


def _in_ring(rank: RankConfig, kind: Collective, size: float) -> float:
    """Return the seconds of a collective whose ranks pass on whole tensors, not all parts but one."""
    p = rank.parallel.pp
    return collective_seconds(rank.cluster, kind, size * p / (p - 1), p, rank.parallel.world // p)
