"""Run all steps, or those named, and write the table: python -m gpu_check [STEP…] with scripts/ on the path."""

import argparse
import sys
from pathlib import Path

from gpu_check.order import STEPS
from gpu_check.steps import import_torch_once, run
from gpu_check.table import Table


def main(words: list[str]) -> int:
    """Run the steps; the exit code is 1 if something is wrong or failed."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="steps to run, by default all")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="by default cuda, where torch finds one")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of gpu_check.md and .json")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    asked = parser.parse_args(words)
    if unknown := {*asked.steps} - {step.name for step in STEPS}:
        parser.error(f"no step {', '.join(sorted(unknown))}; steps: {', '.join(step.name for step in STEPS)}")
    import torch

    from gpu_check import machine

    # counted without starting CUDA, which a forked step could not use afterwards
    device = asked.device or ("cuda" if torch.cuda.device_count() else "cpu")
    table = Table(asked.out, machine.title(device))
    steps = [step for step in STEPS if not asked.steps or step.name in asked.steps]
    import_torch_once()
    run(steps, device, table, 60 * asked.minutes)
    for broken in table.broken:
        print(f"BROKEN {broken}")
    print(f"{len(table.rows)} rows in {asked.out / 'gpu_check.md'}")
    return 1 if table.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
