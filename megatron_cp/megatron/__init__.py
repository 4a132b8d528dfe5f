"""Adapters to megatron-core 0.19; the only folder that imports megatron."""
