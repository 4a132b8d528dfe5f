"""Try folders of recipes and lists of flags as `megatron-cp validate` does; print a row for each and the reasons.

    python scripts/try_recipes.py FOLDER… [--cluster NAME] [--sample N] [--parse] [--train] [--known] [NAME=VALUE…]

NAME=VALUE are the variables that the files refer to; any other variable stands for itself. --sample N tries every
file's syntax and N files, evenly spread, in full; --parse reads the files only. --train shrinks each recipe to a few
small layers and trains it on this CPU, through the launcher, under each of CASES. --known leaves out the flags that
Megatron does not have, as their refusal advises. One process forks for each file, so that Megatron is imported once.
"""

import argparse
import math
import os
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from shrink import shrunk

from megatron_cp import config
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

VALID = "valid"
TRAINS = "trains"
STEPS = 3


class Case(NamedTuple):
    """A parallelism to train a shrunk recipe under."""

    name: str
    ranks: int
    layers: int
    flags: dict[str, str]


CP = {"--context-parallel-size": "2"}
PP = {"--pipeline-model-parallel-size": "2"}
CASES = (
    Case("CP=2 zigzag", 2, 2, {**CP, "--cp-comm-type": "zigzag"}),
    Case(
        "CP=2 usp, PP=2 zb-h1",
        4,
        2,
        {
            **CP,
            **PP,
            "--cp-comm-type": "usp",
            "--hierarchical-context-parallel-sizes": "2 1",
            "--pp-schedule": "zb-h1",
        },
    ),
    Case("PP=2 zb-v", 2, 4, {**PP, "--pp-schedule": "zb-v"}),
)


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


def trained(run: recipe.Recipe, case: Case) -> str:
    """Train the shrunk recipe on CPU ranks; return TRAINS or the first line of what ended the run."""
    from tests.ranks import RankError, run_ranks

    words = shrunk(run, case.layers, case.flags, _known())
    environment = {name: setting.text for name, setting in run.env_vars.items()}
    try:
        losses = run_ranks(case.ranks, _losses, words, environment)[0]
    except RankError as error:
        return _reason(error.errors)
    fine = len(losses) == STEPS and all(map(math.isfinite, losses))
    return TRAINS if fine else f"TRACEBACK losses {losses}"


def _losses(words: list[str], environment: Mapping[str, str]) -> list[float]:
    """Train on this rank with the recipe's environment; return its losses."""
    from tests.megatron.pretraining import script_losses

    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS")
    os.environ.update(environment)
    return [step["loss"] for step in script_losses(words)]


def _reason(errors: Mapping[int, str]) -> str:
    """Return the refusal that a rank ended with, or the error of the first rank that failed by itself."""
    texts = [text for _, text in sorted(errors.items())]
    refusals = [text for text in texts if text.startswith("SystemExit: [megatron-cp]")]
    if refusals:
        return refusals[0].splitlines()[0].partition("]")[2].partition(":")[2].strip()
    own = [text for text in texts if "Connection closed by peer" not in text] or texts
    return f"TRACEBACK {own[0].splitlines()[0]}"


def _known() -> set[str]:
    from megatron_cp.megatron.arguments.known_flags import parser

    return set(parser()._option_string_actions)


def _without_unknown(run: recipe.Recipe) -> recipe.Recipe:
    known = _known()
    return replace(run, model_args={flag: setting for flag, setting in run.model_args.items() if flag in known})


def main() -> None:
    """Print a row per file and how many are valid, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--cluster", default="dgx-h100-ib")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--parse", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--flags", nargs="*", default=[], help="laid over every file, without their dashes: a=b")
    words = sys.argv[1:]
    variables = dict(word.split("=", 1) for word in words if "=" in word and word.split("=")[0].isupper())
    given = parser.parse_args([word for word in words if not ("=" in word and word.split("=")[0].isupper())])
    tries: list[tuple[str, Callable[[recipe.Recipe], str]]] = [("valid", lambda run: verdict(run, given.cluster))]
    if given.train:
        tries = [(case.name, lambda run, case=case: trained(run, case)) for case in CASES]
    for folder in given.folders:
        files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else [folder]
        chosen = {files[len(files) * n // given.sample] for n in range(given.sample)} if given.sample else set(files)
        counts: Counter[str] = Counter()
        for file in files:
            run = parsed(file, variables, [f"--{flag}" for flag in given.flags])
            if isinstance(run, str):
                _row(file.stem, f"not read: {run}")
                continue
            counts["read"] += 1
            if given.parse or file not in chosen:
                continue
            run = _without_unknown(run) if given.known else run
            for name, attempt in tries:
                said = attempt(run)
                counts[name] += said in (VALID, TRAINS)
                _row(file.stem, said if len(tries) == 1 else f"{name}: {said}")
        results = ", ".join(f"{counts[name]} {name}" for name in ("read", *(name for name, _ in tries)))
        print(f"== {folder}: {len(files)} files, {len(chosen)} tried; {results}\n")


def _row(name: str, said: str) -> None:
    print(f"{name:60.60}  {' | '.join(said.splitlines())[:300]}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.training.arguments  # noqa: F401  so that the forked processes need not

        main()
