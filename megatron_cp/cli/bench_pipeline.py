"""`megatron-cp bench pipeline`: time schedules on one machine beside Megatron's own and beside the simulator."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import place
from megatron_cp.plots.timeline import check_suffix

if TYPE_CHECKING:
    from megatron_cp.bench.pipeline import OffloadResult, Pairs, ScheduleResult
    from megatron_cp.megatron.bench.overhead import Overhead
    from megatron_cp.megatron.bench.pipeline import ScheduleGroup

DEFAULT = ["zb-h1", "izb"]
OFFLOAD_COLUMNS = (
    *("schedule", "v", "m", "limit", "moved MiB", "step ms", "without", "copies", "step / without", "beyond copies"),
)
COLUMNS = ("schedule", "v", "m", "step ms", "simulated", "ratio", "Megatron's", "speed-up", "pairs won", "peak M_B")
NO_VERDICT = (
    "No verdict: a rank got only {share:.0%} of its core while it only computed; stop other programs on this machine, "
    "or use at most one rank per core."
)


def pipeline(
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Schedule on the loop, or of two copies; may be repeated. By default {' and '.join(DEFAULT)}."
        ),
    ] = None,
    ranks: Annotated[
        int, typer.Option("-p", min=2, help="Processes of this machine, one pipeline stage or more each.")
    ] = 2,
    micros: Annotated[
        list[int] | None, typer.Option("-m", min=1, help="Microbatches; may be repeated. By default 2, 4 and 8.")
    ] = None,
    chunks: Annotated[int, typer.Option("-v", min=2, help="Chunks per rank where a schedule has several.")] = 2,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the whole model; by default one for each chunk of each rank.")
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size; heads have 64.")] = 1024,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a microbatch.")] = 160,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of ours and Megatron's own.")] = 5,
    repeat: Annotated[int, typer.Option(min=1, help="Steps in turns that make a pair; their median counts.")] = 3,
    slices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut sequences of one schedule into this many slices of equal cost; both models get megatron-cp's "
            "attention.",
        ),
    ] = None,
    offload: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep at most this many chunks on a rank, the others on the host, and compare one schedule with "
            "itself without moves.",
        ),
    ] = None,
    overhead: Annotated[bool, typer.Option("--overhead", help="The executor alone, on one rank.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a step over its simulation: .png, .svg, .pdf or .json.")
    ] = None,
) -> None:
    """Compare losses and gradients of schedules with Megatron's own on one GPT, then time them in turns."""
    from megatron_cp.bench.pipeline import GptSize, OffloadPairs, Pairs
    from megatron_cp.megatron.bench import pipeline as megatron_pipeline

    if plot:
        check_suffix(plot)
    _refuse_together(schedule or DEFAULT, slices, offload, overhead, plot)
    if overhead:
        _overhead(megatron_pipeline.overhead(chunks, 4, hidden, seq, rounds * repeat), as_json)
        return
    layers = layers or ranks * chunks
    groups = _groups(schedule or DEFAULT, ranks, chunks, micros or [2, 4, 8], layers)
    groups = [group._replace(slices=slices, offload=offload) for group in groups]
    model = GptSize(ranks, layers, hidden, seq)
    if plot and sum(len(group.names) * len(group.micros) for group in groups) != 1:
        raise ValueError("--plot draws one schedule; give one --schedule and one -m")
    pairs = megatron_pipeline.bench(model, groups, rounds, repeat)
    if as_json:
        typer.echo(json.dumps([pair.row().as_json() for pair in pairs], indent=2))
    else:
        title = f"{ranks} ranks, {layers} layers, h={hidden}, S={seq}, float32; times in ms"
        _show([pair.row() for pair in pairs if isinstance(pair, Pairs)], title)
        _show_offload([pair.row() for pair in pairs if isinstance(pair, OffloadPairs)], title)
    if plot and isinstance(pairs[0], Pairs):
        _plot(pairs[0], plot)


def _refuse_together(
    names: Sequence[str], slices: int | None, offload: int | None, overhead: bool, plot: Path | None
) -> None:
    if slices is None and offload is None:
        return
    asked = f"--slices {slices}" if offload is None else f"--offload {offload}"
    if slices is not None and offload is not None:
        raise Refused(f"--slices {slices} and --offload {offload} are compared with two baselines; leave one out")
    if overhead:
        raise Refused(f"--overhead measures the executor on one rank, got {asked} too; leave one out")
    if len(set(names)) > 1:
        raise Refused(f"{asked} measures one schedule, got {' and '.join(names)}; give one --schedule")
    if plot and offload is not None:
        raise Refused(f"--plot draws a step over its simulation, and {asked} has none; leave one out")
    (name,) = set(names)
    if SCHEDULES.get(name).two_copies:
        raise Refused(f"{asked} takes a schedule of one copy of the model, got {name}; take 1f1b")


def _groups(names: Iterable[str], p: int, v: int, micros: Iterable[int], layers: int) -> "list[ScheduleGroup]":
    """Return the schedules that share chunks; raises ValueError for one without a counterpart in Megatron."""
    from megatron_cp.megatron.bench.pipeline import ScheduleGroup

    groups: dict[int, list[str]] = {}
    for rule in map(SCHEDULES.get, names):
        if rule.lends:
            raise ValueError(f"{rule.name} is 1f1b with moves, whose memory this bench does not see; take 1f1b")
        if rule.delay:
            raise ValueError(f"{rule.name} trains on other weights than Megatron's own schedules; take 1f1b")
        if not (rule.placement == "loop" or rule.two_copies) or rule.table is None:
            raise ValueError(f"{rule.name} has no counterpart among Megatron's own schedules; take one on the loop")
        where = place(rule, p, rule.chunks or v)
        if layers % where.length:
            raise ValueError(f"{layers} layers cannot be divided evenly among {where.length} stages of {rule.name}")
        odd = next((m for m in micros if where.chunks > 1 and m % p), None)
        if odd:
            near = max(p, round(odd / p) * p)
            raise ValueError(
                f"Megatron's interleaved schedule takes m in multiples of p = {p}, got m = {odd}; "
                f"the nearest m that works is {near}"
            )
        groups.setdefault(where.chunks, []).append(rule.name)
    return [ScheduleGroup(chunks, tuple(found), tuple(micros)) for chunks, found in sorted(groups.items())]


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "schedule" else "right")
    return table


