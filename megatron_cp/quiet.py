"""Importing Megatron without a page of warnings about optional packages and an absent GPU.

`megatron-cp doctor` tells of them instead.
"""

import logging
import warnings

ABOUT_OPTIONAL_PACKAGES = r"(Transformer Engine|Apex|absl\.logging|Only transformer-engine|The 'megatron.core)"


def without_import_warnings() -> None:
    """Ignore these warnings from now on in this process."""
    warnings.filterwarnings("ignore", message=ABOUT_OPTIONAL_PACKAGES, category=UserWarning)
    # torch warns of a missing CUDA runtime where it finds its compiler
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
