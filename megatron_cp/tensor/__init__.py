"""Registries of tensor-parallel schemes, of the engines of their linears and of the products that these compute.

Pure: an engine is imported with its first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.tensor.engine import Engine
    from megatron_cp.tensor.gemm import Multiply

__all__ = [
    "AUTO",
    "COLLECTIVE",
    "CUBE",
    "DEFAULT_ENGINE",
    "ENGINES",
    "FLUX",
    "GEMMS",
    "MEGATRONS",
    "PANELS",
    "RING",
    "SCHEMES",
    "SYMMETRIC",
    "TORCH",
    "LinearEngine",
    "MatrixProduct",
    "TensorScheme",
]


@dataclass(frozen=True, kw_only=True)
class TensorScheme:
    """One way to share the linears of a layer among the ranks of a tensor-parallel group.

    what:  one line for tables
    sends: elements that a rank sends forward for all linears of a layer with tokens T and weights P, in words
    grid:  the ranks form a grid, of --tp-grid
    depth: another axis is part of it
    """

    name: str
    paper: str
    what: str
    sends: str
    grid: bool = False
    depth: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LinearEngine:
    """One way to communicate around the products of a linear.

    load: imports its class
    what: one line for tables
    """

    name: str
    load: "Callable[[], type[Engine]]"
    what: str
    needs: str = "nothing"
    aliases: tuple[str, ...] = ()


def _collective() -> "type[Engine]":
    from megatron_cp.tensor.collective import CollectiveEngine

    return CollectiveEngine


def _ring() -> "type[Engine]":
    from megatron_cp.tensor.ring import RingEngine

    return RingEngine


def _panels() -> "type[Engine]":
    from megatron_cp.tensor.panels import PanelEngine

    return PanelEngine


def _symmetric() -> "type[Engine]":
    from megatron_cp.tensor.symmetric import SymmetricEngine

    return SymmetricEngine


COLLECTIVE = "collective"
"""The engine of plain collectives."""

RING = "ring"
"""The engine of messages beside products."""

PANELS = "panels"
"""The engine of weights in panels."""

SYMMETRIC = "symmetric"
"""The engine of torch's fused operations."""

ENGINES = Registry(
    "tensor-parallel engine",
    [
        LinearEngine(
            name=COLLECTIVE,
            load=_collective,
            what="an all-gather before the product, a reduce-scatter after it",
        ),
        LinearEngine(
            name=RING,
            load=_ring,
            what="a product for each rank's tokens, beside the message of the next one; partial results added in fp32",
        ),
        LinearEngine(
            name=PANELS,
            load=_panels,
            what="weights of a grid multiplied shard by shard as they arrive, two in memory; tokens gathered whole",
            needs="a grid that gathers weights",
        ),
        LinearEngine(
            name=SYMMETRIC,
            load=_symmetric,
            what="torch's fused products over symmetric memory",
            needs="GPUs that reach each other's memory",
        ),
    ],
)


@dataclass(frozen=True, kw_only=True)
class MatrixProduct:
    """One way to compute the products of an engine.

    load: makes it; imports what it needs
    what: one line for tables
    """

    name: str
    load: "Callable[[], Multiply]"
    what: str
    needs: str = "nothing"
    aliases: tuple[str, ...] = ()


def _torch() -> "Multiply":
    from megatron_cp.tensor.gemm import torch_product

    return torch_product


def _stream_k() -> "Multiply":
    from megatron_cp.tensor.gemm import StreamProduct

    return StreamProduct(predicted=False)


def _predicted() -> "Multiply":
    import torch

    from megatron_cp.tensor.gemm import StreamProduct, torch_product, unable

    return torch_product if unable(gpu=torch.cuda.is_available()) else StreamProduct(predicted=True)


TORCH = "torch"
"""The products of torch."""

GEMMS = Registry(
    "tensor-parallel product",
    [
        MatrixProduct(name=TORCH, load=_torch, what="torch's own products, on GPUs those of cuBLAS"),
        MatrixProduct(
            name="stream-k",
            load=_stream_k,
            what="a Triton kernel that deals out the last tiles evenly (Osama et al., PPoPP 2023)",
            needs="Triton and a CUDA GPU",
        ),
        MatrixProduct(
            name="auto",
            load=_predicted,
            what="stream-k for each shape that it is predicted to take less time for, torch for the others",
            needs="nothing: without Triton and a CUDA GPU it is torch",
        ),
    ],
)

MEGATRONS = "1d"
"""The scheme of Megatron's own linears."""

FLUX = "flux"
"""The scheme of Megatron's layout with communication behind the products."""

AUTO = "auto"
"""The scheme that is chosen for a cluster."""

CUBE = "3d"
"""The scheme whose MLPs lie on a cube of ranks."""

DEFAULT_ENGINE = RING
"""The engine where none is asked for."""

SCHEMES = Registry(
    "tensor-parallel scheme",
    [
        TensorScheme(
            name=MEGATRONS,
            paper="arXiv:1909.08053, with --sequence-parallel arXiv:2205.05198",
            what="Megatron's own linears, each weight cut over all ranks",
            sends="4 T h (p-1)/p",
        ),
        TensorScheme(
            name=FLUX,
            paper="arXiv:2406.06858",
            what="the same layout, with communication behind the products",
            sends="4 T h (p-1)/p",
        ),
        TensorScheme(
            name="2d",
            paper="arXiv:2104.05343",
            what="a grid of t x w ranks: tokens are gathered along one axis, weights along the other",
            sends="4 T/w h (t-1)/t + P/t (w-1)/w, and heads for tokens around attention",
            grid=True,
        ),
        TensorScheme(
            name="2.5d",
            paper="arXiv:2105.14500",
            what="2d beside context or data parallelism as the depth, over which tokens are split and weights repeated",
            sends="as 2d, with the tokens of one rank of the depth",
            grid=True,
            depth=True,
        ),
        TensorScheme(
            name=CUBE,
            paper="arXiv:2105.14450",
            what="MLPs on a cube of l x l x l ranks: inputs, weights and outputs each cut over all; attention as flux",
            sends="in each linear of an MLP (T k + T n + k n)/l^2 (l-1)/l, and an exchange on each side of it",
        ),
        TensorScheme(
            name=AUTO,
            paper="least time by the cost model, in the terms of GSPMD (arXiv:2105.04663)",
            what="the one of 1d, flux, 2d and 3d whose linears take least on a cluster, and says why",
            sends="as the one it takes",
        ),
    ],
)
