"""Experts in the place of Megatron's own."""
