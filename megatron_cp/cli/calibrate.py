"""`megatron-cp calibrate`: measure this machine as a cluster description for `estimate`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megatron_cp.dtypes import TRAINING
from megatron_cp.registry import unknown


def calibrate(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    write: Annotated[Path | None, typer.Option(help="Write the description to this YAML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of YAML.")] = False,
) -> None:
    """Measure products by size, attention, norms, loss, copies, messages and collectives between two processes.

    Then two tiny models are trained, for the memory of a process and the time of a step beside its tensors. All of it
    takes a minute or two; stop other programs on this machine.
    """
    if dtype not in TRAINING:
        raise unknown("dtype", dtype, TRAINING)
    from megatron_cp.bench.calibrate import as_yaml
    from megatron_cp.bench.calibrate import calibrate as rates_of
    from megatron_cp.bench.links import measure_links

    links, rates = measure_links(dtype), rates_of(dtype)
    text = as_yaml(links, rates)
    if write:
        write.write_text(text, encoding="utf-8")
    typer.echo(json.dumps({**asdict(links), **rates._asdict()}, indent=2) if as_json else text, nl=as_json)
