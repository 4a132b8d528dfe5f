"""Train in processes of their own, as a user does, for the times and losses of the steps."""

import subprocess
from collections.abc import Mapping, Sequence

from megatron_cp import config, runlog
from megatron_cp.runlog import Iteration

MILLISECONDS = "elapsed time per iteration (ms)"
"""Megatron's name for the time of a step in its log."""


def trained(words: Sequence[str], environment: Mapping[str, str] | None = None) -> list[Iteration]:
    """Run a training command and return its iterations.

    environment: variables beside those of this process
    Raises RuntimeError with the first error line of a training that fails.
    """
    ran = subprocess.run(
        words,
        env={**config.environment(), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if ran.returncode:
        errors = [line for line in ran.stdout.splitlines() if "Error:" in line or "[megatron-cp] rank" in line]
        raise RuntimeError(f"a training failed: {errors[0] if errors else f'exit status {ran.returncode}'}")
    return [step for line in ran.stdout.splitlines() if (step := runlog.read_iteration(line))]


def step_seconds(steps: Sequence[Iteration]) -> list[float]:
    """Return the seconds of each step."""
    return [step.fields[MILLISECONDS] / 1e3 for step in steps]
