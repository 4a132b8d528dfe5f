"""What the fork server imports once for all test processes."""

import contextlib
import gc
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import megatron.training  # noqa: F401

    # what every launcher imports, and what its hooks put in
    import megatron_cp.megatron.arguments.context
    import megatron_cp.megatron.layers.attention
    import megatron_cp.megatron.process.launch
    import megatron_cp.megatron.process.pretrain  # noqa: F401

# a collection in a forked process would write to, and so copy, each page of what is imported here
gc.collect()
gc.freeze()
