"""Time on the device that computes."""

import time
from typing import Any

import torch


class Clock:
    """Marks in a device's work: CUDA's events, for which the host does not wait, and the host's own clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return a mark behind everything that has been launched."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until the device has done everything that has been launched."""
        if self._on_cuda:
            torch.cuda.synchronize()

    def seconds(self, begun: Any, ended: Any) -> float:
        """Return the time between two marks, both of which the device has passed."""
        return begun.elapsed_time(ended) / 1e3 if self._on_cuda else ended - begun
