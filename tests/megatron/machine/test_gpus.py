"""GPUs of several models in one job are refused on all ranks."""

import pytest
import torch
import torch.distributed as dist

from megatron_cp.errors import Refused
from megatron_cp.megatron import hooks
from megatron_cp.megatron.layers import specs
from megatron_cp.megatron.machine.environment import refuse_mixed_gpus
from tests.ranks import run_ranks

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def refusals(models: list[str]) -> list[str]:
    """What this rank says with these GPUs on the ranks, and with equal ones."""
    dist.init_process_group("gloo")
    said = []
    for held in (models, [H100] * len(models)):
        torch.cuda.get_device_name = lambda device=None, held=held: held[dist.get_rank()]
        try:
            refuse_mixed_gpus()
        except Refused as refusal:
            said.append(str(refusal))
    dist.barrier()
    return said


def test_all_ranks_name_the_models() -> None:
    line = f"all ranks must run on GPUs of one model, got {H100} on rank 0, {H200} on rank 1; use equal GPUs"
    assert run_ranks(3, refusals, [H100, H200, H100]) == [[line]] * 3


@pytest.mark.parametrize(("checks", "vp_stage", "asked"), [(True, None, 1), (True, 0, 1), (True, 1, 0), (False, 0, 0)])
def test_processes_of_our_launcher_ask_once(
    checks: bool, vp_stage: int | None, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(specs, "is_on", lambda hook: checks and hook == hooks.HOOKS.get("checks"))
    monkeypatch.setattr(specs, "refuse_mixed_gpus", lambda: calls.append(None))
    specs._check_gpus(vp_stage)
    assert len(calls) == asked
