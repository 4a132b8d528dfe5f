"""The names of Megatron that we rebind, in one table, and what it takes to rebind them safely.

Everything that the layer spec, the model config or the config object can do is done there; a hook is the last resort.
A hook states every binding that it replaces, why, which parameters of the replaced function it relies on, and which
change upstream would make it superfluous. Applying is idempotent and reversible, and fails closed: a hook that was
asked for and does not fit the installed Megatron is an error, never a warning. Wrappers take any arguments.
"""

import functools
import importlib.util
import inspect
import linecache
import os
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_cp.megatron.rebind import Replaced, find, replace, restore_all
from megatron_cp.registry import Registry, suggest

SUPPORTED = "0.19."
FOR_V = ("v-stages", "v-data", "v-tied-embeddings")
"""Hooks that placing stages on the V takes; they are in force with such a schedule only."""
_MARK = "megatron_cp_hook"


class BadArguments(ValueError):
    """The command line asks for something that Megatron or we refuse; the text is one line."""


@dataclass(frozen=True)
class Hook:
    """One change to Megatron: `make(old)` gives what is bound to each of `targets` instead."""

    name: str
    targets: tuple[str, ...]
    make: Callable[[Any], Any]
    parameters: tuple[str, ...]
    reason: str
    retired_by: str
    aliases: tuple[str, ...] = ()


def _without_compiling(old: Callable[..., Any]) -> Callable[..., Any]:
    def compile_helpers(*args: Any, **kwargs: Any) -> None:
        if not dataset_helpers_need_no_make():
            old(*args, **kwargs)

    return compile_helpers


def _with_our_flags(old: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.arguments import add_arguments

        parser = old(*args, **kwargs)
        add_arguments(parser)
        _mend_help(parser)
        parser.error = functools.partial(_refuse_words, parser)
        return parser

    return add_megatron_arguments


def _mend_help(parser: Any) -> None:
    # one of Megatron's help texts ends in a bare per cent sign, which makes --help fail
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)


def _refuse_words(parser: Any, message: str) -> None:
    unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    hint = suggest(unknown[0], parser._option_string_actions) if "unrecognized" in message and unknown else ""
    raise BadArguments(message + hint)


