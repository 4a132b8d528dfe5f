"""These laws need a CUDA GPU, and are skipped elsewhere; scripts/gpu_check.sh has the chosen cases of a short run."""

import pytest
import torch


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"
