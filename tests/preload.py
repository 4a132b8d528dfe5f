"""What the fork server imports once for all test processes."""

import contextlib
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import megatron.training  # noqa: F401

    # what every door imports
    import megatron_cp.megatron.arguments.context
    import megatron_cp.megatron.process.launch  # noqa: F401
