"""Train as our own script does, but the last rank fails in the second forward of iteration 3, and says when."""

import sys
import time
import traceback

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_cp.megatron.process import pretrain
from megatron_cp.megatron.process.launch import launched
from tests.megatron.pretraining import start_from_names


def fail_in_iteration_3():
    calls = []

    def failing(old):
        def forward_step(*args, **kwargs):
            from megatron.training import get_args

            # the iterations before this one
            if get_args().curr_iteration == 2:
                calls.append(args)
            if len(calls) == 2 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                print(f"\nfails at {time.monotonic()} s", flush=True)
                raise ZeroDivisionError("on purpose")
            return old(*args, **kwargs)

        return forward_step

    schedules.forward_step = failing(schedules.forward_step)


def train(flags):
    """Train with these flags until the failure, and print what each rank then says."""
    fail_in_iteration_3()
    sys.argv = ["pretrain_gpt", *flags]
    try:
        with launched(flags):
            pretrain.run(prepare=start_from_names)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise
