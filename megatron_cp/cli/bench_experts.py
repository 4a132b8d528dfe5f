"""`megatron-cp bench experts`: the products of a rank's experts against experts one by one on this machine."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_cp.registry import unknown


def experts(
    experts: Annotated[int, typer.Option(min=1, help="Experts of a rank.")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Tokens that a rank's experts see, each as often as routed.")] = 4096,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 256,
    ffn: Annotated[int, typer.Option(min=1, help="Width of an expert.")] = 256,
    skew: Annotated[float, typer.Option(min=0, help="Exponent of Zipf's law; 0 for equal loads.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each product, in turns.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
) -> None:
    """Time a rank's gated experts, forward and backward: each product in turns with experts one by one.

    Results are compared first. Experts have loads by Zipf's law, the busiest first.
    """
    import torch

    from megatron_cp.bench.experts import CLOSE, ExpertBench, measure

    if dtype not in CLOSE:
        raise unknown("dtype", dtype, CLOSE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, choice = measure(ExpertBench(experts, rows, hidden, ffn, skew, dtype, rounds), device)
    if as_json:
        times = [{**each._asdict(), "median": each.median} for each in found]
        typer.echo(json.dumps({"auto": choice.name, "why": choice.why, "times": times}, indent=2))
        return
    title = f"{experts} experts, {rows} rows, h = {hidden}, f = {ffn}, Zipf {skew:g}, {dtype} on {device}"
    table = Table(title=f"{title}, forward and backward")
    for column in ("product", "median ms", "fastest", "slowest", f"of {found[0].product}"):
        table.add_column(column, justify="right")
    for each in found:
        cells = [f"{seconds * 1e3:.1f}" for seconds in (each.median, *each.spread)]
        table.add_row(each.product, *cells, f"{each.median / found[0].median:.3f}")
    console = Console()
    console.print(table)
    console.print(f"--moe-grouped-product auto takes {choice}", highlight=False, markup=False)
