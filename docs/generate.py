"""Write what of the pages comes from registries, data files and simulations: `python docs/generate.py [--check]`.

A page encloses such a part between `<!-- generated: NAME -->` and `<!-- end -->`. A picture holds a digest of the
figures and of the code that it is drawn from.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import typer
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner

from megatron_cp.batches import ALGORITHMS as BATCH_ALGORITHMS
from megatron_cp.batches.published_mixes import CLAIMS, Claim, MixRow, holds, mix_rows, ratios
from megatron_cp.cli import app
from megatron_cp.cli.backends import COLUMNS, rows
from megatron_cp.comm import Fabric, SingleFabric
from megatron_cp.context import AUTO, BACKENDS, Backend
from megatron_cp.context.merging import BY_TORCH, ONE_BY_ONE, SEVERAL
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.merge_cost import merge_cost
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.simulate import simulate as simulate_pass
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.experts import EXCHANGES, PLACEMENTS, PRODUCTS, ROUTERS
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters
from megatron_cp.kernels import KERNELS
from megatron_cp.megatron.hooks import HOOKS
from megatron_cp.pipeline import SCHEDULES, Rule
from megatron_cp.pipeline.action import MOVES, Action, Cell
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.channels import communicators
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.offload import Offload, balanced
from megatron_cp.pipeline.passes import without_moves
from megatron_cp.pipeline.placement import Placement, loop, vee
from megatron_cp.pipeline.schedule import BadSchedule
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from megatron_cp.pipeline.slices import flash_shares, fractions, shares
from megatron_cp.pipeline.vocabulary import BARRIERS, with_head
from megatron_cp.planner.linear_trace import peak_bytes
from megatron_cp.planner.model import model_of
from megatron_cp.planner.tiers import tiers
from megatron_cp.plots import timeline as plot_of_steps
from megatron_cp.plots import trace as plot_of_traces
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from megatron_cp.recipe.foreign import SYSTEMS
from megatron_cp.recipe.foreign.keys import Key, Outcome
from megatron_cp.replicas import OUTERS, QUANTISATIONS
from megatron_cp.tensor import COLLECTIVE, CUBE, ENGINES, GEMMS, MEGATRONS, RING
from megatron_cp.tensor import SCHEMES as SCHEMES_OF_TENSORS
from megatron_cp.tensor.axes import engines_over
from megatron_cp.tensor.cost import LayerLinears, Placing
from megatron_cp.tensor.cube_3d import cube_engines
from megatron_cp.tensor.place import GridSize

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PART = re.compile(r"<!-- generated: (.+?) -->\n.*?<!-- end -->", re.DOTALL)
RANKS, MICROS = 4, 8
MERGINGS = {"by torch": BY_TORCH, "one part a kernel": ONE_BY_ONE, "several": SEVERAL}


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def linked(path: Path) -> str:
    """A link to a file of the repository from a page in docs/."""
    return f"[`{path.name}`](../{path.relative_to(ROOT).as_posix()})"


def file_of(function: Callable[..., Any]) -> Path:
    """The file that defines a function, whatever decorates it."""
    return Path(sys.modules[function.__module__].__file__ or "")


def source_of(entry: Backend) -> str:
    """Links to the files that define an algorithm: its loop, and where the loop serves several, the layouts."""
    if entry.name == AUTO:
        return linked(ROOT / "megatron_cp/context/choose.py")
    loop = file_of(entry.load().forward)
    named = loop.stem.replace("_", "-") == entry.name
    return linked(loop) if named else f"{linked(loop)}, {linked(ROOT / 'megatron_cp/context/layouts.py')}"


def algorithms() -> str:
    files = [source_of(entry) for entry in BACKENDS]
    cells = ((f"`{name}`", *rest, file) for (name, *rest), file in zip(rows(), files, strict=True))
    return table([*COLUMNS, "file"], cells)


def merging() -> str:
    rows = (
        merging_row(seq, index, name) for seq in (2**15, 2**17) for index, name in enumerate(("forward", "backward"))
    )
    policies = [f"{name}: kernels, GB, share, peak" for name in MERGINGS]
    return table(["tokens", "pass", *policies], rows)


def merging_row(seq: int, index: int, name: str) -> list[str]:
    """What each way of merging costs in one pass."""
    problem = Problem("zigzag", 8, seq, 32, 8, 128)
    costs = [merge_cost(problem, way, rank=4)[index] for way in MERGINGS.values()]
    return [
        f"{seq // 1024}K",
        name,
        *(f"{cost.kernels}, {cost.size / 1e9:.2f}, {cost.share:.1%}, {cost.peak / 1e9:.2f} GB" for cost in costs),
    ]


def traffic(name: str) -> str:
    """What an algorithm sends, as the first lines of a list."""
    formula = BACKENDS.get(name).traffic
    assert formula
    return f"- Sends {formula}, per rank and forward pass.\n- Sends {formula.text(backward=True)} in the backward pass."


def batch_algorithms() -> str:
    head = ["--algorithm", "what it does", "degrees", "source", "file"]
    files = (linked(file_of(one.load())) for one in BATCH_ALGORITHMS)
    cells = ([f"`{one.name}`", one.what, one.degrees, one.paper] for one in BATCH_ALGORITHMS)
    return table(head, ([*row, file] for row, file in zip(cells, files, strict=True)))


@cache
def published_steps() -> list[MixRow]:
    return list(mix_rows(stretching(record)))


def batch_mixes() -> str:
    """Steps on mixes of published lengths: seconds of `static`, and how many times as fast the others are."""
    names = [name for name in BATCH_ALGORITHMS.names if name != "static"]
    head = ["mix", "model", "cluster", "`static`, s", *(f"`{name}`" for name in names), "lower bound, s"]
    rows, others = published_steps(), [ratios(published_steps(), name) for name in names]
    return table(
        head,
        (
            [
                row.mix,
                row.model,
                f"{row.ranks} x {row.cluster}",
                f"{row.seconds['static']:.4g}",
                *(f"{each:.2f}" for each in found),
                f"{row.bound:.4g}",
            ]
            for row, *found in zip(rows, *others, strict=True)
        ),
    )


def batch_claims() -> str:
    """Claims of papers beside what these steps show."""
    rows, head = published_steps(), ["claim", "source", "of it here", "over `static`", "over `homogeneous`"]
    return table(head, (claim_row(claim, rows) for claim in CLAIMS))


def claim_row(claim: Claim, rows: Sequence[MixRow]) -> list[str]:
    found = [ratios(rows, claim.algorithm, baseline) for baseline in ("static", "homogeneous")]
    text = f"`{claim.algorithm}` {claim.ratio:.2f} {'in the mean' if claim.mean else 'at most'}: {claim.words}"
    return [text, claim.source, holds(claim, rows), *(f"{min(each):.2f} to {max(each):.2f}" for each in found)]


def schemes() -> str:
    head = ["--tp-comm-type", "what it does", "sends per rank, forward", "source"]
    return table(head, ([f"`{one.name}`", one.what, one.sends, one.paper] for one in SCHEMES_OF_TENSORS))


def engines() -> str:
    head = ["--tp-engine", "what it does", "needs", "file"]
    return table(head, ([f"`{one.name}`", one.what, one.needs, linked(file_of(one.load()))] for one in ENGINES))


def products() -> str:
    head = ["--tp-gemm", "what it does", "needs"]
    return table(head, ([f"`{one.name}`", one.what, one.needs] for one in GEMMS))


def experts() -> str:
    head = ["--moe-grouped-product", "what it does", "needs", "source", "file"]
    rows = (["`" + "`, `".join((one.name, *one.aliases)) + "`", one.what, one.needs, one.paper] for one in PRODUCTS)
    return table(head, ([*row, linked(file_of(one.load()))] for row, one in zip(rows, PRODUCTS, strict=True)))


def exchanges() -> str:
    head = ["--moe-comm-type", "what it does", "messages to other nodes", "source"]
    rows = (["`" + "`, `".join((one.name, *one.aliases)) + "`", one.what, one.messages, one.paper] for one in EXCHANGES)
    return table(head, rows)


def routers() -> str:
    head = ["--moe-router", "what it does", "preset to extend", "source"]
    presets = {one.name: f"`{one.preset}`" if one.preset else "" for one in ROUTERS}
    return table(head, ([f"`{one.name}`", one.what, presets[one.name], one.paper] for one in ROUTERS))


def placements() -> str:
    head = ["--moe-placement", "what it does", "source", "file"]
    return table(head, ([f"`{one.name}`", one.what, one.paper, linked(file_of(one.load()))] for one in PLACEMENTS))


def outer_optimizers() -> str:
    head = ["--local-sgd-outer", "what islands go on from", "source"]
    return table(head, (["`" + "`, `".join((one.name, *one.aliases)) + "`", one.what, one.paper] for one in OUTERS))


def quantisations() -> str:
    head = ["--zero-quantized-gradients", "how numbers travel", "bytes a number", "source"]
    return table(head, ([f"`{one.name}`", one.what, f"{one.bytes:.3f}", one.paper] for one in QUANTISATIONS))


def free_tiers() -> str:
    """Tokens of a step from which the optimizer's state costs little, in host memory and on disks."""
    cluster = load_cluster("dgx-h100")
    rows = [tier_row(name, seq, cluster) for name in ("llama2-7b", "llama2-13b", "llama2-70b") for seq in TIER_LENGTHS]
    return table(["model", "tokens in a sequence", "host memory", "disks", "layers' inputs to the host"], rows)


TIER_LENGTHS = (4096, 32768, 131072, 1048576)


def tier_row(name: str, seq: int, cluster: Cluster) -> list[str]:
    found = tiers(model_of(recipe.load(f"models/{name}", Unset({}))), cluster, seq)
    tokens = [f"{each / 1e6:.2g}M" for each in (found.host, found.disk) if each]
    return [f"`{name}`", f"{seq // 1024}K", *tokens, f"{found.activations or 0:.1%}"]


def tensor_traffic() -> str:
    """Bytes of one layer under each way of using eight ranks, the least of a row in bold."""
    head = ["model, tokens", "1d, TP 8", "2d, 4 x 2", "3d, 2 x 2 x 2", "2.5d, 2 x 2 x CP 2", "1d, TP 4 x CP 2"]
    body = (tensor_row(name, seq) for name in ("8b", "70b", "405b") for seq in (2**13, 2**17, 2**20))
    return table([*head, "layer's weights, 1/8 and 1/4"], body)


def tensor_memory() -> str:
    """Memory of one layer's linears under each way of using eight ranks, the least of a row in bold."""
    head = ["model, tokens", "1d, TP 8", "flux, TP 8", "2d, 4 x 2", "3d, 2 x 2 x 2", "2.5d, 2 x 2 x CP 2"]
    body = (memory_row(name, seq) for name in ("8b", "70b", "405b") for seq in (2**13, 2**17, 2**20))
    return table([*head, "1d, TP 4 x CP 2"], body)


