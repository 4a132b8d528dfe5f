"""Specs for `--spec megatron_cp.megatron.spec NAME`: gpt_layer_spec for GPT, hybrid_stack_spec for HybridModel.

Megatron only logs an ImportError of this import and trains with stock attention; CannotRun ends the run instead.
"""

from megatron_cp.errors import CannotRun

try:
    from megatron_cp.megatron.layers.hybrid import hybrid_stack_spec
    from megatron_cp.megatron.layers.specs import gpt_layer_spec
except ImportError as error:
    raise CannotRun(f"--spec megatron_cp.megatron.spec cannot be loaded: {error}; install what is missing") from error

__all__ = ["gpt_layer_spec", "hybrid_stack_spec"]
