"""Train in a patched tree of Megatron: the CPU runtime and no hook, what the call sites do is all there is.

Prints, from rank 0, one line of JSON: where Megatron lies, the hooks in force, and each iteration's loss.
"""

import json
from pathlib import Path

import megatron.core

from megatron_cp.config import variable
from megatron_cp.megatron.hooks import HOOKS, is_on
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.process import pretrain
from megatron_cp.megatron.process.ending import ended_together
from tests.megatron.pretraining import from_the_rank_with_losses, losses_of_each_iteration, start_from_names


def main() -> None:
    # the record of losses stands in front of a step that is patched
    in_force = [hook.name for hook in HOOKS if is_on(hook)]
    with cpu.cpu_runtime(), losses_of_each_iteration() as log:
        pretrain.run(prepare=start_from_names)
        losses = from_the_rank_with_losses(log)
    if variable("RANK") == "0":
        tree = Path(megatron.core.__file__).parents[2]
        print("\n" + json.dumps({"tree": str(tree), "hooks": in_force, "losses": losses}), flush=True)


if __name__ == "__main__":
    with ended_together():
        main()
