"""Resume from a checkpoint: refuse early what cannot be resumed, and make torch's AdamW work with Megatron's
distributed optimizer.

Torch's Adam counts steps per parameter, in a tensor of the parameter's state; the fused ones count per group. Megatron
0.19 stores one count per group and has two gaps on the way back. A fresh optimizer has no state yet, so that there is
no count to read and loading stops at an assertion. And loading hands one and the same tensor to all parameters, which
each of them then advances, so that the bias correction of Adam is wrong from the first step on.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_cp import config
from megatron_cp.batches import ALGORITHMS
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.megatron.checkpoint.contents import DESCRIPTION, SIZES, common_state, damage, iterations, unreadable
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, QuantisedFlags
from megatron_cp.megatron.run import say
from megatron_cp.units import is_whole

# what makes two models different; read from the arguments that every checkpoint carries
MODEL = (
    *SIZES,
    "kv_channels",
    "mtp_num_layers",
    "normalization",
    "position_embedding_type",
    "swiglu",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "mlp_tiles",
)
# what decides which documents wait for a later step
WAITING = ("global_batch_size", "seq_length", "seed", "split")


def check(args: Any) -> None:
    """Refuse a checkpoint of another model, or whose optimizer state cannot come into this topology.

    Reads the arguments that the checkpoint carries; one that is not there yet, or is not in Megatron's distributed
    format, is left to Megatron. Raises ValueError with the rule, both values and a way out.
    """
    saved = _saved_arguments(args)
    if saved is None:
        return
    for name in MODEL:
        here, there = getattr(args, name, None), getattr(saved, name, None)
        if here != there:
            raise Refused(
                f"the checkpoint in {args.load} is of another model: its {name} is {there}, here it is {here}; "
                f"change --{name.replace('_', '-')}, or {_another(args)}"
            )
    _check_layers(args, saved)
    _check_waiting(args, saved)
    if not (args.no_load_optim or args.finetune or saved.no_save_optim):
        check_optimizer(args, saved)
        say_momentum(args, saved)
        say_left_over(args, saved)


def _another(args: Any) -> str:
    both = args.save is not None and args.save == args.load
    return "give another --save to start afresh" if both else "give another --load"


def _check_layers(args: Any, saved: Any) -> None:
    layers = [getattr(each, "transformer_impl", None) for each in (saved, args)]
    if layers == ["local", "transformer_engine"] and args.dist_ckpt_strictness == "assume_ok_unexpected":
        raise Refused(
            f"the checkpoint in {args.load} is of --transformer-impl local, without the state of FP8 that "
            f"transformer-engine's norms ask for; pass --dist-ckpt-strictness log_all"
        )


def _check_waiting(args: Any, saved: Any) -> None:
    """Refuse to go on where other documents would wait than those that wait in the checkpoint."""
    if args.finetune:
        # the documents are read from the first one on
        return
    here, there = (AttentionFlags.of(each).plan for each in (args, saved))
    if not any(plan and ALGORITHMS.get(plan).delays for plan in (here, there)):
        return
    lost = "of the documents that wait for a later step some would be lost or run twice"
    if here != there:
        ran, runs = (f"with --cp-plan {plan}" if plan else "without --cp-plan" for plan in (there, here))
        raise Refused(
            f"the checkpoint in {args.load} was saved {ran} and this run is {runs}: {lost}; make them the same, or "
            f"pass --finetune to begin with the first document"
        )
    for name in WAITING:
        before, now = getattr(saved, name, None), getattr(args, name, None)
        if before != now:
            flag = f"--{name.replace('_', '-')}"
            raise Refused(
                f"the checkpoint in {args.load} was saved with --cp-plan {there} and {flag} {before}, here it is {now}"
                f": {lost}; pass {flag} {before}, or --finetune to begin with the first document"
            )


def say_momentum(args: Any, saved: Any) -> None:
    """Say what becomes of the outer momentum of islands where only one of the two runs has one."""
    here, there = (_outer_of(each) for each in (args, saved))
    if here and not there:
        say(f"the checkpoint in {args.load} has no outer momentum: that of --local-sgd-outer {here} begins at zero")
    if there and not here:
        say(f"the outer momentum of --local-sgd-outer {there} in {args.load} is left: this run has none")


def say_left_over(args: Any, saved: Any) -> None:
    """Say what becomes of what quantised gradients have left over, where only one of the two runs keeps it."""
    here, there = (_keeping(each) for each in (args, saved))
    if here and not there:
        say(f"the checkpoint in {args.load} has nothing left over: --zero-quantized-gradients {here} begins without")
    if there and not here:
        say(f"what --zero-quantized-gradients {there} has left over in {args.load} is left: this run keeps nothing")


def _keeping(args: Any) -> str:
    """Return the name of the quantisation of gradients, where it keeps what it rounds off."""
    quantisation = QuantisedFlags.of(args).of_gradients
    return quantisation.name if quantisation is not None and quantisation.keeps else ""


def _outer_of(args: Any) -> str:
    """Return the name of the outer optimizer, where it has a momentum."""
    flags = LocalSgdFlags.of(args)
    return flags.outer_optimizer.name if flags.steps is not None and flags.outer_optimizer.remembers else ""


def check_optimizer(args: Any, saved: Any) -> None:
    """Refuse a move that the optimizer's state of a checkpoint cannot make; ValueError with the rule and a way out."""
    if args.use_distributed_optimizer != saved.use_distributed_optimizer:
        raise Refused(
            f"the checkpoint in {args.load} was saved {_with(saved)} --use-distributed-optimizer and this run is "
            f"{_with(args)} it; make them the same or pass --no-load-optim"
        )
    if _experts_apart(args) != _experts_apart(saved):
        raise Refused(
            f"the optimizer state in {args.load} cannot move from --expert-model-parallel-size "
            f"{saved.expert_model_parallel_size} to {args.expert_model_parallel_size}: above 1 the experts have "
            f"an optimizer of their own; stay above 1, or at 1, or pass --no-load-optim"
        )
    here, there = _topology(args), _topology(saved)
    moved = [f"{name} {there[name]} -> {here[name]}" for name in here if here[name] != there[name]]
    if moved and saved.use_distributed_optimizer and not saved.dist_ckpt_optim_fully_reshardable:
        raise Refused(
            f"the optimizer state in {args.load} cannot move between topologies ({', '.join(moved)}); "
            f"save with --dist-ckpt-optim-fully-reshardable or pass --no-load-optim"
        )


