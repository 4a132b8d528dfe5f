"""Pretrain through the real `megatron.training.pretrain` on this rank, for tests that compare runs of several ranks.

`run_ranks(world_size, pretrain_losses, flags)` runs our own script in each rank under the CPU runtime and returns, from
every rank, the same list of iterations with unrounded losses. Weights may be made equal across topologies: each
parameter is then drawn from the hash of its name in the whole model, and a rank takes its part of it.
"""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_cp.megatron.process import launch
from megatron_cp.megatron.process.launch import launched
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.recipe import recipe
from megatron_cp.recipe.command import flag_words
from megatron_cp.recipe.file import Unset

SCRIPT = os.path.join(os.path.dirname(__file__), "pretrain_script.py")

# Ranks of every topology pad the vocabulary to the same size, so that losses can be equal.
MODEL = """
--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
--attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 16
"""
TRAINING = """
--mock-data --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 --min-lr 1e-4
--eval-interval 1000 --eval-iters 0 --log-interval 1 --seed 7
"""


def tiny(*flags: str, without: str = "") -> list[str]:
    """The flags of a small LLaMA on mock data and four iterations of training, then `flags`, which win.

    without: flags of it that take no value, to be left out
    """
    ours = [word for word in [*MODEL.split(), *TRAINING.split()] if word not in without.split()]
    return [*ours, *(word for text in flags for word in text.split())]


def preset(name: str) -> str:
    """The flags of a shipped file of configs/training."""
    return " ".join(flag_words(recipe.load(f"training/{name}", Unset({})).model_args))


def pretrain_losses(flags: list[str], named_weights: bool = True) -> list[dict[str, Any]]:
    """Train with these flags; per iteration `iteration`, `loss` (mean over the global batch), `grad_norm`, `skipped`.

    With `named_weights` every topology starts from the same model, unless a checkpoint is loaded. Raises SystemExit
    with one line for a command line that is refused.
    """
    from megatron_cp.megatron.process import pretrain

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags), losses_of_each_iteration() as log:
        pretrain.run(prepare=start_from_names if named_weights else None)
        return from_the_rank_with_losses(log)


def trained(flags: list[str]) -> tuple[list[dict[str, Any]], list[tuple[str, torch.Tensor]]]:
    """The same, from named weights: this rank's own log, and pairs of global name and value of its parameters."""
    from megatron_cp.megatron.process import pretrain

    built: list[torch.nn.Module] = []

    def prepare(config: Any) -> None:
        start_from_names(config)
        config.pre_wrap_hooks.append(lambda models: built.extend(models) or models)

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags), losses_of_each_iteration() as log:
        pretrain.run(prepare=prepare)
    return log, [(name, weight.detach().clone()) for chunk in built for name, weight in global_names(chunk)]


def script_losses(flags: list[str], named_weights: bool = False) -> list[dict[str, Any]]:
    """Train an unmodified script of upstream's kind through the launcher, from Megatron's own initial weights.

    With `named_weights` every topology starts from the same model.
    """
    sys.argv = ["launch", SCRIPT, *flags]
    with contextlib.ExitStack() as undo:
        if named_weights:
            target = "megatron.training.argument_utils:gpt_config_from_args"
            undo.callback(restore, replace(target, lambda old: lambda args: _started_from_names(old(args))))
        log = undo.enter_context(losses_of_each_iteration())
        launch.main()
        return from_the_rank_with_losses(log)


def _started_from_names(config: Any) -> Any:
    start_from_names(config)
    return config


def one_gather_at_a_time() -> None:
    """Let each gather of Megatron-FSDP end before the next line runs.

    Its gathers in the background rely on the order of a device's streams: over gloo one run in a hundred ended in
    "malloc(): unaligned tcache chunk detected".
    """
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer

    together = param_and_grad_buffer._coalescing_manager
    param_and_grad_buffer._coalescing_manager = lambda group, async_ops=False: together(group)


@contextlib.contextmanager
def losses_of_each_iteration() -> Iterator[list[dict[str, Any]]]:
    """A list that fills with one entry per training step taken inside the context."""
    log: list[dict[str, Any]] = []
    recorded = replace("megatron.training.training:train_step", lambda old: _recording(old, log))
    try:
        yield log
    finally:
        restore(recorded)


