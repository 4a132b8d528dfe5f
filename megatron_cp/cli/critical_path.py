"""`megatron-cp critical-path`: compare backends by their longest chain of measured kernel calls."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.options import Causal, ContextRanks, HeadDim, Heads, KvHeads, WholeSequence, several_backends
from megatron_cp.context import ALGORITHMS, BACKENDS, BASELINE
from megatron_cp.context.layouts import STRIPED, ZIGZAG
from megatron_cp.context.trace.critical_path import critical_path
from megatron_cp.context.trace.events import Problem, Trace
from megatron_cp.dtypes import BYTES
from megatron_cp.grid import most_square
from megatron_cp.registry import unknown

# tiles of shorter blocks are mostly overhead; the paper's single tokens make one tile per hop
SHORTEST_STRIPE = 32


class CriticalPath(NamedTuple):
    """A backend's longest chain of kernel calls in each pass, in seconds; `stripe` is the block length of `striped`."""

    backend: str
    stripe: int
    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward

    @property
    def label(self) -> str:
        return self.backend if self.stripe == 1 else f"{self.backend} B={self.stripe}"


def show(
    ranks: ContextRanks = 8,
    seq: WholeSequence = 8192,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    causal: Causal = True,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(BYTES)}.")] = "float32",
    backend: Annotated[
        list[str] | None,
        several_backends("Backend; may be repeated. By default all that call kernels."),
    ] = None,
    against: Annotated[str, typer.Option(help="The backend that the others are compared with.")] = BASELINE,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Time each distinct tile on this machine, and add up the longest chain of them, without links and copies.

    `striped` is shown for single tokens and for blocks of several lengths.
    """
    if dtype not in BYTES:
        raise unknown("--dtype", dtype, BYTES)
    names = [BACKENDS.get(name).name for name in (backend or ALGORITHMS)]
    whole = Problem(
        backend=BACKENDS.get(against).name,
        ranks=ranks,
        seq=seq,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        causal=causal,
        dtype=dtype,
    )
    chains = _chains(_traces(whole, names, asked=bool(backend)))
    if as_json:
        typer.echo(json.dumps([chain._asdict() for chain in chains], indent=2))
    else:
        _print(chains, whole)


def _traces(whole: Problem, names: Sequence[str], *, asked: bool) -> Iterator[Trace]:
    """Yield the backends' traces, first that of `whole.backend`, with `striped` once for each block length.

    A backend that refuses the problem is left out, or raises ValueError where it was asked for by name.
    """
    from megatron_cp.context.trace.record import record

    for name in dict.fromkeys([whole.backend, *names]):
        entry = BACKENDS.get(name)
        grid = most_square(whole.ranks) if entry.needs_grid else None
        for stripe in _stripes(whole) if entry.layout == STRIPED else (1,):
            problem = replace(whole, backend=name, grid=grid, stripe=stripe, layout=entry.layout or ZIGZAG)
            try:
                trace = record(problem)
            except ValueError:
                if asked or name == whole.backend:
                    raise
                continue
            if any(True for _ in trace.forward.calls(0)):
                yield trace
            elif asked or name == whole.backend:
                raise ValueError(f"backend {name!r} computes without a kernel, so that it has no tiles to time")


def _stripes(problem: Problem) -> list[int]:
    share = problem.seq // problem.ranks
    return [1, *(size for size in (2**n for n in range(share.bit_length())) if SHORTEST_STRIPE <= size < share)]


def _chains(traces: Iterator[Trace]) -> list[CriticalPath]:
    from megatron_cp.bench.calls import measure

    recorded = list(traces)
    times = measure(*recorded)
    return [
        CriticalPath(
            trace.problem.backend,
            trace.problem.stripe,
            *(critical_path(run, times.__getitem__) for run in (trace.forward, trace.backward)),
        )
        for trace in recorded
    ]


def _print(chains: Sequence[CriticalPath], problem: Problem) -> None:
    first = chains[0]
    table = Table(
        title=f"{problem.ranks} ranks, S={problem.seq}, h={problem.heads}, g={problem.kv_heads}, "
        f"d={problem.head_dim}, {problem.dtype}, {'causal' if problem.causal else 'full'}"
    )
    for column in ("backend", "forward ms", "backward ms", "forward gains", "both gain"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for chain in chains:
        gains = (first.forward / chain.forward, first.both / chain.both)
        times = (chain.forward * 1e3, chain.backward * 1e3)
        table.add_row(chain.label, *(f"{time:.1f}" for time in times), *(f"{gain:.2f}" for gain in gains))
    Console().print(table)