def _topology(args: Any) -> dict[str, Any]:
    """Return what decides which parameters are together on a rank, and in which order."""
    sizes = ("tensor", "pipeline", "virtual_pipeline", "expert")
    found = {f"{size}_model_parallel_size": getattr(args, f"{size}_model_parallel_size", None) for size in sizes}
    return {**found, "placement": _placement(args)}


def _experts_apart(args: Any) -> bool:
    """Return True if the experts' parameters are in another optimizer than the dense ones."""
    return bool(getattr(args, "num_experts", None)) and getattr(args, "expert_model_parallel_size", 1) > 1


def _placement(args: Any) -> str:
    return "v" if PipelineFlags.of(args).on_v else "loop"


def _with(args: Any) -> str:
    return "with" if args.use_distributed_optimizer else "without"


def _saved_arguments(args: Any) -> Any:
    from megatron.training.checkpointing import get_checkpoint_tracker_filename

    tracker = get_checkpoint_tracker_filename(args.load) if args.load else ""
    if not os.path.isfile(tracker):
        return None
    named = Path(tracker).read_text().strip()
    if not is_whole(named) and named != "release":
        raise Refused(_tracker_names_nothing(Path(tracker), named))
    iteration = str(getattr(args, "ckpt_step", None) or named)
    folder = os.path.join(args.load, f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
    if not os.path.isfile(os.path.join(folder, "metadata.json")):
        return None
    _check_whole(Path(args.load), Path(folder))
    return common_state(Path(folder)).get("args")


def _tracker_names_nothing(tracker: Path, named: str) -> str:
    """Return the message for a save that ended while it wrote the tracker; Megatron would end as if it were done."""
    latest = _latest_whole(tracker.parent)
    way_out = f"write {latest}, its latest whole checkpoint, into it" if latest else "no checkpoint is whole, remove it"
    return f"{tracker} should name an iteration, got {named!r}; {way_out}"


def _latest_whole(load: Path, but: Path | None = None) -> int | None:
    saved = [path for path in iterations(load) if path != but and (path / DESCRIPTION).is_file()]
    whole = [path.name for path in saved if not damage(path)]
    return int(whole[-1].removeprefix("iter_")) if whole else None


def _check_whole(load: Path, folder: Path) -> None:
    # every rank reads the index anyway; one rank checks each of the files, and if it fails, all ranks fail
    problems = damage(folder) if config.variable("RANK", "0") == "0" else unreadable(folder)
    if not problems:
        return
    latest = _latest_whole(load, but=folder)
    way_out = f"resume from the latest whole one with --ckpt-step {latest}" if latest else "no other one is whole"
    raise Refused(f"the checkpoint {folder} is damaged: {'; '.join(problems)}; {way_out}")


def state_dict(old: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the optimizer's common state; parameters without a step first get the state of step 0.

    AdamW itself starts with it, so a save before the first step is right too. Raises RuntimeError when this rank's
    shard has no parameter, because the step count is kept with a parameter.
    """
    parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
    if not parameters:
        raise CannotRun(
            "the distributed optimizer gave this rank no parameters, and torch's AdamW keeps its step count with them; "
            "use fewer data-parallel ranks or install transformer-engine"
        )
    for parameter in parameters:
        _begin(self.optimizer.state[parameter], parameter)
    return old(self, *args, **kwargs)


def load_state_dict(old: Callable[..., Any], self: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load as Megatron does, then give every parameter a step count of its own, as the checkpoint has it."""
    steps = {float(group["step"]) for group in state["optimizer"]["param_groups"]}
    if len(steps) != 1:
        raise Refused(
            f"the checkpoint's parameter groups are at different steps, {sorted(steps)}; start with --no-load-optim"
        )
    result = old(self, state, *args, **kwargs)
    (step,) = steps
    for parameter_state in self.optimizer.state.values():
        parameter_state["step"] = torch.tensor(step, dtype=torch.float32)
    return result


def set_states(old: Callable[..., Any], self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
    """Copy one parameter's tensors from the checkpoint, all but the step count, which the groups bring.

    In fp32 the main parameter is a view of the model's, which may be written to only without autograd.
    """
    with torch.no_grad():
        # Megatron leaves out what is not a tensor
        return old(self, model_param, {**tensors, "step": None})


def _begin(state: dict[str, Any], parameter: torch.Tensor) -> None:
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
