"""Train as upstream's pretrain_gpt.py does with `--spec`: no hook of ours but the wheel's missing Makefile."""

import sys
from collections.abc import Callable
from typing import Any

from megatron_cp.megatron import cpu, hooks

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0 --micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 1e-2 --lr-decay-style constant "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --split 1,0,0 --eval-iters 0 --eval-interval 100 "
    "--log-interval 1 --seed 7 --no-create-attention-mask-in-dataloader --transformer-impl local --no-rope-fusion "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --use-cpu-initialization "
    "--distributed-backend gloo --no-bias-swiglu-fusion --no-bias-dropout-fusion --num-workers 0 "
    "--calculate-per-token-loss"
)
SPEC = "--spec megatron_cp.megatron.spec gpt_layer_spec"


def train(flags: str, inspect: Callable[[list[Any]], Any] | None = None, hooked: tuple[str, ...] = ()) -> Any:
    """Train with FLAGS and `flags`; what `inspect` says of the built model chunks."""
    sys.argv = ["pretrain_gpt.py", *FLAGS.split(), *flags.split()]
    with cpu.cpu_runtime(), hooks.apply(("dataset-helpers", *hooked)):
        return _train(inspect)


def _train(inspect: Callable[[list[Any]], Any] | None) -> Any:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_cp.megatron.pretrain import datasets, forward_step

    args = parse_and_validate_args()
    config = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    seen: list[Any] = []

    def look(models: list[Any]) -> list[Any]:
        if inspect is not None:
            seen.append(inspect(models))
        return models

    config.post_wrap_hooks.append(look)
    pretrain(pretrain_cfg_container_from_args(args, config), datasets, ModelType.encoder_or_decoder, forward_step)
    return seen[0] if seen else None