def memory_row(name: str, seq: int) -> list[str]:
    layer = llama_layer(name, seq)
    half = layer._replace(tokens=seq / 2)
    traced = [
        (layer, Placing(MEGATRONS, GridSize(8, 1), COLLECTIVE)),
        (layer, Placing("flux", GridSize(8, 1))),
        (layer, Placing("2d", GridSize(4, 2))),
        (half, Placing("2.5d", GridSize(2, 2))),
        (half, Placing(MEGATRONS, GridSize(4, 1), COLLECTIVE)),
    ]
    at_work = [peak_bytes(each, placing, "bfloat16") for each, placing in traced]
    at_work.insert(3, 2 * round(layer.at_work_on_cube(2)))
    # weights in bf16 and gradients in float32
    kept = [6 * sum(one.weight for one in layer.linears) / ranks for ranks in (8, 8, 8, 8, 4, 4)]
    both = [each + most for each, most in zip(kept, at_work, strict=True)]
    cells = [f"{each / 1e6:,.0f} + {most / 1e6:,.0f} MB" for each, most in zip(kept, at_work, strict=True)]
    cells[both.index(min(both))] = f"**{cells[both.index(min(both))]}**"
    return [f"{name.upper()}, {seq // 1024}K", *cells]


def llama_layer(name: str, seq: int) -> LayerLinears:
    ranks = {"8b": 64, "70b": 256, "405b": 2048}[name]
    model = model_of(recipe.load(f"llama3.1-{name}-128k-h100x{ranks}", {"DATA_PATH": "corpus"}))
    width = model.query + model.key_value
    return LayerLinears(seq, model.hidden, width, model.query, (model.matrices - 1) * model.ffn, model.ffn)


def tensor_row(name: str, seq: int) -> list[str]:
    layer = llama_layer(name, seq)
    half = layer._replace(tokens=seq / 2)
    # zigzag's K and V of a rank of tensor parallelism 4, and their gradients: 3/4 of 2 U forward, 4 U backward
    context = 5.5 * seq / 2 * (layer.attention - layer.query) / 2 / 4
    sent = [
        sum(layer.sent(GridSize(8, 1), split=False)),
        sum(layer.sent(GridSize(4, 2), split=False)),
        layer.sent_on_cube(2, split=False),
        sum(half.sent(GridSize(2, 2), split=False)) + context,
        sum(half.sent(GridSize(4, 1), split=False)) + context,
    ]
    cells = [f"{2 * one / 1e6:,.0f} MB" for one in sent]
    cells[sent.index(min(sent))] = f"**{cells[sent.index(min(sent))]}**"
    weights = 2 * sum(one.weight for one in layer.linears) / 1e6
    return [f"{name.upper()}, {seq // 1024}K", *cells, f"{weights / 8:,.0f} and {weights / 4:,.0f} MB"]


def schedules() -> str:
    head = ["--pp-schedule", "also", "stages", "chunks per rank", "backward", "what it does", "source", "file"]
    return table(head, (schedule_row(rule) for rule in SCHEDULES))


