"""Rebind names of Megatron, listed in one table, safely.

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
from megatron_cp.megatron.run import settings_of_run
from megatron_cp.registry import Registry

SUPPORTED = "0.19."
FOR_V = ("v-stages", "v-data", "v-tied-embeddings")
"""Hooks that place stages on the V; they are applied for such a schedule only."""
FOR_TWO_COPIES = ("v-stages", "v-tied-embeddings")
"""Hooks for two copies of the model, of which one runs up the ranks as the V does."""
FOR_ISLANDS = ("island-gradients", "island-step", "island-weights", "shard-state")
"""Hooks that let the instances of the distributed optimizer train apart."""
FOR_QUANTISED = ("quantised-buckets", "quantised-gradients", "quantised-weights", "shard-state")
"""Hooks that quantise messages of the distributed optimizer."""
FOR_STATE_ON_DISK = ("state-on-disk", "state-gradients")
"""Hooks that keep the optimizer's state in files."""
FOR_FREE_RUNNING = ("no-norm", "own-success", "own-statistics")
"""Hooks that keep ranks of a pipeline from waiting for each other at the end of a step."""
_MARK = "megatron_cp_hook"


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One change to Megatron.

    targets:    the bindings that are replaced, `module:path.to.attribute`
    by:         the function of ours, as a name of the same form: it is called as `by(old, *args, **kwargs)`
    parameters: parameters of the replaced function that `by` relies on
    reason:     why Megatron cannot be asked for it in another way
    retired_by: the change upstream that would make the hook superfluous
    makes:      `by(old)` makes what is bound, once, when the hook is installed
    settings:   every call gets the run's Settings, before the arguments of the replaced function
    """

    name: str
    targets: tuple[str, ...]
    by: str
    parameters: tuple[str, ...]
    reason: str
    retired_by: str
    makes: bool = False
    settings: bool = False
    aliases: tuple[str, ...] = ()

    def replacement(self, old: Any) -> Any:
        """Return what is bound instead of `old`.

        A function of ours is imported at its first call: a patched Megatron asks for it while it is being imported.
        """
        made: Any = find(self.by).value(old) if self.makes else None
        if self.makes and not self.settings:
            return made

        def replaced(*args: Any, **kwargs: Any) -> Any:
            # the arguments are parsed after most hooks are installed
            given = (settings_of_run(), *args) if self.settings else args
            return made(*given, **kwargs) if self.makes else find(self.by).value(old, *given, **kwargs)

        return replaced


HOOKS = Registry(
    "hook",
    [
        Hook(
            name="dataset-helpers",
            targets=("megatron.core.datasets.utils:compile_helpers",),
            by="megatron_cp.megatron.dataset:compile_helpers",
            parameters=(),
            reason="the wheel has the compiled dataset helpers but no Makefile, and rank 0 exits when make fails",
            retired_by="compile_helpers that returns when helpers_cpp imports, or a Makefile in the wheel",
        ),
        Hook(
            name="flags",
            targets=("megatron.training.arguments:add_megatron_arguments",),
            by="megatron_cp.megatron.arguments.checks:add_megatron_arguments",
            parameters=("parser",),
            reason="an unmodified script has no place for our flags, and they belong in --help and the arguments' dump",
            retired_by="an entry point for argument providers",
        ),
        Hook(
            name="checks",
            targets=("megatron.training.arguments:validate_args",),
            by="megatron_cp.megatron.arguments.checks:validate_args",
            parameters=("args",),
            reason="our layer spec is chosen and our checks run, on every rank, before Megatron's own checks",
            retired_by="an entry point for argument providers",
        ),
        Hook(
            name="mtp-layers",
            targets=("megatron.training.models.gpt:mtp_block_spec",),
            by="megatron_cp.megatron.layers.specs:mtp_layers",
            parameters=("config", "transformer_layer_spec", "vp_stage"),
            reason="--spec does not reach the layers of multi-token prediction, which would keep stock attention",
            retired_by="mtp_block_spec that builds on the layer spec it is given",
            settings=True,
        ),
        Hook(
            name="mtp-loss",
            targets=(
                "megatron.core.transformer.multi_token_prediction:process_mtp_loss",
                "megatron.core.models.gpt.gpt_model:process_mtp_loss",
                "megatron.core.models.hybrid.hybrid_model:process_mtp_loss",
            ),
            by="megatron_cp.megatron.layers.mtp_loss:over_the_whole_sequence",
            parameters=(
                "labels",
                "loss_mask",
                "compute_language_model_loss",
                "config",
                "cp_group",
                "packed_seq_params",
            ),
            reason="context-parallel ranks divide this loss by their own tokens, which differ from rank to rank",
            retired_by="a process_mtp_loss that divides by the tokens of its context-parallel group",
            settings=True,
        ),
        Hook(
            name="schedule",
            targets=(
                "megatron.training.training:get_forward_backward_func",
                "megatron.core.pipeline_parallel:get_forward_backward_func",
            ),
            by="megatron_cp.megatron.pipeline.lookup:ScheduleGetter",
            parameters=(),
            reason="the pipeline schedule is looked up by name, twice, and cannot be passed in",
            retired_by="a schedule argument of pretrain()",
            makes=True,
            settings=True,
        ),
        Hook(
            name="weight-queue",
            targets=("megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",),
            by="megatron_cp.megatron.pipeline.split_linear:SplitLinear",
            parameters=(),
            reason="a schedule with input and weight gradients apart needs linears whose backward can stop half-way",
            retired_by="backward_dw of Column- and RowParallelLinear that does what transformer-engine's does",
            makes=True,
        ),
        Hook(
            name="v-stages",
            targets=("megatron.training.models.dist_utils:build_virtual_pipeline_stages",),
            by="megatron_cp.megatron.pipeline.two_way:build_stages",
            parameters=("build_model_func", "pg_collection", "vp_size"),
            reason="layers, embedding and head of a chunk are decided from its rank along the loop",
            retired_by="process groups that a model builder may choose for every chunk",
            settings=True,
        ),
        Hook(
            name="v-data",
            targets=("megatron.training.training:build_train_valid_test_data_iterators",),
            by="megatron_cp.megatron.pipeline.v_placement:feed_stages",
            parameters=("build_train_valid_test_datasets_provider",),
            reason="the chunks that read data are found from their rank along the loop",
            retired_by="a data provider that is told whether its chunk is the first or the last stage",
            settings=True,
        ),
        Hook(
            name="v-tied-embeddings",
            targets=("megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",),
            by="megatron_cp.megatron.pipeline.v_placement:add_tied_gradients",
            parameters=("model",),
            reason="both ends of a tied embedding are expected on two ranks; on the V and in two pipes they are on one",
            retired_by="a sum over both ends of this rank before those of the embedding group are reduced",
            settings=True,
        ),
        Hook(
            name="delayed-weights",
            targets=("megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",),
            by="megatron_cp.megatron.pipeline.te_weight_gradients:delay_weights",
            parameters=("self",),
            reason="transformer-engine's linears delay weight gradients only when expert-parallel messages overlap, "
            "and these overlap only in a virtual pipeline",
            retired_by="a delay_wgrad_compute, and overlapped messages, that any pipeline schedule may use",
            settings=True,
        ),
        Hook(
            name="island-gradients",
            targets=("megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.__init__",),
            by="megatron_cp.megatron.replicas.islands:keep_gradients",
            parameters=("self", "ddp_config"),
            reason="gradients are always added between the instances of the distributed optimizer",
            retired_by="an option of DistributedDataParallel to keep gradients inside an instance",
            settings=True,
        ),
        Hook(
            name="island-step",
            targets=("megatron.training.training:train_step",),
            by="megatron_cp.megatron.replicas.islands:take_step",
            parameters=("model", "optimizer", "iteration"),
            reason="every step adds the losses for the log over all ranks, which islands would wait for",
            retired_by="a train_step that is told over which ranks to add them, and tells the optimizer its number",
            settings=True,
        ),
        Hook(
            name="island-weights",
            targets=(
                "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params",
            ),
            by="megatron_cp.megatron.replicas.islands:hand_on",
            parameters=("self",),
            reason="the weights that islands go on from are made between the update and the gather",
            retired_by="a callback of the distributed optimizer between the two",
        ),
        Hook(
            name="shard-state",
            targets=("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",),
            by="megatron_cp.megatron.replicas.shard_state:with_shard_state",
            parameters=("self", "is_loading", "metadata"),
            reason="a checkpoint has no place for what the distributed optimizer's shards have beside Adam's moments",
            retired_by="more names in the distributed optimizer's optimizer_state_keys",
            settings=True,
        ),
        Hook(
            name="quantised-buckets",
            targets=("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__",),
            by="megatron_cp.megatron.replicas.quantised:mark_buckets",
            parameters=("self", "data_parallel_group", "param_to_name"),
            reason="a reduce-scatter is not told which elements of a bucket are of norms and embeddings",
            retired_by="a collective of DistributedDataParallel's choice that is handed the bucket",
            settings=True,
        ),
        Hook(
            name="quantised-gradients",
            targets=("megatron.core.distributed.param_and_grad_buffer:reduce_scatter_with_fp32_accumulation",),
            by="megatron_cp.megatron.replicas.quantised:scatter_gradients",
            parameters=("output_tensor", "input_tensor", "op", "group", "async_op"),
            reason="the reduce-scatter of gradients is one of two, by a flag",
            retired_by="a reduce-scatter that DistributedDataParallelConfig names",
        ),
        Hook(
            name="quantised-weights",
            targets=("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync",),
            by="megatron_cp.megatron.replicas.quantised:gather_weights",
            parameters=("self", "force_sync"),
            reason="the gather of weights runs inside a coalescing manager, which hands on no results to decode",
            retired_by="an all-gather that DistributedDataParallelConfig names, outside of the coalescing manager",
        ),
        Hook(
            name="state-on-disk",
            targets=("megatron.training.training:get_megatron_optimizer",),
            by="megatron_cp.megatron.replicas.on_disk:put_on_disk",
            parameters=(),
            reason="the optimizer makes its state itself, in the memory of the device, and steps all of it at once",
            retired_by="an inner optimizer that get_megatron_optimizer is handed a class of",
            settings=True,
        ),
        Hook(
            name="state-gradients",
            targets=("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads",),
            by="megatron_cp.megatron.replicas.on_disk:take_gradients",
            parameters=("self",),
            reason="gradients are hung on the main weights, which take none of another device than their own",
            retired_by="gradients of main weights that the distributed optimizer keeps beside them",
        ),
        Hook(
            name="kept-attention",
            targets=(
                "megatron.core.tensor_parallel.random:checkpoint",
                "megatron.core.tensor_parallel:checkpoint",
            ),
            by="megatron_cp.megatron.layers.recompute:checkpoint",
            parameters=("function", "distribute_saved_activations"),
            reason="an attention layer is not told whether a checkpoint runs its forward or its recomputation",
            retired_by="a checkpoint that hands the results of chosen modules to its recomputation",
            settings=True,
        ),
        Hook(
            name="loss-chunks",
            targets=(
                "megatron.core.models.common.language_module.language_module:"
                "LanguageModule.setup_embeddings_and_output_layer",
            ),
            by="megatron_cp.megatron.layers.chunks:put_off_logits",
            parameters=("self",),
            reason="models compute all logits before they call their loss; HybridModel takes no output_processor",
            retired_by="models that hand hidden states and output layer to one function of logits and loss",
            settings=True,
        ),
        Hook(
            name="accepted-chunks",
            targets=("megatron.core.transformer.multi_token_prediction:_compute_mtp_acceptance_counts",),
            by="megatron_cp.megatron.layers.chunks:accepted",
            parameters=("mtp_logits", "mtp_labels", "loss_mask"),
            reason="multi-token prediction counts its right tokens from all logits, outside of its loss",
            retired_by="a loss of multi-token prediction that counts what it predicts right",
            settings=True,
        ),
        Hook(
            name="shared-vocabulary",
            targets=("megatron.core.models.gpt.gpt_model:GPTModel.__init__",),
            by="megatron_cp.megatron.pipeline.vocabulary:share_out",
            parameters=("self",),
            reason="the model makes embedding and output layer itself, each on one pipeline stage alone",
            retired_by="classes of both that a model builder may choose, on every pipeline stage",
            settings=True,
        ),
        Hook(
            name="document-stages",
            targets=("megatron.core.datasets.blended_megatron_dataset_builder:BlendedMegatronDatasetBuilder.__init__",),
            by="megatron_cp.megatron.layers.packed:built_on_all_stages",
            parameters=("cls", "sizes", "is_built_on_rank", "config"),
            reason="every stage's attention needs the ends of documents, and scripts build no dataset in between",
            retired_by="scripts that build datasets of packed documents on every pipeline stage",
        ),
        Hook(
            name="mlp-tiles",
            targets=(
                "megatron.core.distributed.torch_fully_sharded_data_parallel:TorchFullyShardedDataParallel.__init__",
            ),
            by="megatron_cp.megatron.replicas.tiles:shard_tiles",
            parameters=("self", "config", "module"),
            reason="layers are sharded before what is inside them, which then cannot be sharded by itself any more",
            retired_by="a TorchFullyShardedDataParallel that shards what is inside of layers first",
            settings=True,
        ),
        Hook(
            name="expert-choices",
            targets=("megatron.core.transformer.moe.moe_logging:MoEMetricsTracker.report",),
            by="megatron_cp.megatron.experts.choices:report",
            parameters=("self", "iteration"),
            reason="nothing else is called where Megatron logs, and its figures of experts are means over ranks",
            retired_by="figures of the tracker of experts that are added up, for each layer, as often as Megatron logs",
            settings=True,
        ),
        Hook(
            name="no-norm",
            targets=("megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm",),
            by="megatron_cp.megatron.pipeline.free_running:no_norm",
            parameters=("self",),
            reason="the norm of all gradients is summed over all ranks in every step, also where nothing is clipped",
            retired_by="a norm that is computed where --clip-grad or the log asks for it",
            settings=True,
        ),
        Hook(
            name="own-success",
            targets=("megatron.training.training:logical_and_across_model_parallel_group",),
            by="megatron_cp.megatron.pipeline.free_running:own",
            parameters=("input", "group"),
            reason="every step asks all stages whether their updates succeeded, also where none can fail",
            retired_by="a train_step that asks where a loss scale or frozen parameters make it necessary",
            settings=True,
        ),
        Hook(
            name="own-statistics",
            targets=("megatron.training.training:reduce_max_stat_across_model_parallel_group",),
            by="megatron_cp.megatron.pipeline.free_running:own",
            parameters=("stat", "group"),
            reason="norm and learning rate of the log are compared over all stages in every step",
            retired_by="a training_log that compares them where it logs",
            settings=True,
        ),
        Hook(
            name="connections",
            targets=("megatron.training.arguments:get_device_arch_version",),
            by="megatron_cp.megatron.machine.environment:without_one_connection",
            parameters=(),
            reason="before Blackwell one CUDA connection is demanded, which --tp-engine symmetric cannot copy beside",
            retired_by="a check of CUDA_DEVICE_MAX_CONNECTIONS that asks which linears rely on it",
        ),
        Hook(
            name="overwrite",
            targets=("megatron.core.dist_checkpointing:save",),
            by="megatron_cp.megatron.checkpoint.failed_save:save_without_old_index",
            parameters=("sharded_state_dict", "checkpoint_dir"),
            reason="an interrupted save over a checkpoint of the same iteration leaves the old index over mixed files",
            retired_by="a save that removes the index of what it writes over",
        ),
        Hook(
            name="optimizer-save",
            targets=("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",),
            by="megatron_cp.megatron.checkpoint.resume:state_dict",
            parameters=("self",),
            reason="torch's AdamW has no step count before its first step, and loading a checkpoint asks for one",
            retired_by="a state_dict of DistributedOptimizer that takes a fresh optimizer of torch's",
        ),
        Hook(
            name="optimizer-load",
            targets=("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",),
            by="megatron_cp.megatron.checkpoint.resume:load_state_dict",
            parameters=("self", "state_dict"),
            reason="all parameters of torch's AdamW get one step tensor, which each advances; training is wrong",
            retired_by="a load_state_dict of DistributedOptimizer that gives every parameter a step tensor of its own",
        ),
        Hook(
            name="optimizer-copy",
            targets=(
                "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
            ),
            by="megatron_cp.megatron.checkpoint.resume:set_states",
            parameters=("self", "model_param", "tensors"),
            reason="a checkpoint has no step count per parameter, and autograd refuses to write to fp32 parameters",
            retired_by="a copy of DistributedOptimizer that leaves out `step`, without autograd",
        ),
    ],
)


def probe(hook: Hook) -> str:
    """Return why the hook cannot be applied to the installed Megatron, or an empty string."""
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
    """True if the hook is in force."""
    return all(getattr(find(target).value, _MARK, None) == hook.name for target in hook.targets)


class Applied:
    """Hooks in force; leaving the context, or `revert`, restores the previous bindings."""

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
    """Return the named hook as a decorator, which the call sites in patches/ put over Megatron's own definitions."""
    return functools.partial(_made, HOOKS.get(name))


def dataset_helpers_need_no_make() -> bool:
    """True if the compiled dataset helpers are installed without the Makefile that Megatron always runs."""
    helpers = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if helpers is None or helpers.origin is None:
        return False
    return not os.path.exists(os.path.join(os.path.dirname(helpers.origin), "Makefile"))


def resumes_with_torch_adam() -> bool:
    """True if neither Apex nor transformer-engine provides a fused Adam."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE
