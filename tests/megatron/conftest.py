"""Megatron warns of missing Apex and TransformerEngine when it is imported; that is no failure of a test."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.training  # noqa: F401
