"""The names of Megatron that we rebind, in one table, and what it takes to rebind them safely.

Everything that the layer spec, the model config or the config object can do is done there; a hook is the last resort.
A hook states every binding that it replaces, why, which parameters of the replaced function it relies on, and which
change upstream would make it superfluous. Applying is idempotent and reversible, and fails closed: a hook that was
asked for and does not fit the installed Megatron is an error, never a warning. Wrappers take any arguments.
"""

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_cp.errors import CannotRun
from megatron_cp.megatron.rebind import Replaced, find, replace, restore_all
from megatron_cp.registry import Registry

SUPPORTED = "0.19."
FOR_V = ("v-stages", "v-data", "v-tied-embeddings")
"""Hooks that placing stages on the V takes; they are in force with such a schedule only."""
_MARK = "megatron_cp_hook"


@dataclass(frozen=True)
class Hook:
    """One change to Megatron.

    targets:    the bindings that are replaced, `module:path.to.attribute`
    by:         the function of ours, as a name of the same form: it is called as `by(old, *args, **kwargs)`
    parameters: parameters of the replaced function that `by` relies on
    reason:     why Megatron cannot be asked for it in another way
    retired_by: the change upstream that would make the hook superfluous
    makes:      `by(old)` makes what is bound, once, when the hook is installed
    """

    name: str
    targets: tuple[str, ...]
    by: str
    parameters: tuple[str, ...]
    reason: str
    retired_by: str
    makes: bool = False
    aliases: tuple[str, ...] = ()

    def replacement(self, old: Any) -> Any:
        """What is bound instead of `old`.

        A function of ours is imported at its first call: a patched Megatron asks for it while it is being imported.
        """
        if self.makes:
            return find(self.by).value(old)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            return find(self.by).value(old, *args, **kwargs)

        return replaced


HOOKS = Registry(
    "hook",
    [
        Hook(
            "dataset-helpers",
            ("megatron.core.datasets.utils:compile_helpers",),
            "megatron_cp.megatron.dataset:compile_helpers",
            (),
            "the wheel has the compiled dataset helpers but no Makefile, and rank 0 exits when make fails",
            "compile_helpers that returns when helpers_cpp imports, or a Makefile in the wheel",
        ),
        Hook(
            "flags",
            ("megatron.training.arguments:add_megatron_arguments",),
            "megatron_cp.megatron.arguments.checks:add_megatron_arguments",
            ("parser",),
            "an unmodified script has no place for our flags, and they belong in --help and the arguments' dump",
            "an entry point for argument providers",
        ),
        Hook(
            "checks",
            ("megatron.training.arguments:validate_args",),
            "megatron_cp.megatron.arguments.checks:validate_args",
            ("args",),
            "our layer spec is chosen and our checks run, on every rank, before Megatron's own checks",
            "an entry point for argument providers",
        ),
        Hook(
            "mtp-layers",
            ("megatron.training.models.gpt:mtp_block_spec",),
            "megatron_cp.megatron.layers.specs:mtp_layers",
            ("config", "transformer_layer_spec", "vp_stage"),
            "--spec does not reach the layers of multi-token prediction, which would keep stock attention",
            "mtp_block_spec that builds on the layer spec it is given",
        ),
        Hook(
            "schedule",
            (
                "megatron.training.training:get_forward_backward_func",
                "megatron.core.pipeline_parallel:get_forward_backward_func",
            ),
            "megatron_cp.megatron.pipeline.lookup:forward_backward",
            (),
            "the pipeline schedule is looked up by name, twice, and cannot be passed in",
            "a schedule argument of pretrain()",
            makes=True,
        ),
        Hook(
            "weight-queue",
            ("megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",),
            "megatron_cp.megatron.pipeline.split_linear:SplitLinear",
            (),
            "a schedule with input and weight gradients apart needs linears whose backward can stop half-way",
            "backward_dw of Column- and RowParallelLinear that does what transformer-engine's does",
            makes=True,
        ),
        Hook(
            "v-stages",
            ("megatron.training.models.dist_utils:build_virtual_pipeline_stages",),
            "megatron_cp.megatron.pipeline.v_placement:build_stages",
            ("build_model_func", "pg_collection", "vp_size"),
            "layers, embedding and head of a chunk are decided from its rank along the loop",
            "process groups that a model builder may choose for every chunk",
        ),
        Hook(
            "v-data",
            ("megatron.training.training:build_train_valid_test_data_iterators",),
            "megatron_cp.megatron.pipeline.v_placement:feed_stages",
            ("build_train_valid_test_datasets_provider",),
            "the chunks that read data are found from their rank along the loop",
            "a data provider that is told whether its chunk is the first or the last stage",
        ),
        Hook(
            "v-tied-embeddings",
            ("megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",),
            "megatron_cp.megatron.pipeline.v_placement:add_tied_gradients",
            ("model",),
            "the two copies of a tied embedding are expected on two ranks, and on the V they are on one",
            "a sum over the copies of this rank before those of the embedding group are reduced",
        ),
        Hook(
            "delayed-weights",
            ("megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",),
            "megatron_cp.megatron.pipeline.te_weight_gradients:delay_weights",
            ("self",),
            "linears of transformer-engine delay weight gradients only with overlap of expert-parallel communication",
            "a delay_wgrad_compute that any pipeline schedule may use",
        ),
        Hook(
            "overwrite",
            ("megatron.core.dist_checkpointing:save",),
            "megatron_cp.megatron.checkpoint.overwrite:save",
            ("sharded_state_dict", "checkpoint_dir"),
            "an interrupted save over an older checkpoint of the same iteration leaves the old index over mixed files",
            "a save that removes the index of what it writes over",
        ),
        Hook(
            "optimizer-save",
            ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",),
            "megatron_cp.megatron.checkpoint.resume:state_dict",
            ("self",),
            "torch's AdamW has no step count before its first step, and loading a checkpoint asks for one",
            "a state_dict of DistributedOptimizer that takes a fresh optimizer of torch's",
        ),
        Hook(
            "optimizer-load",
            ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",),
            "megatron_cp.megatron.checkpoint.resume:load_state_dict",
            ("self", "state_dict"),
            "all parameters of torch's AdamW get one step tensor, which each advances, and training goes on wrongly",
            "a load_state_dict of DistributedOptimizer that gives every parameter a step tensor of its own",
        ),
        Hook(
            "optimizer-copy",
            ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",),
            "megatron_cp.megatron.checkpoint.resume:set_states",
            ("self", "model_param", "tensors"),
            "a checkpoint has no step count per parameter, and fp32 parameters refuse to be written under autograd",
            "a copy of DistributedOptimizer that leaves out `step`, without autograd",
        ),
    ],
)


