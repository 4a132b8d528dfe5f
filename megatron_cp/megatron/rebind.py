"""Replace names of other modules and restore them exactly."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_cp.errors import CannotRun


class Name(NamedTuple):
    """A name that can be rebound, resolved from `module:attribute` or `module:Class.attribute`."""

    owner: Any
    attribute: str

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.attribute)


class Replaced(NamedTuple):
    """Record of one replacement; `own` is True for an attribute of the owner itself, False for an inherited one."""

    name: Name
    old: Any
    own: bool


def find(target: str) -> Name:
    """Resolve `module:path.to.attribute` to its owner and attribute; imports the module.

    Raises RuntimeError when the installed package does not have it.
    """
    module, _, path = target.partition(":")
    *parents, attribute = path.split(".")
    try:
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise CannotRun(f"{target} is not in the installed packages: {error}") from error
    return Name(owner, attribute)


def replace(target: str, make: Callable[[Any], Any]) -> Replaced:
    """Bind `target` to `make(what it was)`."""
    name = find(target)
    namespace = vars(name.owner)
    own = name.attribute in namespace
    # a class's own static or class method must be kept as the descriptor that it is
    old = namespace[name.attribute] if own else name.value
    setattr(name.owner, name.attribute, make(name.value))
    return Replaced(name, old, own)


def restore_all(done: list[Replaced]) -> None:
    """Put back everything, the last first; the list is empty afterwards."""
    while done:
        restore(done.pop())


def restore(replaced: Replaced) -> None:
    """Put back what `replace` found."""
    owner, attribute = replaced.name
    if replaced.own:
        setattr(owner, attribute, replaced.old)
    else:
        delattr(owner, attribute)
