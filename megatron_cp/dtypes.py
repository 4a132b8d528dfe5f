"""Dtypes of tensors, by torch's names."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""

TRAINING = ("bfloat16", "float16", "float32")
"""Dtypes that Megatron trains in."""