def _show_offload(rows: "list[OffloadResult]", title: str) -> None:
    if not rows:
        return
    console, table = Console(width=150), _table(title, OFFLOAD_COLUMNS)
    for row in rows:
        low, high = min(row.ratios), max(row.ratios)
        verdict = [f"{row.ratio:.3f} ({low:.3f}-{high:.3f})", f"{row.beyond:.1%}"] if row.quiet else ["-", "-"]
        sizes = [row.schedule, str(row.v), str(row.micros), str(row.limit), f"{row.moved / 2**20:.1f}"]
        table.add_row(*sizes, f"{row.step:.1f}", f"{row.baseline_step:.1f}", f"{row.copies:.1f}", *verdict)
    console.print(table)
    if not all(row.quiet for row in rows):
        console.print(NO_VERDICT.format(share=min(row.core_share for row in rows)), soft_wrap=True)


def _show(rows: "list[ScheduleResult]", title: str) -> None:
    if not rows:
        return
    console, table = Console(width=150), _table(title, COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    if sliced := next((row for row in rows if row.slices > 1), None):
        console.print(f"sequences of {sliced.schedule} in {sliced.slices} slices, of Megatron's own whole")
    for row in rows:
        times = " ".join(f"{name} {time:.1f}" for name, time in row.times.items())
        console.print(f"{row.schedule}, m = {row.micros}, medians: {times} T_comm {row.T_comm:.2f}", highlight=False)
    if two := [row.schedule for row in rows if SCHEDULES.get(row.schedule).two_copies]:
        names = ", ".join(dict.fromkeys(two))
        console.print(f"{names}: the sums over both copies come after the step and are not in it", highlight=False)
    for line in _against_interleaved(rows):
        console.print(line, highlight=False, soft_wrap=True)
    share = min(row.core_share for row in rows)
    if not all(row.quiet for row in rows):
        console.print(NO_VERDICT.format(share=share), soft_wrap=True)


def _cells(row: "ScheduleResult") -> list[str]:
    peak = " ".join(f"{mine:.3g}/{simulated:.3g}" for mine, simulated in zip(row.peak, row.simulated_peak, strict=True))
    numbers = [row.schedule, str(row.v), str(row.micros), f"{row.step:.1f}", f"{row.simulated:.1f}"]
    if not row.quiet:
        return [*numbers, "-", f"{row.baseline_step:.1f}", "-", "-", peak]
    low, middle, high = (sorted(row.speedups)[place] for place in (0, len(row.speedups) // 2, -1))
    return [
        *numbers,
        f"{row.ratio:.3f}",
        f"{row.baseline_step:.1f}",
        f"{middle:.3f} ({low:.3f}-{high:.3f})",
        f"{row.wins} of {len(row.speedups)}",
        peak,
    ]


def _against_interleaved(rows: "list[ScheduleResult]") -> Iterable[str]:
    """Yield a line on each zb-h1 row: whether its measured times let it beat interleaved with two chunks."""
    for row in rows:
        split = sorted(name[:-1] for name in row.times if name.endswith("I"))
        if row.schedule == "zb-h1" and split and row.slices == 1:
            forward, given, weight = (row.times[f"{split[0]}{kind}"] for kind in "FIW")
            does = "loses" if forward + given > 3 * weight else "does not lose"
            yield (
                f"zb-h1 loses to interleaved with v = 2 whenever T_F + T_I > 3 T_W; here, m = {row.micros}, "
                f"{forward + given:.1f} and {3 * weight:.1f}: it {does}"
            )


def _plot(pairs: "Pairs", file: Path) -> None:
    from megatron_cp.bench.pipeline import middle, recorded
    from megatron_cp.plots.timeline import bars, draw_timeline

    row, run = pairs.row(), pairs.ours.run
    title = f"{row.schedule}, m = {row.micros}: simulated {row.simulated:.0f} ms, measured (below) {row.step:.0f} ms"
    draw_timeline(bars(run), file, title, recorded(middle(pairs.ours.steps)))
    typer.echo(f"timeline: {file}", err=True)


def _overhead(found: "Overhead", as_json: bool) -> None:
    from megatron_cp.bench.processes import QUIET

    if as_json:
        typer.echo(json.dumps(found._asdict() | {"overhead": found.overhead}, indent=2))
        return
    typer.echo(
        f"{found.v} modules on one rank, m = {found.micros}; F {found.forward:.1f} ms, B {found.backward:.1f} ms\n"
        f"executor         {found.ours:.1f} ms\n"
        f"Megatron's loop  {found.baseline:.1f} ms"
    )
    if found.core_share < QUIET:
        typer.echo(NO_VERDICT.format(share=found.core_share))
        return
    typer.echo(
        f"overhead         {found.overhead:.2%} "
        f"({min(found.ratios) - 1:.2%} to {max(found.ratios) - 1:.2%} over {len(found.ratios)} pairs)"
    )