def _with_our_checks(old: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.arguments import check
        from megatron_cp.megatron.launch import check_inputs, complete, has_our_layers
        from megatron_cp.megatron.schedule_arguments import check_schedule, check_table

        try:
            complete(args)
            # before Megatron's checks, for ours say more than a bare assertion
            if has_our_layers(args):
                check(args)
            check_schedule(args)
            result = old(args, *rest, **kwargs)
            check_table(args)
            check_inputs(args)
        except (ValueError, AssertionError) as error:
            raise BadArguments(one_line(error)) from error
        return result

    return validate_args


def _with_our_mtp(old: Callable[..., Any]) -> Callable[..., Any]:
    def mtp_block_spec(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.launch import has_our_layers
        from megatron_cp.megatron.layers import global_args, mtp_block_spec

        flags = global_args()
        ours = flags is not None and has_our_layers(flags)
        return (mtp_block_spec if ours else old)(*args, **kwargs)

    return mtp_block_spec


def _with_our_schedule(old: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def pipeline(name: str) -> Any:
        from megatron_cp.megatron.schedule import Pipeline

        return Pipeline(name)

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.schedule import name_in_force

        name = name_in_force(*args, **kwargs)
        return pipeline(name) if name else old(*args, **kwargs)

    return get_forward_backward_func


def _on_v(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook that gives the old function to one of `placement`'s."""

    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        def placed(*args: Any, **kwargs: Any) -> Any:
            from megatron_cp.megatron import placement

            return getattr(placement, name)(old, *args, **kwargs)

        return placed

    return make


def _with_weight_queue(old: Any) -> Any:
    from megatron_cp.megatron.linear import SplitLinear

    return SplitLinear(old)


def _with_delayed_weights(old: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(*args: Any, **kwargs: Any) -> None:
        from megatron_cp.megatron.delayed import delay_weights

        delay_weights(old, *args, **kwargs)

    return __post_init__


def _without_old_index(old: Callable[..., Any]) -> Callable[..., Any]:
    def save(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron import overwrite

        return overwrite.save(old, *args, **kwargs)

    return save


def _with_first_step(old: Callable[..., Any]) -> Callable[..., Any]:
    def state_dict(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.resume import state_dict as ours

        return ours(old, *args, **kwargs)

    return state_dict


def _with_own_steps(old: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.resume import load_state_dict as ours

        return ours(old, *args, **kwargs)

    return load_state_dict


def _without_steps(old: Callable[..., Any]) -> Callable[..., Any]:
    def _set_main_param_and_optimizer_states(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.resume import set_states

        return set_states(old, *args, **kwargs)

    return _set_main_param_and_optimizer_states


HOOKS = Registry(
    "hook",
    [
        Hook(
            "dataset-helpers",
            ("megatron.core.datasets.utils:compile_helpers",),
            _without_compiling,
            (),
            "the wheel has the compiled dataset helpers but no Makefile, and rank 0 exits when make fails",
            "compile_helpers that returns when helpers_cpp imports, or a Makefile in the wheel",
        ),
        Hook(
            "flags",
            ("megatron.training.arguments:add_megatron_arguments",),
            _with_our_flags,
            ("parser",),
            "an unmodified script has no place for our flags, and they belong into --help and the arguments' dump",
            "an entry point for argument providers",
        ),
        Hook(
            "checks",
            ("megatron.training.arguments:validate_args",),
            _with_our_checks,
            ("args",),
            "our layer spec is chosen and our refusals are spoken, on every rank, before Megatron's own checks",
            "an entry point for argument providers",
        ),
        Hook(
            "mtp-layers",
            ("megatron.training.models.gpt:mtp_block_spec",),
            _with_our_mtp,
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
            _with_our_schedule,
            (),
            "the pipeline schedule is looked up by name, twice, and cannot be passed in",
            "a schedule argument of pretrain()",
        ),
        Hook(
            "weight-queue",
            ("megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",),
            _with_weight_queue,
            (),
            "a schedule with input and weight gradients apart needs linears whose backward can stop half-way",
            "backward_dw of Column- and RowParallelLinear that does what transformer-engine's does",
        ),
        Hook(
            "v-stages",
            ("megatron.training.models.dist_utils:build_virtual_pipeline_stages",),
            _on_v("build_stages"),
            ("build_model_func", "pg_collection", "vp_size"),
            "layers, embedding and head of a chunk are decided from its rank along the loop",
            "process groups that a model builder may choose for every chunk",
        ),
        Hook(
            "v-data",
            ("megatron.training.training:build_train_valid_test_data_iterators",),
            _on_v("feed_stages"),
            ("build_train_valid_test_datasets_provider",),
            "the chunks that read data are found from their rank along the loop",
            "a data provider that is told whether its chunk is the first or the last stage",
        ),
        Hook(
            "v-tied-embeddings",
            ("megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",),
            _on_v("add_tied_gradients"),
            ("model",),
            "the two copies of a tied embedding are expected on two ranks, and on the V they are on one",
            "a sum over the copies of this rank before those of the embedding group are reduced",
        ),
        Hook(
            "delayed-weights",
            ("megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",),
            _with_delayed_weights,
            ("self",),
            "linears of transformer-engine delay weight gradients only with overlap of expert-parallel communication",
            "a delay_wgrad_compute that any pipeline schedule may use",
        ),
        Hook(
            "overwrite",
            ("megatron.core.dist_checkpointing:save",),
            _without_old_index,
            ("sharded_state_dict", "checkpoint_dir"),
            "an interrupted save over an older checkpoint of the same iteration leaves the old index over mixed files",
            "a save that removes the index of what it writes over",
        ),
        Hook(
            "optimizer-save",
            ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",),
            _with_first_step,
            ("self",),
            "torch's AdamW has no step count before its first step, and loading a checkpoint asks for one",
            "a state_dict of DistributedOptimizer that takes a fresh optimizer of torch's",
        ),
        Hook(
            "optimizer-load",
            ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",),
            _with_own_steps,
            ("self", "state_dict"),
            "all parameters of torch's AdamW get one step tensor, which each advances, and training goes on wrongly",
            "a load_state_dict of DistributedOptimizer that gives every parameter a step tensor of its own",
        ),
        Hook(
            "optimizer-copy",
            ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",),
            _without_steps,
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
            raise RuntimeError(f"hook {hook.name!r} does not fit: {reason}; use megatron-core {SUPPORTED}x")
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
    new = functools.wraps(old, updated=())(hook.make(old))
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


def one_line(error: BaseException) -> str:
    """The error's text in one line; of an assertion without text, the line that asserts."""
    text = " ".join(str(error).split())
    if text or error.__traceback__ is None:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron requires: {linecache.getline(frame.filename, frame.lineno or 0).strip()}"
