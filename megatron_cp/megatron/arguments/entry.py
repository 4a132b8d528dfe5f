"""Refuse flags that a script of Megatron's reads and the package's own entry does not.

The entry builds one kind of dataset, GPTDataset of whole sequences. These flags ask a script for other datasets or
batches, and would be ignored.
"""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import read

UNREAD = (
    *("sft", "hybrid_context_parallel", "fim_data", "rl_use_sequence_packing"),
    *("perform_rl_step", "export_kd_teacher_load"),
)


def refuse_unread(args: Any) -> None:
    """Raise ValueError for the first flag of the arguments that the package's own entry would ignore."""
    for name in UNREAD:
        if read(args, name, None):
            raise Refused(
                f"megatron_cp.pretrain_gpt reads whole sequences of text and ignores --{name.replace('_', '-')}; leave "
                f"it out, or run Megatron's own script through megatron_cp.launch"
            )
