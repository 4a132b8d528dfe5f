"""Batches that are cut by their documents, as --cp-document-layout says, instead of as one stream.

A sample that is a whole microbatch brings its layout, planned where it is read; several samples are one stream, which
is planned here when they have come together.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron_cp.context import BACKENDS
from megatron_cp.context.auto import default_cluster
from megatron_cp.context.document_choice import choose_layout
from megatron_cp.context.document_layouts import AUTO, STREAM, of_numbers
from megatron_cp.context.documents import Documents, documents
from megatron_cp.context.layouts import PlannedLayout
from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.plan import Sizes
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.context import comm_types
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.layers.packed import cut_stream, positions
from megatron_cp.megatron.machine.facts import device_of_run
from megatron_cp.megatron.run import packs_documents

PER_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")
CUT_POSITIONS = ("rope", "learned_absolute", "none")
"""Kinds of positions that a rank's tokens keep wherever they lie."""
PLANNED = "cu_seqlens_padded"
"""Entry of a batch that brings its layout, as numbers, int32 [1 n].

Megatron broadcasts it over tensor-parallel ranks at any length and on every pipeline stage, as it does no entry of
another name; documents of one stream are not padded, so that it is free.
"""


@dataclass(frozen=True)
class DocumentPlanner:
    """Plans layouts of packed documents from plain data alone, so that a data worker, which has no GPU, can do it.

    name:    of the layout; auto takes the faster of stream and blocks
    ranks:   of the context-parallel group
    sizes:   of attention, for auto; the documents' tokens take the place of seq
    cluster: for auto
    """

    name: str
    ranks: int
    sizes: Sizes | None = None
    cluster: Cluster | None = None

    def layout(self, made: Documents) -> PlannedLayout:
        """Return the positions of each rank's tokens; the work is that of a causal mask in every layer."""
        return made.planned(self._choice(made) if self.name == AUTO else self.name, self.ranks)

    def _choice(self, made: Documents) -> str:
        assert self.sizes is not None, "auto chooses by sizes"
        assert self.cluster is not None, "auto chooses for a cluster"
        sizes = self.sizes._replace(seq=made.tokens)
        return choose_layout(made.mask(CAUSAL), self.ranks, sizes, self.cluster, moved=False)


def cuts_by_documents(args: Any) -> bool:
    """True if each rank gets the tokens that --cp-document-layout gives it; else they move inside attention.

    Multi-latent attention makes its rotary positions itself, from the stream, and multi-token prediction takes the next
    tokens by the stream's cut.
    """
    return bool(
        packs_documents(args)
        and args.context_parallel_size > 1
        and AttentionFlags.of(args).document_layout != STREAM
        and args.position_embedding_type in CUT_POSITIONS
        and not args.multi_latent_attention
        and not args.mtp_num_layers
    )


def plans_samples(args: Any) -> bool:
    """True if a sample is a whole microbatch, in training and in evaluation, and brings the layout that cuts it."""
    return cuts_by_documents(args) and args.micro_batch_size == args.eval_micro_batch_size == 1


def cut_by_documents(whole: dict[str, Any], args: Any, planned: Tensor | None = None) -> dict[str, Any]:
    """Return this rank's part of a batch that is one stream of packed documents, with its `stream` for the model.

    planned: the layout that the sample brought, as PLANNED says; None where it is planned now
    """
    ends = whole["cu_seqlens"][0]
    made, group = documents(ends), parallel_state.get_context_parallel_group()
    layout = planner_of(args).layout(made) if planned is None else of_numbers(planned[0].tolist(), group.size())
    mine = positions(layout[group.rank()]).to(ends.device, non_blocking=True)
    part = {key: whole[key] if whole[key] is None else whole[key].index_select(1, mine) for key in PER_TOKEN}
    samples = made.tokens // args.seq_length
    return {**whole, **part, "stream": cut_stream(made, layout, ends.device, samples)}


def planner_of(args: Any) -> DocumentPlanner:
    """Return what plans the layouts of this run; asks for the device that it runs on, which a worker must not.

    Raises ValueError when auto has no cluster to choose for.
    """
    flags, ranks = AttentionFlags.of(args), args.context_parallel_size
    if flags.document_layout != AUTO:
        return DocumentPlanner(flags.document_layout, ranks)
    if all(BACKENDS.get(name).capabilities.heads == "all" for name in comm_types(args)):
        # each rank attends its heads to all tokens, wherever they come from
        return DocumentPlanner(STREAM, ranks)
    device, tensor = device_of_run(), args.tensor_model_parallel_size
    cluster = load_cluster(flags.cluster) if flags.cluster else default_cluster(device)
    heads = args.num_attention_heads // tensor
    groups = max(1, (args.num_query_groups or args.num_attention_heads) // tensor)
    dtype = str(args.params_dtype).removeprefix("torch.")
    sizes = Sizes(args.seq_length, heads, groups, args.kv_channels, dtype, device)
    return DocumentPlanner(AUTO, ranks, sizes, cluster.every(tensor))