def probe(hook: Hook) -> str:
    """Why the hook cannot be applied to the installed Megatron, or an empty string."""
    import megatron.core

    if not megatron.core.__version__.startswith(SUPPORTED):
        return f"megatron-core {megatron.core.__version__} is not {SUPPORTED}x"
    try:
        found = [find(target).value for target in hook.targets]
    except RuntimeError as error:
        return str(error)
    if any(value is not found[0] for value in found):
        return f"{' and '.join(hook.targets)} are not the same function"
    if is_on(hook):
        return ""
    missing = [name for name in hook.parameters if name not in inspect.signature(found[0]).parameters]
    return f"{hook.targets[0]} has no parameter {', '.join(missing)}" if missing else ""


def is_on(hook: Hook) -> bool:
    """Whether the hook is in force."""
    return all(getattr(find(target).value, _MARK, None) == hook.name for target in hook.targets)


class Applied:
    """Hooks in force; leaving the context, or `revert`, puts back what was there before."""

    def __init__(self, names: tuple[str, ...], done: list[Replaced]) -> None:
        self.names = names
        self._done = done

    def revert(self) -> None:
        restore_all(self._done)

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()


def apply(names: Iterable[str]) -> Applied:
    """Put the named hooks in force; those that are already stay as they are, and `revert` leaves them alone.

    Raises ValueError for a name that is not in the table and RuntimeError, with nothing changed, when one of them does
    not fit the installed Megatron.
    """
    wanted = [hook for hook in map(HOOKS.get, dict.fromkeys(names)) if not is_on(hook)]
    for hook in wanted:
        if reason := probe(hook):
            raise CannotRun(f"hook {hook.name!r} does not fit: {reason}; use megatron-core {SUPPORTED}x")
    applied = Applied(tuple(hook.name for hook in wanted), [])
    for hook in wanted:
        _bind(hook, applied._done)
    return applied


def _bind(hook: Hook, done: list[Replaced]) -> None:
    new = _made(hook, find(hook.targets[0]).value)
    for target in hook.targets:
        done.append(replace(target, lambda _: new))


def _made(hook: Hook, old: Any) -> Any:
    # an attribute that a hook hung on `old` is not one of `new`
    new = functools.wraps(old, updated=())(hook.replacement(old))
    setattr(new, _MARK, hook.name)
    return new


def patched(name: str) -> Callable[[Any], Any]:
    """The named hook as a decorator: what the call sites in patches/ put over Megatron's own definitions."""
    return functools.partial(_made, HOOKS.get(name))


def dataset_helpers_need_no_make() -> bool:
    """Whether the compiled dataset helpers are installed without the Makefile that Megatron always runs."""
    helpers = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if helpers is None or helpers.origin is None:
        return False
    return not os.path.exists(os.path.join(os.path.dirname(helpers.origin), "Makefile"))


def resumes_with_torch_adam() -> bool:
    """Whether neither Apex nor transformer-engine brings a fused Adam."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE
