"""Every tolerance of the tests, in one place; errors are relative, in the maximum norm."""

EXACT = 1e-12
"""float64 against dense float64."""

BF16_RATIO = 1.15
"""bf16 error of a sharded run over the unsharded kernel's own, both against float64."""
