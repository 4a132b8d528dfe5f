"""Configs of other systems, read key by key into Megatron's flags: a table for each."""

from megatron_cp.recipe.foreign.bridge import SYSTEM as BRIDGE
from megatron_cp.recipe.foreign.colossal_ai import SYSTEM as COLOSSAL_AI
from megatron_cp.recipe.foreign.deepspeed import COMMAND as MEGATRON_DEEPSPEED
from megatron_cp.recipe.foreign.deepspeed import SYSTEM as DEEPSPEED
from megatron_cp.recipe.foreign.nemo import SYSTEM as NEMO

__all__ = ["BRIDGE", "COLOSSAL_AI", "DEEPSPEED", "MEGATRON_DEEPSPEED", "NEMO", "SYSTEMS"]

SYSTEMS = (DEEPSPEED, MEGATRON_DEEPSPEED, COLOSSAL_AI, NEMO, BRIDGE)
