"""BPipe (ICML 2023): 1F1B whose early ranks lend activations to late ones."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.schedules.one_forward_one_backward import one_forward_one_backward


def bpipe(p: int, m: int, v: int = 1) -> list[list[Action]]:
    """1F1B; moves to the peers, which the registry asks for, then keep ceil((p + 2) / 2) microbatches on every rank."""
    return one_forward_one_backward(p, m, v)
