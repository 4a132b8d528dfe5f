"""Refuse flags that a script of Megatron's reads and the package's own entry does not.

The entry builds GPTDataset of whole sequences and, for --sft, packed samples of conversations. These flags ask a script
for other datasets or batches, and would be ignored.
"""

from typing import Any

from megatron_cp.corpus.conversations import template_text
from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import INSTEAD_OF_HYBRID, read
from megatron_cp.megatron.run import has_our_layers

UNREAD = (
    *("fim_data", "rl_use_sequence_packing"),
    *("perform_rl_step", "export_kd_teacher_load"),
)
NOT_OF_CONVERSATIONS = (
    *("dataloader_inter_document_masking", "dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"),
    *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
)
"""Flags of the dataset of texts."""


def refuse_unread(args: Any) -> None:
    """Raise ValueError for the first flag of the arguments that the package's own entry would ignore."""
    if read(args, "hybrid_context_parallel", False):
        raise Refused(f"megatron_cp.pretrain_gpt reads no samples for --hybrid-context-parallel; {INSTEAD_OF_HYBRID}")
    for name in UNREAD:
        if read(args, name, None):
            raise Refused(
                f"megatron_cp.pretrain_gpt reads texts and conversations and ignores --{name.replace('_', '-')}; leave "
                f"it out, or run Megatron's own script through megatron_cp.launch"
            )
    if read(args, "sft", False):
        _check_sft(args)


def _check_sft(args: Any) -> None:
    """Refuse what the entry's dataset of conversations cannot do; ValueError with the rule and a way out."""
    for name in NOT_OF_CONVERSATIONS:
        if read(args, name, False):
            raise Refused(f"--sft packs conversations itself and ignores --{name.replace('_', '-')}; leave it out")
    if read(args, "mock_data", False):
        raise Refused("--sft trains on conversations, got --mock-data; give --data-path FILE.jsonl instead")
    template, kind = read(args, "chat_template"), read(args, "tokenizer_type")
    if template is not None:
        template_text(template)
    elif kind != "SFTTokenizer":
        raise Refused(
            f"--sft needs the text of a conversation's messages, got --tokenizer-type {kind}; pass --chat-template "
            f"FILE, a template of Jinja, or --tokenizer-type SFTTokenizer"
        )
    cp = read(args, "context_parallel_size", 1)
    if cp > 1 and not has_our_layers(args):
        raise Refused(
            f"megatron_cp.pretrain_gpt cuts the samples of --sft as one stream, in which stock layers give tokens the "
            f"positions of others, got --context-parallel-size {cp}; pass --spec megatron_cp.megatron.spec "
            f"gpt_layer_spec"
        )