def schedule_row(rule: Rule) -> list[str]:
    chunks = "free" if rule.chunks is None else str(rule.chunks)
    function = rule.table
    file = file_of(function) if function else ROOT / "megatron_cp/pipeline/schedules/auto.py"
    backward = "I and W" if rule.split else "whole"
    stages = rule.placement if function else "either"
    return [f"`{rule.name}`", ", ".join(rule.aliases), stages, chunks, backward, rule.what, rule.paper, linked(file)]


def pipeline_communicators() -> str:
    """Count the process groups that a pipeline's channels are divided into, and those that a rank has messages in."""
    head = ["stages", "ranks", "channels", "process groups", "of a rank, at most"]
    placements = [(f"loop, {v} chunk{'s' * (v > 1)} per rank", loop(p, v)) for p in (2, 4, 8, 16) for v in (1, 2)] + [
        ("V", vee(p)) for p in (2, 4, 8, 16)
    ]
    return table(head, (communicator_row(*one) for one in placements))


def communicator_row(stages: str, placement: Placement) -> list[str]:
    groups = communicators(placement)
    ranks = [[rank for _, *ends in channels for rank in ends] for channels in groups]
    most = max(sum(rank in members for members in ranks) for rank in range(placement.ranks))
    return [stages, str(placement.ranks), str(sum(map(len, groups))), str(len(groups)), str(most)]


