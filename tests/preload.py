"""What the fork server imports once for all test processes."""

import argparse
import contextlib
import functools
import gc
import importlib
import pkgutil
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text
    import megatron.training  # noqa: F401
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    import megatron_cp
    import megatron_cp.megatron.process.launch

    # what the launchers and their hooks import in their course, but no kernel of Triton's, which a run may interpret
    for folder in ("megatron", "pipeline"):
        for module in pkgutil.walk_packages([f"{megatron_cp.__path__[0]}/{folder}"], f"megatron_cp.{folder}."):
            importlib.import_module(module.name)
    import megatron_cp.kernels.fused
    import megatron_cp.kernels.packages
    import megatron_cp.kernels.torch_sdpa

    # Megatron reads the sources of its settings, for the help of its flags, whenever it makes its parser
    read, any_factory = ArgumentGroupFactory._get_field_docstrings, object.__new__(ArgumentGroupFactory)
    read_once = functools.cache(lambda settings: read(any_factory, settings))
    ArgumentGroupFactory._get_field_docstrings = lambda _, settings: read_once(settings)
    add_megatron_arguments(argparse.ArgumentParser())

# a collection in a forked process would write to, and so copy, each page of what is imported here
gc.collect()
gc.freeze()
