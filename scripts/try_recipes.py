"""Try folders of recipes and lists of flags as `megatron-cp validate` does; print a row for each and the reasons.

    python scripts/try_recipes.py FOLDER… [--cluster NAME] [--sample N] [--parse] [NAME=VALUE…]

NAME=VALUE are the variables that the files refer to; any other variable stands for itself. --sample N tries every
file's syntax and N files, evenly spread, in full; --parse reads the files only. One process forks for each file, so
that Megatron is imported once.
"""

import argparse
import os
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_cp import config
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

VALID = "valid"


def parsed(file: Path, variables: Mapping[str, str], flags: Sequence[str]) -> recipe.Recipe | str:
    """Return the recipe of a file, or the line that says why it is none."""
    try:
        return recipe.load(str(file), Unset({**config.environment(), **variables}), flags)
    except ValueError as error:
        return str(error)


def verdict(run: recipe.Recipe, cluster: str) -> str:
    """Validate in a forked process; return VALID or the first line of the refusal."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        with os.fdopen(send, "wb") as answer:
            pickle.dump(_examined(run, cluster), answer)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return str(pickle.loads(said)) if said else "the checks ended without a word"


def _examined(run: recipe.Recipe, cluster: str) -> str:
    from megatron_cp.megatron.arguments import validate

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        checked = validate.run_of(run, cluster)
        environment = validate.environment(checked)
        os.environ.clear()
        os.environ.update(environment)
        validate.examine(checked)
    except ValueError as error:
        return str(error)
    except BaseException as error:
        return f"TRACEBACK {type(error).__name__}: {error}"
    return VALID


def main() -> None:
    """Print a row per file and how many are valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--cluster", default="dgx-h100-ib")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--parse", action="store_true")
    parser.add_argument("--flags", nargs="*", default=[], help="laid over every file, without their dashes: a=b")
    words = sys.argv[1:]
    variables = dict(word.split("=", 1) for word in words if "=" in word and word.split("=")[0].isupper())
    given = parser.parse_args([word for word in words if not ("=" in word and word.split("=")[0].isupper())])
    for folder in given.folders:
        files = sorted(folder.rglob("*.yaml"))
        chosen = {files[len(files) * n // given.sample] for n in range(given.sample)} if given.sample else set(files)
        rows = []
        for file in files:
            run = parsed(file, variables, [f"--{flag}" for flag in given.flags])
            if isinstance(run, str):
                rows.append((file, f"not read: {run}"))
            elif given.parse or file not in chosen:
                rows.append((file, "read"))
            else:
                rows.append((file, verdict(run, given.cluster)))
        for file, said in rows:
            print(f"{file.stem:60.60}  {' | '.join(said.splitlines())[:300]}")
        kinds = Counter("not read" if said.startswith("not read") else said for _, said in rows)
        refused = len(rows) - kinds[VALID] - kinds["read"] - kinds["not read"]
        read = len(rows) - kinds["not read"]
        print(f"== {folder}: {len(rows)} files, {read} read, {kinds[VALID]} valid, {refused} refused\n")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.training.arguments  # noqa: F401  so that the forked processes need not

        main()
