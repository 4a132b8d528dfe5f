"""`megatron-cp bench batches`: groups for every microbatch against one size for all, in real trainings."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp import config
from megatron_cp.batches import ALGORITHMS
from megatron_cp.cli.importing import load
from megatron_cp.cli.options import tokens
from megatron_cp.cli.train import Flags, checked, ready_corpus
from megatron_cp.units import count

if TYPE_CHECKING:
    from megatron_cp.megatron.bench.batches import BatchResult


def batches(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")] = (
        "quickstart"
    ),
    flags: Flags = None,
    plan: Annotated[str, typer.Option(help=f"One of {', '.join(ALGORITHMS.names)}.")] = "balanced",
    cluster: Annotated[
        str, typer.Option(help="This machine as `calibrate` describes it; by default it is measured first.")
    ] = "",
    seq: Annotated[
        int, typer.Option("--seq-length", parser=tokens, metavar="COUNT", help="Tokens to which documents are cut.")
    ] = 4096,
    tokens_per_rank: Annotated[
        int,
        typer.Option("--cp-tokens-per-rank", parser=tokens, metavar="COUNT", help="Most tokens of a rank in a slot."),
    ] = 2048,
    documents: Annotated[str, typer.Option("--global-batch-size", help="Documents of a step.")] = "4",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each plan runs a step's documents, in turns.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are counted, each on documents of its own.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
) -> None:
    """Train with a plan and with `static` step by step in turns; compare the ratio of their times with its prediction.

    Weights do not change, and the losses of the same documents are compared first. Documents longer than
    --cp-tokens-per-rank need groups of several ranks, which `static` forms for all.
    """
    from megatron_cp.megatron.bench.batches import bench

    with TemporaryDirectory() as folder:
        file = cluster or _calibrated(Path(folder, "here.yaml"))
        ours = {
            "--context-parallel-size": "1",
            "--micro-batch-size": "1",
            "--global-batch-size": str(count(documents, "--global-batch-size")),
            "--seq-length": str(seq),
            "--max-position-embeddings": str(seq),
            "--cp-plan": ALGORITHMS.get(plan).name,
            "--cp-tokens-per-rank": str(tokens_per_rank),
            "--cp-cluster": file,
            "--lr-warmup-iters": "0",
            "--eval-iters": "0",
            "--log-interval": "1",
        }
        words = [word for pair in ours.items() for word in pair]
        words += ["--calculate-per-token-loss", "--save=false", "--save-interval=false", *(flags or [])]
        run = checked(load(name, config.environment(), words))
        ready_corpus(run)
        found = bench(run, ALGORITHMS.get(plan).name, rounds, steps, _say)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        _show(found, rounds)


def _say(line: str) -> None:
    typer.echo(f"[megatron-cp] {line}", err=True)


def _calibrated(file: Path) -> str:
    from megatron_cp.bench.calibrate import as_yaml, calibrate
    from megatron_cp.bench.links import measure_links

    _say("measures this machine, as megatron-cp calibrate does")
    file.write_text(as_yaml(measure_links(), calibrate("float32")), encoding="utf-8")
    return str(file)


def _show(found: "BatchResult", rounds: int) -> None:
    from megatron_cp.megatron.bench.batches import BASELINE, degrees_in_words

    console, steps = Console(width=max(100, Console().width), highlight=False), len(found.plan.plans)
    table = Table(title=f"{steps} steps of the same {found.plan.tokens:,} tokens, median of {rounds} rounds in turns")
    for column in ("plan", "tokens/s", "s/step", "predicted", "measured / predicted"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    table.add_column("groups: degree x number")
    for name, times in ((BASELINE, found.baseline), (found.name, found.plan)):
        table.add_row(
            name,
            f"{times.tokens / times.measured:,.0f}",
            f"{times.measured / steps:.4g}",
            f"{times.predicted / steps:.4g}",
            f"{times.measured / times.predicted:.3f}",
            degrees_in_words(times.degrees),
        )
    console.print(table)
    low, high = min(found.by_round), max(found.by_round)
    console.print(
        f"{found.name} over {BASELINE}: measured {found.measured:.3f} ({low:.3f} to {high:.3f} by round), predicted "
        f"{found.predicted:.3f}, measured / predicted {found.measured / found.predicted:.3f}",
        soft_wrap=True,
    )
