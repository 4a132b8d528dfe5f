"""Importing Megatron without a page of warnings about optional packages; `megatron-cp doctor` tells of them instead."""

import warnings

ABOUT_OPTIONAL_PACKAGES = r"(Transformer Engine|Apex|absl\.logging|Only transformer-engine|The 'megatron.core)"


def without_import_warnings() -> None:
    """Ignore these warnings from now on in this process."""
    warnings.filterwarnings("ignore", message=ABOUT_OPTIONAL_PACKAGES, category=UserWarning)
