"""`megatron-cp trace`: prove a context-parallel algorithm correct, cost it on a cluster and draw it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.cli.options import Causal, ContextRanks, HeadDim, Heads, KvHeads, WholeSequence
from megatron_cp.cli.trace_linears import AskedLinears, layer_of, trace_linears
from megatron_cp.context import AUTO, BACKENDS, PLACEMENTS
from megatron_cp.context.checks import able, check_latent, check_placement
from megatron_cp.context.choose import on_nodes
from megatron_cp.context.document_layouts import AUTO as AUTO_LAYOUT
from megatron_cp.context.document_layouts import NAMES, STREAM
from megatron_cp.context.documents import Documents, documents
from megatron_cp.context.layouts import ZIGZAG
from megatron_cp.context.trace.events import Pass, Problem, Trace
from megatron_cp.context.trace.simulate import Seconds, SimulatedPass, simulate
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid, most_square
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters
from megatron_cp.registry import unknown
from megatron_cp.tensor import COLLECTIVE, PANELS, RING, SCHEMES
from megatron_cp.tensor.place import AUTO_ENGINE
from megatron_cp.units import is_whole

if TYPE_CHECKING:
    from megatron_cp.context.trace.proof import Proof


# engines that run over any fabric
COUNTED = (COLLECTIVE, RING, PANELS)

Window = Annotated[
    int | None, typer.Option(min=0, help="Keys that a query sees before itself; with --no-causal also after.")
]
ClusterOption = Annotated[str, typer.Option(help=f"{', '.join(shipped_clusters())}, or a YAML file.")]
GridSizes = Annotated[
    tuple[int, int] | None, typer.Option(help="INNER OUTER, for backends on a grid; by default the most square.")
]
Layout = Annotated[
    str, typer.Option(help="The ranks' tokens outside attention: zigzag, as in Megatron, contiguous or striped.")
]
SequenceChunks = Annotated[
    int | None,
    typer.Option(
        "--chunks",
        "--cp-chunks",
        min=1,
        help="Pieces over time, with the rest in host memory; by default only fpdt has any, as many as it needs.",
    ),
]
DocumentLengths = Annotated[
    str | None,
    typer.Option(
        "--documents",
        metavar="LENGTHS|PREFIX",
        help="Documents of a packed sequence: tokens of each, as 100,20,8, or the first of a .bin/.idx pair.",
    ),
]
DocumentLayout = Annotated[
    str,
    typer.Option(
        help=f"With --documents, the ranks' tokens inside attention: {', '.join(NAMES)}; "
        "stream leaves them where --layout has them."
    ),
]
Cut = Annotated[
    bool,
    typer.Option("--cut", help="The batch is cut by --document-layout; else tokens move there and back in attention."),
]
Latent = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="RANK ROTARY",
        help="Compressed and rotary numbers of a token's latent: also tell what --cp-latent sends in place of keys and "
        f"values, with {able(lambda entry: entry.capabilities.latent, str)}. Proof, tables and pictures are of these.",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Of the tensors; must be the one that the cluster's rates hold for.")]
Measure = Annotated[
    bool, typer.Option("--measure", help="Time this trace's kernel calls on this machine, instead of the rates.")
]
Plots = Annotated[
    list[Path] | None, typer.Option(help="Draw .png, .svg or .pdf, or write .json for Perfetto; may be repeated.")
]


class Costed(NamedTuple):
    """A recorded trace with its proof, and both passes as simulated on a cluster.

    latents: the trace of the same attention over latents, where these are asked for
    """

    trace: Trace
    proof: "Proof"
    runs: Mapping[str, SimulatedPass]
    cluster: Cluster
    latents: Trace | None


def trace(
    ranks: ContextRanks,
    seq: WholeSequence,
    backend: Annotated[
        str | None, typer.Option("--backend", "--cp-comm-type", help=f"One of {', '.join(BACKENDS.names)}.")
    ] = None,
    tp_comm_type: Annotated[
        str | None,
        typer.Option(
            help="Instead of a backend, the linears of one layer on tensor-parallel ranks: one of "
            f"{', '.join(SCHEMES.names)}."
        ),
    ] = None,
    tp_grid: Annotated[
        str | None, typer.Option(help="'TOKENS WEIGHTS' or auto, with --tp-comm-type; by default the most square.")
    ] = None,
    tp_engine: Annotated[str, typer.Option(help=f"With --tp-comm-type, auto, {' or '.join(COUNTED)}.")] = AUTO_ENGINE,
    ffn: Annotated[
        int | None, typer.Option(min=1, help="With --tp-comm-type, width of the gated MLP; by default 4 hidden sizes.")
    ] = None,
    heads: Heads = 32,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    causal: Causal = True,
    window: Window = None,
    cluster: ClusterOption = "h100-ib",
    hierarchical_context_parallel_sizes: GridSizes = None,
    placement: Annotated[
        str,
        typer.Option(
            "--placement",
            "--cp-placement",
            help=f"{' or '.join(PLACEMENTS)}, for {able(lambda entry: entry.capabilities.placement, str)}.",
        ),
    ] = "head-first",
    layout: Layout = ZIGZAG,
    chunks: SequenceChunks = None,
    stripe: Annotated[
        int, typer.Option("--stripe", "--cp-stripe", min=1, help="Tokens in a block of the striped layout.")
    ] = 1,
    windows: Annotated[
        bool,
        typer.Option("--windows", help="The kernel takes windows: a band along the diagonal is one call, as on a GPU."),
    ] = False,
    documents: DocumentLengths = None,
    document_layout: DocumentLayout = STREAM,
    cut: Cut = False,
    latent: Latent = None,
    dtype: Dtype = None,
    measure: Measure = False,
    plot: Plots = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of tables.")] = False,
) -> None:
    """Prove an algorithm's own loop at a short length, then print its work, traffic, memory and time.

    With --tp-comm-type it is the linears of one layer, on --ranks tensor-parallel ranks for --seq tokens.

    Pairs are unmasked pairs of a query and a key; peak counts bytes beyond local q, k, v and dout.
    """
    # input is checked before anything that takes time
    hardware = load_cluster(cluster)
    _check_plots(plot or [])
    if (backend is None) == (tp_comm_type is None):
        raise Refused(
            f"trace takes one of --backend and --tp-comm-type, got {'neither' if backend is None else 'both'}"
        )
    if tp_comm_type is not None:
        layer = layer_of(seq, heads, kv_heads or heads, head_dim, ffn)
        trace_linears(AskedLinears(layer, ranks, tp_comm_type, tp_grid, tp_engine), hardware, plot or [], as_json)
        return
    assert backend is not None
    if placement in PLACEMENTS:
        check_placement(BACKENDS.get(backend), placement)
    problem = Problem(
        backend=BACKENDS.get(backend).name,
        ranks=ranks,
        seq=seq,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        causal=causal,
        window=None if window is None else (window, 0 if causal else window),
        dtype=_dtype(dtype, hardware),
        grid=_grid(backend, ranks, hierarchical_context_parallel_sizes),
        placement=placement,
        layout=layout,
        chunks=chunks,
        stripe=stripe,
        device=hardware.device,
        windows=windows,
        documents=None if documents is None else _documents(documents, seq),
        document_layout=document_layout,
        cut=cut,
    )
    _check_document_layout(problem)
    _check_latent(problem, latent)
    problem, chosen = _settled(problem, hardware)
    problem = on_nodes(problem, hardware.ranks_per_node)
    costed = _costed(problem, latent, hardware, measure)
    for file in plot or []:
        _draw(costed, file)
        typer.echo(f"picture: {file}", err=True)
    if as_json:
        typer.echo(json.dumps({**chosen, **_as_json(costed)}, indent=2))
    else:
        for name, why in chosen.items():
            typer.echo(f"{name}: {why}")
        _show(costed)
    if not costed.proof.covered:
        raise typer.Exit(1)


def _costed(problem: Problem, latent: tuple[int, int] | None, hardware: Cluster, measure: bool) -> Costed:
    from megatron_cp.context.trace.proof import prove, small
    from megatron_cp.context.trace.record import record

    recorded = record(problem)
    proof = prove(small(problem))
    seconds = _measured(recorded) if measure else None
    runs = {name: simulate(run, hardware, seconds) for name, run in _passes(recorded).items()}
    latents = None if latent is None else record(replace(problem, latent=latent))
    return Costed(recorded, proof, runs, hardware, latents)


def _settled(problem: Problem, hardware: Cluster) -> tuple[Problem, dict[str, str]]:
    """Return the problem with the backend and document layout that `auto` chooses, and its reasons."""
    problem, chosen = _settled_backend(problem, hardware)
    if problem.documents is None or problem.document_layout != AUTO_LAYOUT:
        return problem, chosen
    from megatron_cp.context.document_choice import choose_layout
    from megatron_cp.context.plan import Sizes

    sizes = Sizes(problem.seq, problem.heads, problem.kv_heads, problem.head_dim, problem.dtype, problem.device)
    name = choose_layout(problem.documents.mask(problem.band), problem.ranks, sizes, hardware, moved=not problem.cut)
    return replace(problem, document_layout=name), {**chosen, "document layout": f"{name} is faster by prediction"}


def _settled_backend(problem: Problem, hardware: Cluster) -> tuple[Problem, dict[str, str]]:
    if problem.backend != AUTO:
        return problem, {}
    from megatron_cp.context.auto import decide

    choice = decide(problem, hardware)
    packed = {name: getattr(problem, name) for name in ("documents", "document_layout", "cut")}
    return replace(choice.problem, **packed), {AUTO: choice.why}


def _check_document_layout(problem: Problem) -> None:
    if problem.document_layout not in NAMES:
        raise unknown("document layout", problem.document_layout, NAMES)
    if problem.documents is None and (problem.cut or problem.document_layout != STREAM):
        given = "--cut" if problem.cut else f"--document-layout {problem.document_layout}"
        raise ValueError(f"{given} needs --documents, got none; name a corpus or the tokens of each document")


def _check_latent(problem: Problem, latent: tuple[int, int] | None) -> None:
    """Raise Refused for a latent that no attention of this problem has."""
    if latent is None:
        return
    check_latent(BACKENDS.get(problem.backend))
    rank, rotary = latent
    if rank < 1 or not 0 <= rotary <= problem.head_dim:
        raise Refused(
            f"--latent takes 1 or more compressed numbers and 0 to --head-dim {problem.head_dim} rotary ones, got "
            f"{rank} {rotary}"
        )
    if problem.kv_heads != problem.heads or problem.chunks is not None:
        given = f"--kv-heads {problem.kv_heads}" if problem.chunks is None else f"--chunks {problem.chunks}"
        raise Refused(
            f"--latent {rank} {rotary} expands to keys of all --heads {problem.heads} at once, got {given}; "
            "leave it out"
        )


def _documents(given: str, seq: int) -> Documents:
    """Return documents of these lengths, or those at the start of a corpus; the last one is cut at `seq` tokens."""
    parts = given.split(",")
    if all(is_whole(part.strip()) for part in parts):
        return documents([0, *accumulate(map(int, parts))])
    from megatron_cp.corpus.index import check_prefix, document_lengths

    held = check_prefix(given)
    if held.tokens < seq:
        raise ValueError(f"{given}.bin holds {held.tokens} tokens, less than --seq {seq}; take a shorter sequence")
    ends = accumulate(document_lengths(given, held), initial=0)
    return documents([*(end for end in ends if end < seq), seq])


def _passes(recorded: Trace) -> dict[str, Pass]:
    return {"forward": recorded.forward, "backward": recorded.backward}


def _dtype(asked: str | None, cluster: Cluster) -> str:
    if asked not in (None, cluster.dtype):
        raise ValueError(
            f"the rates of cluster {cluster.name!r} hold for {cluster.dtype}, got --dtype {asked}; "
            "leave it out, or describe the cluster for that dtype"
        )
    return cluster.dtype


def _grid(backend: str, ranks: int, sizes: tuple[int, int] | None) -> Grid | None:
    if sizes and (sizes[0] * sizes[1] != ranks or min(sizes) < 1):
        raise ValueError(
            f"--hierarchical-context-parallel-sizes {sizes[0]} {sizes[1]} must multiply to --ranks {ranks}; "
            f"possible are {', '.join(f'{n} {ranks // n}' for n in range(1, ranks + 1) if ranks % n == 0)}"
        )
    entry = BACKENDS.get(backend)
    if sizes and not entry.takes_grid:
        raise ValueError(
            f"--hierarchical-context-parallel-sizes has no effect on --backend {entry.name}; leave it out or use one "
            f"of {', '.join(other.name for other in BACKENDS if other.takes_grid)}"
        )
    if sizes:
        return Grid(*sizes)
    return most_square(ranks) if entry.needs_grid else None


def _measured(recorded: Trace) -> Seconds:
    from megatron_cp.bench.calls import measure

    times = measure(recorded)
    return lambda call: times[call]


def _check_plots(files: list[Path]) -> None:
    from megatron_cp.plots.trace import SUFFIXES

    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(f"--plot takes a file that ends in one of: {', '.join(SUFFIXES)}; got {file.name!r}")


def _draw(costed: Costed, file: Path) -> None:
    from megatron_cp.plots.trace import draw, write_events

    if file.suffix == ".json":
        write_events(costed.trace, costed.runs, file)
    else:
        draw(costed.trace, costed.runs, file, costed.cluster.name)


def _as_json(costed: Costed) -> dict[str, Any]:
    recorded, proof = costed.trace, costed.proof
    head = {"covered": proof.covered, "problem": proof.problem, "proved_pairs": proof.pairs}
    passes = {name: _pass_as_json(run, costed.runs[name], costed.cluster) for name, run in _passes(recorded).items()}
    grid, packed = recorded.problem.grid, recorded.problem.documents
    asked = {
        **asdict(recorded.problem),
        "grid": grid and list(grid.sizes),
        "documents": packed and [len(each.q) for each in packed.sets],
        "cluster": costed.cluster.name,
        "relayout": recorded.relayout,
        "latents": {name: run.sent for name, run in _passes(costed.latents).items()} if costed.latents else None,
    }
    return {**head, **passes, **asked}


def _pass_as_json(run: Pass, played: SimulatedPass, cluster: Cluster) -> dict[str, Any]:
    return {
        "work": run.work,
        "sent": run.sent,
        "received": run.received,
        "peak": run.peak,
        "time": played.time,
        "ideal": played.ideal,
        "sent_between_nodes": run.sent_between(cluster.ranks_per_node),
        "host_bytes": run.hosted,
        "touched": [touch.size for touch in run.touched],
        "kernels": [touch.kernels for touch in run.touched],
        "busy": [played.busy(rank) for rank in range(len(run.steps))],
        "load": run.load(),
        "calls": _calls(run),
    }


def _calls(run: Pass) -> list[int]:
    return [sum(1 for _ in run.calls(rank)) for rank in range(len(run.steps))]


def _show(costed: Costed) -> None:
    console, recorded, proof = Console(), costed.trace, costed.proof
    if proof.covered:
        console.print(f"proved: each of {proof.pairs} unmasked pairs is computed exactly once in each pass")
    else:
        console.print(f"NOT EXACT: {proof.problem}", style="bold red")
    for name in costed.runs:
        console.print(_pass_table(costed, name))
        console.print(_between_kernels(costed, name), soft_wrap=True)
    for name, run in _passes(recorded).items():
        calls = _calls(run)
        console.print(f"{name}: {max(calls)} kernel calls on the rank with most, {sum(calls)} on all", highlight=False)
    if any(recorded.relayout):
        console.print(f"of what is sent, {max(recorded.relayout) / 2**20:.1f} MiB per rank bring tokens into place")
    if costed.latents:
        theirs = _passes(costed.latents)
        for name, run in _passes(recorded).items():
            ours, least = max(run.sent) / 2**20, max(theirs[name].sent) / 2**20
            console.print(
                f"{name}: with --cp-latent {least:.1f} MiB are sent by the rank with most, in place of {ours:.1f} MiB "
                "of the keys and values that are costed here",
                highlight=False,
                soft_wrap=True,
            )


def _between_kernels(costed: Costed, name: str) -> str:
    """Return the copies, merges and sums of the rank with most of them, beside its kernel calls."""
    run, cluster = _passes(costed.trace)[name], costed.cluster
    rank = max(range(len(run.touched)), key=lambda rank: run.touched[rank].size)
    size, kernels = run.touched[rank]
    milliseconds, calls = size / cluster.touch_bytes_per_s * 1e3, sum(1 for _ in run.calls(rank))
    return (
        f"copies, merges and sums of rank {rank}: {size / 2**20:.1f} MiB in {milliseconds:.3f} ms; "
        f"their kernels: {kernels}, beside calls of the attention kernel: {calls}"
    )


def _pass_table(costed: Costed, name: str) -> Table:
    """Return one pass as a table with a row for each rank."""
    run, played, cluster = _passes(costed.trace)[name], costed.runs[name], costed.cluster
    table = Table(
        title=f"{costed.trace.problem.backend} {name} on {cluster.name}: {played.time * 1e3:.3f} ms, "
        f"{played.ideal / played.time:.0%} of it the kernels alone, spread evenly"
    )
    for column in ("rank", "pairs x heads", "sent MiB", "between nodes MiB", "received MiB", "peak MiB", "waits"):
        table.add_column(column, justify="right")
    between = run.sent_between(cluster.ranks_per_node)
    for rank, work in enumerate(run.work):
        sizes = (run.sent[rank], between[rank], run.received[rank], run.peak[rank])
        idle = 1 - played.busy(rank) / played.time
        table.add_row(str(rank), f"{work:.3e}", *(f"{size / 2**20:.1f}" for size in sizes), f"{idle:.0%}")
    return table
