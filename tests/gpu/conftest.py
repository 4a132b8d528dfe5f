"""These laws need a CUDA GPU; `scripts/gpu_check.sh` runs them where there is one."""

import pytest
import torch


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"
