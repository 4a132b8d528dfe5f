"""What can be read off a command line before Megatron parses it."""

import importlib.util
from collections.abc import Sequence

from megatron_cp.megatron.run import values_of

SPEC = ("megatron_cp.megatron.spec", "gpt_layer_spec")
HYBRID_SPEC = ("megatron_cp.megatron.spec", "hybrid_stack_spec")
OUR_FLAGS = ("--cp-kernel", "--cp-placement", "--cp-stripe", "--cp-chunks", "--cp-cluster")


def has_te() -> bool:
    """Whether transformer-engine is installed; it is not imported to find out."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_nvrx() -> bool:
    """Whether nvidia-resiliency-ext is installed, with which Megatron saves asynchronously unless told otherwise."""
    return importlib.util.find_spec("nvidia_resiliency_ext") is not None


def wants_layers(argv: Sequence[str]) -> bool:
    """Whether our attention belongs into this run.

    It does when the command line names our spec, one of our flags or a --cp-comm-type, and also where stock Megatron
    cannot do what was asked: context or sequence parallelism without transformer-engine.
    """
    spec = values_of(argv, "--spec")
    if spec:
        return spec[0].startswith("megatron_cp.")
    if any(values_of(argv, flag) is not None for flag in (*OUR_FLAGS, "--cp-comm-type")):
        return True
    size = values_of(argv, "--context-parallel-size") or ["1"]
    return not has_te() and (size != ["1"] or values_of(argv, "--sequence-parallel") is not None)
