"""State in files steps as state in memory does, to every bit, whatever the pieces, and takes no memory of its own."""

import copy
import ctypes
import errno
import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cp.replicas import on_disk
from megatron_cp.replicas.on_disk import MOMENTS, StateFile, StateOnDisk

SIZES = (7, 3001, 0, 512, 10000)
ELEMENTS = sum(SIZES)


class FusedAdam(torch.optim.Optimizer):
    """Counts steps with groups that have parameters, as the fused ones do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for each in group["params"]:
                if each.grad is None:
                    continue
                first, second = (self.state[each].setdefault(name, torch.zeros_like(each)) for name in MOMENTS)
                first.lerp_(each.grad, 0.1)
                second.mul_(0.9).addcmul_(each.grad, each.grad, value=0.1)
                each.data.addcdiv_(first, second.sqrt().add_(1e-8), value=-0.01 / group["step"])


def stepped(kind: Any, **state: Any) -> tuple[list[Tensor], torch.optim.Optimizer, StateOnDisk | None]:
    """Step five times, and load the state of the third anew; one parameter has no gradient at first."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(size, generator=generator).requires_grad_() for size in SIZES]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}, {"params": []}]
    optimizer = kind(groups, **({"lr": 1e-2} if kind is not FusedAdam else {"defaults": {"weight_decay": 0.1}}))
    disk = StateOnDisk(optimizer, **state, weights=parameters[1:]) if state else None
    for step in range(5):
        for number, each in enumerate(parameters):
            drawn = torch.randn(each.shape, generator=generator)
            each.grad = None if step == 0 and number == 3 and kind is not FusedAdam else drawn
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return parameters, optimizer, disk


@pytest.mark.parametrize(
    ("kind", "piece", "device"),
    [
        pytest.param(torch.optim.AdamW, 1000, "host", id="adamw-14-host"),
        pytest.param(torch.optim.AdamW, 1 << 20, "another", id="adamw-1-another"),
        pytest.param(FusedAdam, 999, "another", id="fused-14-another"),
    ],
)
def test_a_step_by_pieces_is_the_optimizers_own(
    kind: Any, piece: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, in_memory, _ = stepped(kind)
    if device == "another":
        # what is moved to another device is a copy of what is in the file
        monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    parameters, optimizer, disk = stepped(kind, directory=str(tmp_path), piece=piece)
    assert disk is not None
    assert len(disk.pieces) == -(-ELEMENTS // piece)
    assert disk.bytes == 8 * ELEMENTS + 4 * (ELEMENTS - SIZES[0])
    for each, other in zip(parameters, plain, strict=True):
        assert torch.equal(each, other)
        assert optimizer.state[each].keys() == in_memory.state[other].keys()
        assert all(torch.equal(optimizer.state[each][name], value) for name, value in in_memory.state[other].items())
    for group, other_group in zip(optimizer.param_groups, in_memory.param_groups, strict=True):
        assert group.get("step") == other_group.get("step")


def anonymous() -> int:
    """Return this process's resident bytes that are of no file."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kilobytes = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    return 1024 * int(kilobytes[1])


def test_moments_in_files_are_no_memory_of_the_process(tmp_path: Path) -> None:
    # twice: what torch keeps of its first step is there already
    weight = torch.zeros(1 << 21)
    weight.grad = torch.ones_like(weight)
    found = {}
    for where in ("files", "memory", "files"):
        optimizer = torch.optim.AdamW([weight])
        disk = StateOnDisk(optimizer, str(tmp_path), piece=1 << 18) if where == "files" else None
        before = anonymous()
        optimizer.step()
        found[where] = anonymous() - before
        del optimizer, disk
    assert found["memory"] - found["files"] == pytest.approx(8 * len(weight), rel=0.1)


def test_files_have_no_names_and_their_place_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros(1000)
    file = StateFile(str(tmp_path), [numbers])
    assert not list(tmp_path.iterdir())
    file.of(numbers).fill_(1)
    file.read_ahead([on_disk.StatePart(0, numbers, slice(10, 20)), on_disk.StatePart(0, torch.zeros(1), slice(0, 1))])
    assert file.bytes == 4000

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        StateFile(str(tmp_path), [numbers])
    assert not list(tmp_path.iterdir())


def test_parameters_of_a_file_take_gradients_of_a_device(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    disk = StateOnDisk(torch.optim.AdamW([weight]), str(tmp_path), weights=[weight])
    with disk.weights_on(torch.device("cpu")):
        assert weight.shape == (6,)
        assert weight.untyped_storage().nbytes() == 4
        weight.grad = torch.ones(6)
    assert torch.equal(weight, torch.arange(6.0))
    assert weight.grad is not None
