"""Tensor-parallel linears in the place of Megatron's own."""
