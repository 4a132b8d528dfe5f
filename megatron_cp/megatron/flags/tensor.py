"""Flags of tensor parallelism."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cp.kernels import AUTO
from megatron_cp.megatron.flags.flag import Flags, flag, one_of
from megatron_cp.tensor import DEFAULT_ENGINE, ENGINES, GEMMS, MEGATRONS, SCHEMES, TORCH


@dataclass(frozen=True, kw_only=True)
class TensorFlags(Flags):
    """Flags of tensor-parallel linears; without them all of it is left to Megatron."""

    prefix = "tp"
    title = "tensor-parallel linears (megatron-cp)"

    comm_type: str = flag(
        MEGATRONS,
        lambda: one_of(*SCHEMES.names),
        lambda: (
            "How the ranks of --tensor-model-parallel-size share the linears of attention and MLPs: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in SCHEMES)
            + "."
        ),
    )
    grid: Sequence[str] | None = flag(
        None,
        lambda: "RANKS",
        lambda: (
            "TOKENS WEIGHTS: with --tp-comm-type 2d or 2.5d, ranks over which tokens and weights are gathered, whose "
            "product is the tensor-parallel size; by default the most square, and auto is the fastest on the cluster."
        ),
        nargs="+",
    )
    engine: str = flag(
        AUTO,
        lambda: one_of(AUTO, *ENGINES.names),
        lambda: (
            "How linears communicate around their products: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in ENGINES)
            + f". {AUTO} is {DEFAULT_ENGINE}."
        ),
    )
    gemm: str = flag(
        TORCH,
        lambda: one_of(*GEMMS.names),
        lambda: (
            "How linears compute their products: " + "; ".join(f"{entry.name}: {entry.what}" for entry in GEMMS) + "."
        ),
    )

    @property
    def chosen(self) -> bool:
        """True if scheme or grid are still to be chosen for a cluster."""
        return self.comm_type == AUTO or (SCHEMES.get(self.comm_type).grid and list(self.grid or ()) == [AUTO])

    @property
    def ours(self) -> bool:
        """True if the linears are not Megatron's own."""
        return self.comm_type != MEGATRONS
