"""Batches that are cut by their documents, as --cp-document-layout says, instead of as one stream."""

from typing import Any

from megatron.core import parallel_state

from megatron_cp.context import BACKENDS
from megatron_cp.context.auto import default_cluster
from megatron_cp.context.document_choice import choose_layout
from megatron_cp.context.document_layouts import AUTO, STREAM
from megatron_cp.context.documents import Documents, documents
from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.plan import Sizes
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.context import comm_types
from megatron_cp.megatron.layers.packed import cut_stream, positions
from megatron_cp.megatron.machine.facts import device_of_run
from megatron_cp.megatron.run import AttentionFlags, packs_documents

PER_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")
CUT_POSITIONS = ("rope", "learned_absolute", "none")
"""Kinds of positions that a rank's tokens keep wherever they lie."""


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


def cut_by_documents(whole: dict[str, Any], args: Any) -> dict[str, Any]:
    """Return this rank's part of a batch that is one stream of packed documents, with its `stream` for the model."""
    ends = whole["cu_seqlens"][0]
    made, group = documents(ends), parallel_state.get_context_parallel_group()
    layout = made.planned(_layout_name(made, args), group.size())
    mine = positions(layout[group.rank()]).to(ends.device, non_blocking=True)
    part = {key: whole[key] if whole[key] is None else whole[key].index_select(1, mine) for key in PER_TOKEN}
    samples = made.tokens // args.seq_length
    return {**whole, **part, "stream": cut_stream(made, layout, ends.device, samples)}


def _layout_name(made: Documents, args: Any) -> str:
    """Return the layout for these documents; the work is that of a causal mask in every layer."""
    flags = AttentionFlags.of(args)
    if flags.document_layout != AUTO:
        return flags.document_layout
    if all(BACKENDS.get(name).capabilities.heads == "all" for name in comm_types(args)):
        # each rank attends its heads to all tokens, wherever they come from
        return STREAM
    device, tensor = device_of_run(), args.tensor_model_parallel_size
    cluster = load_cluster(flags.cluster) if flags.cluster else default_cluster(device)
    heads = args.num_attention_heads // tensor
    groups = max(1, (args.num_query_groups or args.num_attention_heads) // tensor)
    dtype = str(args.params_dtype).removeprefix("torch.")
    sizes = Sizes(made.tokens, heads, groups, args.kv_channels, dtype, device)
    return choose_layout(made.mask(CAUSAL), args.context_parallel_size, sizes, cluster.every(tensor), moved=False)
