"""Every tolerance of the tests, in one place; errors are relative, in the maximum norm."""

EXACT = 1e-12
"""float64 against dense float64."""

BF16_RATIO = 1.15
"""bf16 error of a sharded run over the unsharded kernel's own, both against float64."""

BF16_RATIO_EVEN = 1.3
"""The same where every query's keys are split evenly over the hops (striped): the kernel rounds each partial result to
bf16, and two equal halves of n keys are each sqrt(2) times as large as the whole, so that the two roundings together
are as large as the one of the result. It is largest for two ranks and falls from there. Outputs of the other backends
come to it from below: the more ranks, the more rows have a partial result that is nearly all of the output."""

LOSS_DIGITS = 6
"""Significant digits in which losses of equal runs agree in fp32, whatever is sharded."""

GRAD_NORM_DIGITS = 5
"""The same for gradient norms."""

BF16_LOSS = 2e-3
"""Relative difference of bf16 losses over the first iterations: half a unit in the last of bf16's 8 bits."""

BF16_STEP = 1e-3
"""Relative difference of bf16 losses and gradient norms over the first iterations under another tensor parallelism."""
