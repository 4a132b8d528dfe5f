"""Hooks: exactly the declared names change, everything comes back, and what does not fit is an error."""

import dataclasses
import inspect
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from megatron_cp.megatron import hooks
from megatron_cp.megatron.arguments import checks
from megatron_cp.megatron.machine.facts import Machine
from megatron_cp.megatron.process import launch
from megatron_cp.megatron.rebind import find
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks


def attributes() -> dict[str, int]:
    """The identity of every attribute of every Megatron module that is loaded, and of those modules' classes."""
    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "megatron" or module is None:
            continue
        for attribute, value in vars(module).items():
            found[f"{name}:{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}:{attribute}.{inner}": id(entry) for inner, entry in vars(value).items()}
    return found


def difference(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Names whose object changed, a class for what is in it; a module that was loaded meanwhile is no change."""
    changed = {name for name, identity in before.items() if after.get(name) != identity}
    return {name for name in changed if name.rpartition(".")[0] not in changed}


def load_everything() -> None:
    import megatron.training.checkpointing
    import megatron.training.models.gpt  # noqa: F401

    for hook in hooks.HOOKS:
        for target in hook.targets:
            find(target)


def changed_by(names: Iterable[str]) -> tuple[set[str], set[str]]:
    load_everything()
    before = attributes()
    applied = hooks.apply(names)
    inside = difference(before, attributes())
    applied.revert()
    return inside, difference(before, attributes())


@pytest.mark.parametrize("name", hooks.HOOKS.names)
def test_a_hook_changes_its_declared_names_only_and_reverts(name: str) -> None:
    ((inside, after),) = run_ranks(1, changed_by, [name])
    assert inside == set(hooks.HOOKS.get(name).targets)
    assert after == set()


@pytest.mark.smoke
def test_all_hooks_together_revert() -> None:
    ((inside, after),) = run_ranks(1, changed_by, hooks.HOOKS.names)
    assert inside == {target for hook in hooks.HOOKS for target in hook.targets}
    assert after == set()


def applied_twice() -> list[bool]:
    hook = hooks.HOOKS.get("schedule")
    first = hooks.apply(["schedule"])
    once = find(hook.targets[0]).value
    second = hooks.apply(["schedule", "schedule"])
    states = [find(hook.targets[0]).value is once, second.names == (), hooks.probe(hook) == ""]
    second.revert()
    states.append(hooks.is_on(hook))
    first.revert()
    return [*states, not hooks.is_on(hook)]


def test_applying_again_changes_nothing_and_reverts_nothing() -> None:
    assert all(run_ranks(1, applied_twice)[0])


def refused(version: str | None) -> tuple[str, set[str]]:
    import megatron.core

    load_everything()
    if version:
        megatron.core.__version__ = version
    else:
        del megatron.core.pipeline_parallel.get_forward_backward_func
    before = attributes()
    with pytest.raises(RuntimeError) as error:
        hooks.apply(["flags", "schedule"])
    return str(error.value), difference(before, attributes())


@pytest.mark.parametrize(
    ("version", "text"), [("0.20.0", "0.20.0 is not 0.19.x"), (None, "pipeline_parallel:get_forward_backward_func")]
)
def test_a_hook_that_does_not_fit_is_an_error_and_nothing_is_changed(version: str | None, text: str) -> None:
    ((message, changed),) = run_ranks(1, refused, version)
    assert text in message
    assert changed == set()


def probed_with_a_wrong_parameter() -> str:
    return hooks.probe(dataclasses.replace(hooks.HOOKS.get("flags"), parameters=("parser", "verbose")))


def test_a_signature_without_the_needed_parameter_does_not_fit() -> None:
    assert "no parameter verbose" in run_ranks(1, probed_with_a_wrong_parameter)[0]


def test_an_unknown_hook_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'schedule'"):
        hooks.apply(["shedule"])


def called_through(name: str) -> list[bool]:
    hook = hooks.HOOKS.get(name)
    plain = find(hook.targets[0]).value(pp_size=1, vp_size=None)
    with hooks.apply([name]):
        return [find(target).value(pp_size=1, vp_size=None) is plain for target in hook.targets]


def test_the_schedule_getter_passes_through_under_both_names() -> None:
    assert run_ranks(1, called_through, "schedule") == [[True, True]]


def unfit(names: Iterable[str]) -> list[str]:
    """The hooks whose function of ours is not there, or cannot be called as the one that it replaces is."""
    load_everything()
    found = []
    for hook in map(hooks.HOOKS.get, names):
        ours, theirs = find(hook.by).value, find(hook.targets[0]).value
        if hook.makes:
            fits = len(inspect.signature(ours).parameters) == 1
        else:
            # whatever is passed to Megatron's function is passed on behind it
            parameters = inspect.signature(theirs).parameters.values()
            plain = [
                each.name
                for each in parameters
                if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
            ]
            inspect.signature(ours).bind(theirs, *["settings"] * hook.settings, *plain)
            first = ["old", "settings"] if hook.settings else ["old"]
            fits = list(inspect.signature(ours).parameters)[: len(first)] == first
        found += [] if fits else [hook.name]
    return found


def test_every_hook_names_a_function_that_fits_what_it_replaces() -> None:
    assert run_ranks(1, unfit, hooks.HOOKS.names) == [[]]


def test_every_hook_says_why_it_exists_and_what_would_retire_it() -> None:
    assert all(hook.reason and hook.retired_by and hook.targets for hook in hooks.HOOKS)


PLAIN = ["--context-parallel-size", "1", "--micro-batch-size", "1", "--use-distributed-optimizer"]


def on_a_plain_gpu_node(flags: list[str]) -> tuple[launch.Features, set[str]]:
    import torch

    load_everything()
    # a checkout with its Makefile, transformer-engine and a GPU
    torch.cuda.is_available = lambda: True
    launch.this_machine = checks.this_machine = Machine  # type: ignore[assignment]
    hooks.dataset_helpers_need_no_make = lambda: False  # type: ignore[assignment]
    hooks.resumes_with_torch_adam = lambda: False  # type: ignore[assignment]
    before = attributes()
    with launch.launched(flags) as features:
        return features, difference(before, attributes())


def test_with_no_feature_asked_for_no_attribute_of_megatron_differs() -> None:
    ((features, changed),) = run_ranks(1, on_a_plain_gpu_node, PLAIN)
    assert features == launch.Features(False, ())
    assert changed == set()


@pytest.mark.parametrize(
    "flags",
    [
        ["--cp-comm-type", "usp"],
        ["--cp-kernel=torch"],
        ["--spec", "megatron_cp.megatron.spec", "gpt_layer_spec"],
    ],
)
def test_a_feature_brings_its_hooks_and_no_others(flags: list[str]) -> None:
    ((features, changed),) = run_ranks(1, on_a_plain_gpu_node, [*PLAIN, *flags])
    assert features.layers
    assert changed == {target for name in ("flags", "checks") for target in hooks.HOOKS.get(name).targets}


def test_mtp_layers_are_hooked_only_with_our_layers() -> None:
    ours = [*PLAIN, "--mtp-num-layers", "1", "--cp-comm-type", "ring"]
    ((features, _),) = run_ranks(1, on_a_plain_gpu_node, ours)
    assert {"mtp-layers", "mtp-loss"} <= set(features.hooks)
    ((features, changed),) = run_ranks(1, on_a_plain_gpu_node, ours[:-2])
    assert (features.hooks, changed) == ((), set())


def after_a_launch(flags: list[str]) -> Any:
    load_everything()
    before = attributes()
    with launch.launched(flags):
        inside = difference(before, attributes())
    return inside, difference(before, attributes())


def test_a_launch_puts_everything_back() -> None:
    ((inside, after),) = run_ranks(1, after_a_launch, tiny("--context-parallel-size 2 --cp-comm-type usp"))
    assert "megatron.training.arguments:add_megatron_arguments" in inside
    assert after == set()
