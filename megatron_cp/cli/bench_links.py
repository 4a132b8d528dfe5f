"""`megatron-cp bench links`: describe this machine as a cluster for `trace`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def links(
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    write: Annotated[Path | None, typer.Option(help="Write the description to this YAML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of YAML.")] = False,
) -> None:
    """Measure links, memory and attention kernel of this machine between two processes."""
    from megatron_cp.bench.comparison import DTYPES
    from megatron_cp.bench.links import measure_links
    from megatron_cp.registry import unknown

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    measured = measure_links(dtype)
    if write:
        write.write_text(measured.as_yaml(), encoding="utf-8")
    typer.echo(json.dumps(asdict(measured), indent=2) if as_json else measured.as_yaml(), nl=as_json)
