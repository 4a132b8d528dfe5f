"""Benchmarks that need Megatron."""
