"""Summary line of a finished run, machine-readable."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_cp.comm import Fabric, largest
from megatron_cp.megatron.layers.attention import CoreAttention
from megatron_cp.megatron.layers.verify import core_attentions
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.machine.facts import device_of_run


def summary(models: Iterable[nn.Module], steps: int, groups: Sequence[Fabric] = ()) -> dict[str, Any] | None:
    """Return backends, kernels, bytes sent by CP per step and peak memory; None without our attention on this rank.

    Bytes are those of the rank of this CP group that sent most, evaluation included; with `groups`, over whose ranks
    every microbatch forms groups of its own, those of the rank of them that sent most. All these ranks call it.
    """
    cores = [core for _, core in core_attentions(models) if isinstance(core, CoreAttention)]
    if not cores:
        return None
    where = device_of_run()
    sent = sum(core.plan.sent for core in cores) + sum(fabric.sent for fabric in groups)
    ranks = groups[0] if groups else cores[0].plan.cp
    backends = dict.fromkeys(core.plan.backend.name for core in cores if groups or core.plan.cp.size > 1)
    most, resident = largest(ranks, torch.device(where), sent, cpu.peak_resident_bytes())
    return {
        "backend": ", ".join(backends) or "none, one rank holds a sequence",
        "kernel": ", ".join(dict.fromkeys(core.kernel(where)[0].name for core in cores)),
        "cp_bytes_per_step": int(most / max(1, steps)),
        "peak_rss_bytes": int(resident),
    }


def line(models: Iterable[nn.Module], steps: int, groups: Sequence[Fabric] = ()) -> str | None:
    """Return the summary as the line that `megatron-cp train` looks for."""
    found = summary(models, steps, groups)
    return f"summary {json.dumps(found)}" if found else None
