"""Write the hooks as patches for a checkout of Megatron: `python -m megatron_cp.megatron.patches DIR`.

A patch adds one call site: the hook, as a decorator, over the definition that it otherwise rebinds. The patches are
made from the table of hooks and the installed Megatron, whose code they contain as context lines.
"""

import difflib
import inspect
import sys
import textwrap
from pathlib import Path

from megatron_cp.megatron.hooks import HOOKS, Hook
from megatron_cp.megatron.rebind import find

REPAIRS = ("optimizer-", "overwrite", "connections")
"""Prefixes of the names of hooks that only the launcher applies, for the runs that need them."""


def series() -> list[tuple[str, str]]:
    """Return file names and texts of all patches, in the order in which they are applied."""
    features = [hook for hook in HOOKS if not hook.name.startswith(REPAIRS)]
    return [(f"{number:04}-{hook.name}.patch", patch(hook)) for number, hook in enumerate(features, 1)]


def patch(hook: Hook) -> str:
    """Return one hook's reason, what would retire it, and its call site as a diff against the installed Megatron.

    Raises RuntimeError when the target is not in the installed packages.
    """
    target = inspect.unwrap(find(hook.targets[0]).value)
    source = Path(inspect.getsourcefile(target) or "")
    name = source.as_posix()[source.as_posix().rindex("/megatron/") + 1 :]
    old = source.read_text().splitlines(keepends=True)
    first = inspect.getsourcelines(target)[1] - 1
    indent = old[first][: len(old[first]) - len(old[first].lstrip())]
    site = [f"{indent}from megatron_cp.megatron.hooks import patched\n", "\n", f'{indent}@patched("{hook.name}")\n']
    new = old[:first] + site + old[first:]
    return _header(hook) + "".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}"))


def _header(hook: Hook) -> str:
    why = textwrap.fill(f"Why: {hook.reason}.", 100)
    end = textwrap.fill(f"Superfluous with: {hook.retired_by}.", 100)
    return f"{hook.name}\n\n{why}\n{end}\n\n"


def main() -> None:
    """Write the patches and their `series` into the folder that the command line names."""
    folder = Path(sys.argv[1])
    for old in folder.glob("*.patch"):
        old.unlink()
    made = series()
    for name, text in made:
        (folder / name).write_text(text)
    (folder / "series").write_text("".join(f"{name}\n" for name, _ in made))


if __name__ == "__main__":
    main()