class _Counting(SingleFabric):
    """A rank that counts, in `made`, the groups that it is in."""

    def __init__(self, rank: int, size: int, made: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.rank, self.size, self._made = rank, size, made

    def subset(self, ranks: Sequence[int]) -> Self:
        self._made.add(tuple(ranks))
        return type(self)(ranks.index(self.rank), len(ranks), set())


def other_groups() -> str:
    """Count the groups that tensor parallelism and the V make of one of Megatron's, and those that a rank is in."""
    grids = [GridSize(2, 2), GridSize(4, 2), GridSize(8, 1)]
    rows = [
        *(
            grouped(f"linears on {size}", size.grid.ranks, partial(engines_over, size=size, engine=RING))
            for size in grids
        ),
        *(grouped(f"linears of {CUBE}", ranks, partial(cube_engines, engine=RING)) for ranks in (8, 27)),
        ["stages on the V, or on two pipes", "any", "1", "1", "`_BACKWARDS`"],
    ]
    return table(["of a group", "ranks", "process groups", "of a rank", "named as it, with"], rows)


def grouped(what: str, ranks: int, make: Callable[[Fabric], object]) -> list[str]:
    of_all: set[tuple[int, ...]] = set()
    most = 0
    for rank in range(ranks):
        made: set[tuple[int, ...]] = set()
        make(_Counting(rank, ranks, made))
        of_all |= made
        most = max(most, len(made))
    return [what, str(ranks), str(len(of_all)), str(most), "`_SUBSET`" if most else ""]


def played(name: str, micros: int, limit: int | None = None) -> SimulatedStep:
    """One step of `micros` microbatches on four ranks; F, I and W of a rank's layers take three units each over v.

    limit: of chunks on a rank; moving one to the host, or to a peer, takes as long as its forward
    """
    rule = SCHEDULES.get(name)
    where = place(rule, RANKS)
    v = where.chunks
    costs = uniform(where, (v, v, v, 0), move=v)
    moves = None if limit is None else Offload(limit)
    return simulate(build(name, RANKS, micros, costs=costs, moves=moves), costs)


def schedule_costs() -> str:
    head = ["schedule", "chunks", "makespan", "bubble", "peak activations, M_B"]
    return table(head, (cost_row(rule) for rule in SCHEDULES))


def cost_row(rule: Rule) -> list[str]:
    run = played(rule.name, MICROS)
    v = run.schedule.placement.chunks
    return [f"`{rule.name}`", str(v), f"{run.makespan / v:g}", f"{run.bubble:.1%}", f"{max(run.peak):g}"]


def timeline(name: str, micros: int, limit: int | None = None) -> str:
    """One line per rank, one cell per unit of time, and one for its moves where it has some."""
    run = played(name, micros, limit)
    lines = []
    for rank in range(RANKS):
        lines.append(f"rank {rank}  {''.join(cells(run, rank)).rstrip()}")
        if any(map(is_move, run.schedule.table[rank])):
            lines.append(f" moves  {''.join(cells(run, rank, moves=True)).rstrip()}")
    return "\n".join(["```text", *lines, "```"])


def is_move(cell: Cell) -> bool:
    return isinstance(cell, Action) and cell.kind in MOVES


def offload_costs() -> str:
    """Figures of schedules under a limit, from the simulator: F, I and W of a rank take one unit of time each."""
    head = ["schedule", "p, m, v", "makespan, peak without", "limit", "makespan at k = 0.5, 1", "peak", "chunks moved"]
    return table(head, (offload_row(*case) for case in OFFLOADED))


OFFLOADED = (
    ("1f1b", 4, 8, 1, Offload(2)),
    ("1f1b", 8, 24, 1, Offload(2)),
    ("1f1b", 8, 24, 1, Offload(4)),
    ("gis", 8, 24, 2, Offload(8)),
    ("gis", 8, 24, 2, Offload(4)),
    ("gis", 8, 24, 2, Offload(2)),
    ("gis", 8, 24, 4, Offload(4)),
    ("izb", 8, 24, 2, Offload(8)),
    ("zb-v", 8, 24, 2, Offload(8)),
    ("bpipe", 4, 8, 1, None),
    ("bpipe", 8, 24, 1, None),
    ("bpipe", 16, 48, 1, None),
)


def offload_row(name: str, p: int, m: int, v: int, moves: Offload | None) -> list[str]:
    where = place(SCHEDULES.get(name), p, v)
    free = uniform(where, (1.0, 1.0, 1.0, 0.0))
    plain = simulate(without_moves(build(name, p, m, v)), free)
    half, whole = (
        simulate(build(name, p, m, v, moves=moves), uniform(where, (1.0, 1.0, 1.0, 0.0), move=move))
        for move in (0.5, 1.0)
    )
    chunks = m * len(where.rank_of)
    limit = f"{moves.limit}, host" if moves else f"{balanced(p)}, peer"
    return [
        f"`{name}`",
        f"{p}, {m}, {v}",
        f"{plain.makespan:g}, {max(plain.peak):g}",
        limit,
        f"{half.makespan:g}, {whole.makespan:g}",
        f"{max(whole.peak):g}",
        f"{whole.moved} of {chunks}",
    ]


def two_pipes() -> str:
    """Idle time and peak of schedules on two pipes and of the others beside them; F, I and W take one unit of time."""
    sizes = ((4, 8), (8, 8), (8, 16), (8, 24), (16, 48))
    head = ["schedule", "copies of the weights", *(f"p = {p}, m = {m}" for p, m in sizes)]
    names = [rule.name for rule in SCHEDULES if rule.two_copies]
    return table(head, (two_pipes_row(name, sizes) for name in ("1f1b", "izb", "zb-v", *names)))


def two_pipes_row(name: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    copies = 2 if SCHEDULES.get(name).two_copies else 1
    return [f"`{name}`", str(copies), *(idle_and_peak(name, p, m) for p, m in sizes)]


def idle_and_peak(name: str, p: int, m: int) -> str:
    try:
        schedule = build(name, p, m)
    except BadSchedule:
        return "no table"
    run = simulate(schedule, uniform(schedule.placement, (1.0, 1.0, 1.0, 0.0)))
    return f"{run.makespan - run.work:g}, {max(run.peak):g}"


def vocabulary() -> str:
    """Figures of steps with an LM head on one rank and over all ranks; F, I and W take one unit of time each."""
    head = ["schedule", "p, m", "LM head, T_F", "ideal", "on one rank", "peak"]
    head += ["1 barrier", "peak", "2 barriers", "peak"]
    cases = [("1f1b", *case) for case in ((4, 24, 0.3), (8, 24, 0.15), (8, 24, 0.6), (8, 24, 2.0), (16, 48, 1.0))]
    others = ("zb-h1", "interleaved", "izb", "gis", "zb-v", "v-half", "v-min", "1f1b-v", "dualpipe-v")
    cases += [(name, 8, 24, size) for name in others for size in (0.6, 2.0)]
    return table(head, (vocabulary_row(*case) for case in cases))


def vocabulary_row(name: str, p: int, m: int, head: float) -> list[str]:
    runs = [with_vocabulary(name, p, m, head, barriers) for barriers in (0, *BARRIERS)]
    figures = [figure for run in runs for figure in (f"{run.makespan:.4g}", f"{max(run.peak):g}")]
    return [f"`{name}`", f"{p}, {m}", f"{head:g}", f"{runs[0].work:.4g}", *figures]


def with_vocabulary(name: str, p: int, m: int, head: float, barriers: int) -> SimulatedStep:
    """A step with an LM head of so many T_F."""
    costs = with_head(uniform(place(SCHEDULES.get(name), p), (1.0, 1.0, 1.0, 0.0)), head, p, barriers)
    return simulate(build(name, p, m, costs=costs, barriers=barriers), costs)


def cells(run: SimulatedStep, rank: int, moves: bool = False) -> list[str]:
    """Capital letters are actions of the first chunk, small ones of the others; - is a move away, + one back."""
    line = [" . "] * round(run.makespan)
    chunk_of = {stage: chunk for chunk, stage in enumerate(run.schedule.placement.of_rank[rank])}
    played_actions = zip(run.schedule.table[rank], run.starts[rank], run.ends[rank], strict=True)
    for action, start, end in played_actions:
        if is_move(action) != moves:
            continue
        kind = {"EVICT": "-", "LOAD": "+"}.get(action.kind, action.kind)
        kind = kind.lower() if chunk_of[action.stage] else kind
        line[round(start) : round(end)] = [f"{kind}{action.micro} ", *[" = "] * (round(end) - round(start) - 1)]
    return line


def recipes() -> str:
    head = ["recipe", "cluster", "processes", "tokens", "TP", "PP", "CP", "algorithm", "schedule"]
    return table(head, (recipe_row(Path(name).name) for name in recipe.shipped("recipes")))


def recipe_row(name: str) -> list[str]:
    one = recipe.load(name, {"DATA_PATH": "corpus"})
    sizes = [one.flag(f"--{kind}-model-parallel-size", "1") for kind in ("tensor", "pipeline")]
    processes = 1
    for flag in ("--nnodes", "--nproc-per-node"):
        processes *= int(one.launch[flag].text) if flag in one.launch else 1
    cp = one.number("--context-parallel-size", 1)
    algorithm = BACKENDS.get(one.flag("--cp-comm-type", "p2p")).name if cp > 1 else ""
    schedule = one.flag("--pp-schedule", megatrons_schedule(one))
    tokens = f"{one.number('--seq-length', 1):,}"
    return [f"`{name}`", one.cluster or "", f"{processes:,}", tokens, *sizes, str(cp), algorithm, schedule]


def megatrons_schedule(one: recipe.Recipe) -> str:
    if one.number("--pipeline-model-parallel-size", 1) == 1:
        return ""
    chunks = {"--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"}
    return "Megatron's interleaved" if chunks & set(one.model_args) else "Megatron's 1F1B"


def imports(name: str) -> str:
    """Keys of another system, and what each becomes."""
    system = next(one for one in SYSTEMS if one.name == name)
    own = [row for row in system.keys if not is_namesake(row)]
    sections: dict[str, list[str]] = {}
    for row in system.keys:
        if row not in own:
            section, _, field = row.names[0].rpartition(".")
            sections.setdefault(section, []).append(f"`{field}`")
    namesakes = [
        [f"`{section}.`: {', '.join(fields)}", "the flag of the same name", Outcome.MAPPED, ""]
        for section, fields in sections.items()
    ]
    return table(["key", "becomes", "", "why, or how far"], [*map(import_row, own), *namesakes])


def is_namesake(row: Key) -> bool:
    """True for a row whose one key has the name of its flag."""
    flag = f"--{row.names[0].rpartition('.')[2].replace('_', '-')}"
    return len(row.names) == 1 and row.becomes in (f"{flag} VALUE", f"true: {flag}") and row.how == Outcome.MAPPED


def import_row(row: Key) -> list[str]:
    def flags(text: str) -> str:
        return re.sub(r"--[a-z0-9][\w-]*", r"`\g<0>`", text)

    # flags of other projects are no flags here
    keys = ", ".join(f"`{name.removeprefix('--')}{'.*' if row.section else ''}`" for name in row.names)
    return [keys, flags(row.becomes), row.how, flags(row.note)]


def clusters() -> str:
    head = ["cluster", "attention", "matrix products", "memory", "GPUs of a node", "links inside", "links between"]
    return table(head, (cluster_row(load_cluster(name)) for name in shipped_clusters()))


def cluster_row(one: Cluster) -> list[str]:
    products = ", ".join(f"{dtype} {gemm.rates[-1] / 1e12:.3g} TFLOP/s" for dtype, gemm in one.gemms)
    links = [f"{link.bytes_per_s / 1e9:.3g} GB/s" if link else "" for link in (one.inside, one.between)]
    memory = f"{one.memory_bytes / 1e9:.3g} GB" if one.memory_bytes else ""
    attention = f"{one.dtype} {one.flops_forward / 1e12:.3g} and {one.flops_backward / 1e12:.3g} TFLOP/s"
    return [f"`{one.name}`", attention, products, memory, str(one.ranks_per_node), *links]


def kernels() -> str:
    body = ([f"`{entry.name}`", ", ".join(entry.aliases), entry.needs, entry.summary] for entry in KERNELS)
    return table(["--cp-kernel", "also", "needs", "what it is"], body)


def hooks() -> str:
    body = ([f"`{hook.name}`", hook.reason, hook.retired_by] for hook in HOOKS)
    return table(["hook", "why it is needed", "upstream change that would retire it"], body)


def order() -> str:
    """The order of folders, as the test of layers has it."""
    from tests.test_layers import ADAPTER_ORDER, ORDER

    def shown(lines: Sequence[str]) -> list[str]:
        return [f"{number:>2}  {line}" for number, line in enumerate(lines, 1)]

    inside = ["", "inside megatron/:", *shown(ADAPTER_ORDER)]
    return "\n".join(["```text", *shown(ORDER), *inside, "```"])


def glossary() -> str:
    body = (
        [f"**{entry['term']}**", entry["means"], entry.get("megatron", ""), "; ".join(words_of_papers(entry))]
        for entry in sorted(data("glossary"), key=lambda entry: entry["term"].lower())
    )
    return table(["term", "meaning", "in Megatron", "in the papers"], body)


def words_of_papers(entry: dict[str, Any]) -> list[str]:
    return [f"{word} ({paper})" for paper, word in entry.get("papers", {}).items()]


def walk(name: str) -> str:
    """The files of one walk in order, each once per entry, with the reason for entering a file again."""
    (steps,) = (one["steps"] for one in data("walks") if one["name"] == name)
    return table(["", "file", "what happens there"], (walk_row(number, step) for number, step in enumerate(steps, 1)))


def walk_row(number: int, step: dict[str, str]) -> list[str]:
    notes = [f"Reached through {step['through']}." if "through" in step else ""]
    notes.append(f"Entered again: {step['again']}." if "again" in step else "")
    file = f"[`{step['file']}`](../megatron_cp/{step['file']})"
    return [str(number), file, " ".join([step["does"], *filter(None, notes)])]


def output(*words: str) -> str:
    """What a command prints on a terminal of 100 columns."""
    printed = CliRunner(env={"COLUMNS": "100"}).invoke(app, words, catch_exceptions=False).stdout
    return "```text\n" + "\n".join(line.rstrip() for line in printed.splitlines()) + "\n```"


def options() -> str:
    """A page of every command with its options, as `--help` has them."""
    page = [
        "# Options of every command",
        "Megatron's, torchrun's and sbatch's flags follow a RECIPE where one is named.",
    ]
    for name, command in commands(typer.main.get_command(app)).items():
        rows_ = (option_row(one) for one in command.params if one.name != "help")
        page += [f"## `megatron-cp {name}`", command.help or "", table(["option", "default", "meaning"], rows_)]
    return "\n\n".join(page) + "\n"


def option_row(one: Any) -> list[str]:
    names = one.opts + one.secondary_opts if one.param_type_name == "option" else [one.metavar or one.name.upper()]
    default = "" if one.default in (None, False) or callable(one.default) else f"`{one.default}`"
    return [", ".join(f"`{name}`" for name in names), default, " ".join((one.help or "").split()).replace("|", "\\|")]


def commands(group: Any, before: str = "") -> dict[str, Any]:
    """Every command that has no commands of its own, by the words after `megatron-cp`."""
    found: dict[str, Any] = {}
    for name, one in group.commands.items():
        found |= commands(one, f"{before}{name} ") if hasattr(one, "commands") else {before + name: one}
    return found


def data(name: str) -> Any:
    return YAML(typ="safe").load(DOCS / f"{name}.yaml")


PARTS: dict[str, Callable[[], str]] = {
    part.__name__.replace("_", "-"): part
    for part in (
        algorithms,
        schedules,
        schemes,
        batch_algorithms,
        batch_mixes,
        batch_claims,
        tensor_traffic,
        tensor_memory,
        engines,
        products,
        experts,
        exchanges,
        routers,
        placements,
        outer_optimizers,
        quantisations,
        free_tiers,
        schedule_costs,
        offload_costs,
        two_pipes,
        vocabulary,
        pipeline_communicators,
        other_groups,
        recipes,
        clusters,
        kernels,
        merging,
        hooks,
        order,
        glossary,
    )
}

SLOW = ("batch-mixes", "batch-claims")
"""Parts that take more than a second or two."""

NAMED_PARTS: dict[str, Callable[..., str]] = {"traffic": traffic, "walk": walk, "output": output, "import": imports}


def part(name: str) -> str:
    """The text of a part, such as `schedules`, `timeline zb-h1 4` or `walk q`."""
    kind, *words = name.split()
    if kind == "timeline":
        return timeline(words[0], *map(int, words[1:]))
    if kind in NAMED_PARTS:
        return NAMED_PARTS[kind](*words)
    return PARTS[kind]()


class Picture(NamedTuple):
    """A picture of the pages: the figures that it shows, and the function that draws them into a file."""

    figures: object
    draw: Callable[[Path, dict[str, str]], object]
    code: str

    @property
    def digest(self) -> str:
        code = Path(self.code).read_text()
        return hashlib.sha256(f"{self.figures}{code}".encode()).hexdigest()


def pictures() -> dict[str, Picture]:
    """Return every picture of the pages that is drawn from a simulation, by its file."""
    return {
        "slices-1m.png": slices_of_a_million_tokens(),
        "trace-zigzag.png": zigzag_on_eight_ranks(),
        "vocabulary.png": vocabulary_over_four_ranks(),
    }


def vocabulary_over_four_ranks() -> Picture:
    names = {0: "LM head on the last rank", 1: "over all ranks, one barrier", 2: "over all ranks, two barriers"}
    steps = {name: with_vocabulary("1f1b", 4, 8, 2.0, barriers) for barriers, name in names.items()}
    title = "1f1b, p = 4, m = 8, an LM head of 2 T_F; numbers are microbatches"
    return Picture(
        [(step.ends, step.peak) for step in steps.values()],
        lambda file, metadata: plot_of_steps.draw_steps(steps, file, title, metadata),
        plot_of_steps.__file__,
    )


def slices_of_a_million_tokens() -> Picture:
    steps = {
        "1f1b": one_long_sequence(1, by_cost=True),
        "1f1b, 8 slices of equal length": one_long_sequence(8, by_cost=False),
        "1f1b, 8 slices of equal cost": one_long_sequence(8, by_cost=True),
    }
    title = "one sequence of 1M tokens, Llama-3 70B (attention 0.91 of the forward), p = 8; numbers are slices"
    return Picture(
        [(step.ends, step.peak) for step in steps.values()],
        lambda file, metadata: plot_of_steps.draw_steps(steps, file, title, metadata),
        plot_of_steps.__file__,
    )


def one_long_sequence(slices: int, *, by_cost: bool) -> SimulatedStep:
    """A step of one sequence of 1M tokens on eight ranks at the sizes of Llama-3 70B."""
    times, where = (1.0, 2.365, 0.09, 0.0), place(SCHEDULES.get("1f1b"), 8)
    attention = flash_shares(0.91, times)
    lengths = fractions(slices, attention, times, split=False) if by_cost else [1 / slices] * slices
    costs = uniform(where, times, slices=shares(lengths, attention) if slices > 1 else ())
    return simulate(build("1f1b", 8, 1, costs=costs, slices=slices), costs)


def zigzag_on_eight_ranks() -> Picture:
    cluster = load_cluster("h100-ib")
    trace = record(Problem("zigzag", 8, 131072, 32, 8, 128, dtype=cluster.dtype, device=cluster.device))
    runs = {
        name: simulate_pass(run, cluster) for name, run in (("forward", trace.forward), ("backward", trace.backward))
    }
    return Picture(
        [(run.spans, run.flights, run.memory) for run in runs.values()],
        lambda file, metadata: plot_of_traces.draw(trace, runs, file, cluster.name, metadata=metadata),
        plot_of_traces.__file__,
    )


def stale_pictures() -> dict[str, Picture]:
    """Return the pictures whose files show other figures, or what other code drew."""
    return {name: picture for name, picture in pictures().items() if noted(DOCS / name) != picture.digest}


def noted(file: Path) -> str | None:
    if not file.exists():
        return None
    with Image.open(file) as image:
        return image.info.get("Description")


def refreshed(text: str, but: Iterable[str] = ()) -> str:
    """A page with every generated part as it is now, those named in `but` as they are."""

    def made(found: re.Match[str]) -> str:
        return found[0] if found[1] in but else f"<!-- generated: {found[1]} -->\n{part(found[1])}\n<!-- end -->"

    return PART.sub(made, text)


def main(words: Sequence[str]) -> int:
    made = {page: refreshed(page.read_text()) for page in PAGES}
    stale = [page for page, text in made.items() if text != page.read_text()]
    for page in stale:
        name = page.relative_to(ROOT)
        if "--check" in words:
            print(f"{name} is not current; run: python docs/generate.py", file=sys.stderr)
        else:
            page.write_text(made[page])
            print(f"wrote {name}")
    old = stale_pictures()
    for name, picture in old.items():
        if "--check" in words:
            print(f"docs/{name} is not current; run: python docs/generate.py", file=sys.stderr)
        else:
            picture.draw(DOCS / name, {"Description": picture.digest})
            print(f"wrote docs/{name}")
    return 1 if (stale or old) and "--check" in words else 0


if __name__ == "__main__":
    # the order of folders is read from the tests
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