def _recording(train_step: Any, log: list[dict[str, Any]]) -> Any:
    from megatron.training import get_args

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        losses, skipped, *_, grad_norm, _, _ = result
        log.append(
            {
                "iteration": get_args().curr_iteration + 1,
                "loss": float(losses["lm loss"]) if losses else None,
                # without clipping Megatron computes none
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "skipped": skipped,
            }
        )
        return result

    return recorded


def noting(evaluate: Any, found: list[dict[str, float]]) -> Any:
    """Megatron's evaluate, which adds the losses of each evaluation to the list."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        found.append({name: float(loss) for name, loss in result[0].items()})
        return result

    return noted


def from_the_rank_with_losses(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    logs: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(logs, log)
    # the last pipeline stage knows the loss
    return next((found for found in logs if found and found[0]["loss"] is not None), log)


def start_from_names(config: Any) -> None:
    config.pre_wrap_hooks.append(weights_from_names)


def weights_from_names(models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Set every parameter to this rank's part of what its name in the whole model draws; a pre-wrap hook."""
    for model in models:
        for name, parameter in global_names(model):
            layer: Any = dict(model.named_modules()).get(name.removesuffix(".weight"))
            with torch.no_grad():
                if hasattr(layer, "vocabulary"):
                    # some rows on each rank of the pipeline
                    whole = _drawn(name, [layer.vocabulary, parameter.shape[1]])
                    parameter.copy_(whole[layer.first : layer.first + len(parameter)])
                else:
                    parameter.copy_(_part(name, parameter, model.config))  # type: ignore[arg-type]
    return models


def global_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This chunk's parameters with the layer's number in the whole model and the expert's in the whole layer."""
    numbers = {name: module.layer_number - 1 for name, module in model.named_modules() if _is_layer(name, module)}
    experts = {
        name: module.num_local_experts for name, module in model.named_modules() if hasattr(module, "num_local_experts")
    }
    for name, parameter in model.named_parameters():
        local = experts.get(name.partition(".local_experts")[0])
        layer = re.match(r"decoder\.layers\.\d+", name)
        if layer:
            name = f"decoder.layers.{numbers[layer[0]]}{name.removeprefix(layer[0])}"
        if getattr(model, "share_embeddings_and_output_weights", False) and name == "output_layer.weight":
            # the last stage's copy of a tied embedding
            name = "embedding.word_embeddings.weight"
        yield re.sub(r"(?<=local_experts\.)\d+", _global_expert(local), name), parameter


def _is_layer(name: str, module: Any) -> bool:
    return re.fullmatch(r"decoder\.layers\.\d+", name) is not None and hasattr(module, "layer_number")


def _global_expert(local: Any) -> Any:
    from megatron.core import parallel_state

    if local is None:
        return lambda match: match[0]
    first = local * parallel_state.get_expert_model_parallel_rank()
    return lambda match: str(first + int(match[0]))


def _part(name: str, parameter: torch.nn.Parameter, config: Any) -> torch.Tensor:
    if cube := getattr(parameter, "cube_cut", None):
        rows, columns = parameter.shape
        return cube.part_of(_drawn(name, [rows * cube.rows, columns * cube.columns]))
    size, rank = _tensor_parallel(name, parameter)
    shape = list(parameter.shape)
    if size > 1:
        shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
    whole = _drawn(name, shape)
    if size == 1:
        return whole
    # a gated fc1 holds its part of the gate above its part of the values
    halves = whole.chunk(2) if "linear_fc1" in name and config.gated_linear_unit else (whole,)
    return torch.cat([half.chunk(size, dim=parameter.partition_dim)[rank] for half in halves])  # type: ignore[attr-defined]


def _tensor_parallel(name: str, parameter: torch.nn.Parameter) -> tuple[int, int]:
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return 1, 0
    if "experts" in name and "shared" not in name:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _drawn(name: str, shape: list[int]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()
    if len(shape) > 1:
        return values / shape[-1] ** 0.5
    # a norm's weight is near one, a bias near zero
    return 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
