"""FlexSP's published cost model, of GPT-7B on A100s with 40 GB under ZeRO-3 (arXiv:2412.01523 and its repository)."""

from megatron_cp.batches.problem import BatchProblem, GroupRate

SQUARE_MS, TOKEN_MS, FIXED_MS = 5.128e-6, 0.1839576, 629.3563
"""Milliseconds of a microbatch on one rank: for the square of a length, for a token, and whatever it holds."""
LAYERS, HIDDEN, PARAMETERS = 32, 4096, 7.12e9
MEMORY_MB, TOKEN_MB = 28 * 1024, 4.480441895
"""Memory of a rank that the paper uses, and what a token takes of it."""
ALL_TO_ALL_GB_PER_S = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
"""Measured rate of Ulysses' all-to-alls by degree, on nodes of eight."""
RANKS = 64


def published_problem(lengths: tuple[int, ...]) -> BatchProblem:
    """Return the problem of a batch under the published model: 64 ranks, which begin every microbatch together."""
    state = 16 * PARAMETERS / 1e9 * 1024 / RANKS
    return BatchProblem(
        lengths=lengths,
        ranks=RANKS,
        capacity=int((MEMORY_MB - state) / TOKEN_MB),
        rates=tuple((degree, _rate(degree)) for degree in (1, *ALL_TO_ALL_GB_PER_S)),
        per_node=8,
        lockstep=True,
    )


def _rate(degree: int) -> GroupRate:
    # four all-to-alls forward and four backward, two bytes an element; MB over GB/s are ms
    sent = 4 * 2 * LAYERS * HIDDEN * 2 / 2**20
    exchange = sent / ALL_TO_ALL_GB_PER_S[degree] if degree > 1 else 0.0
    milliseconds = FIXED_MS, (TOKEN_MS + exchange) / degree, SQUARE_MS / degree
    return GroupRate(*(value / 1e3 for value in milliseconds))
