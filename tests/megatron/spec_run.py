"""Train as upstream's pretrain_gpt.py does with `--spec`: no hook of ours but the wheel's missing Makefile."""

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from megatron_cp.megatron import hooks
from megatron_cp.megatron.machine import cpu
from tests.megatron.pretraining import tiny, weights_from_names

# what an unmodified script must be told on a machine without GPU, Apex and TransformerEngine
PLAIN = (
    "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --use-cpu-initialization --distributed-backend gloo --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --num-workers 0"
)


def train(
    flags: str,
    inspect: Callable[[list[Any]], Any] | None = None,
    name: str = "gpt_layer_spec",
    hooked: tuple[str, ...] = (),
    without: str = "",
    entry: str = "megatron_cp.megatron.process.pretrain:datasets",
) -> Any:
    """Train the tiny model with `flags` through our spec called `name`; what `inspect` says of the built model.

    without: flags of the tiny model that take no value, to be left out
    entry: the provider of datasets, in the module of the `forward_step`
    """
    spec = f"--spec megatron_cp.megatron.spec {name}"
    sys.argv = ["pretrain_gpt.py", *tiny(PLAIN, spec, flags, without=without)]
    with cpu.cpu_runtime(), hooks.apply(("dataset-helpers", *hooked)):
        return _train(inspect, *entry.split(":"))


def _train(inspect: Callable[[list[Any]], Any] | None, module: str, provider: str) -> Any:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    entry = importlib.import_module(module)
    args = parse_and_validate_args()
    config = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    seen: list[Any] = []

    def look(models: list[Any]) -> list[Any]:
        seen.extend([inspect(models)] if inspect else [])
        return models

    config.pre_wrap_hooks.append(weights_from_names)
    config.post_wrap_hooks.append(look)
    container = pretrain_cfg_container_from_args(args, config)
    pretrain(container, getattr(entry, provider), ModelType.encoder_or_decoder, entry.forward_step)
    return seen[0] if seen else None


def losses(log: str) -> list[float]:
    """The printed loss of each iteration, seven digits."""
    return [float(text) for text in re.findall(r"lm loss: (\S+)", log)]


def grad_norms(log: str) -> list[float]:
    """The printed gradient norm of each iteration, four digits."""
    return [float(text) for text in re.findall(r"grad norm: (\S+)", log)]
