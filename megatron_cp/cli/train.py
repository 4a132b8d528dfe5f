"""`megatron-cp train`: train a recipe on this machine."""

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cp import config, runlog
from megatron_cp.cli import data
from megatron_cp.cli.importing import load
from megatron_cp.cli.output import EveryLine, ProgressLine, Record, Shown
from megatron_cp.findings import about
from megatron_cp.recipe.command import Command, check_processes, command, complete, corpus_words, flag_words
from megatron_cp.recipe.recipe import Recipe
from megatron_cp.units import many

if TYPE_CHECKING:
    from megatron_cp.corpus.index import Statistics

# words after RECIPE are Megatron's, even where they look like our options
FLAGS_AFTER_RECIPE = {"ignore_unknown_options": True, "allow_interspersed_args": False, "allow_extra_args": True}
# more leave no dataset of a usual --split without documents; the ranks check it in any case, after their start
FEW_DOCUMENTS = 1000
# torchrun gives its workers half a minute to end before it kills them
SECONDS_TO_STOP = 40
# what a process that outlives the run may still hold open is not waited for
SECONDS_FOR_ERRORS = 5

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Flags = Annotated[
    list[str] | None,
    typer.Argument(metavar="[--flag VALUE…]", help="Flags of Megatron and torchrun that win over the recipe's."),
]


def train(
    name: RecipeName,
    flags: Flags = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show all that Megatron prints.")] = False,
) -> None:
    """Train a recipe on this machine: build its corpus if missing, resume from its checkpoint, print a summary.

    On a terminal one line shows the progress; everything that Megatron prints is kept in megatron.log in the --save
    folder.
    """
    run = load_checked(name, flags or [])
    if not run.builds_corpus:
        ready_corpus(run)
    if _is_done(run, [name, *(flags or [])]):
        return
    if run.builds_corpus:
        ready_corpus(run)
    folder = run.save or Path("runs") / run.name
    folder.mkdir(parents=True, exist_ok=True)
    runlog.note_start(folder, _start(run))
    all_of_it = verbose or not sys.stdout.isatty()
    shown = EveryLine() if all_of_it else ProgressLine(run.name, run.number("--seq-length", 1))
    status, steps, summary = _stream(command(complete(run)), folder, shown)
    if status == 0:
        _sum_up(run, folder, steps, summary)
    raise typer.Exit(status)


def load_checked(name: str, flags: Sequence[str]) -> Recipe:
    """Load the recipe with these flags, and check it."""
    return checked(load(name, config.environment(), flags))


def checked(run: Recipe, others: Sequence[str] = ()) -> Recipe:
    """Return the recipe if its ranks would accept it; raises ValueError otherwise.

    others: flags of the command beside Megatron's and torchrun's, which an unknown one may mean
    """
    check_processes(run)
    from megatron_cp.megatron.arguments.recipe_flags import check_run

    check_run(run, others=others)
    return run


def _start(run: Recipe) -> dict[str, str]:
    """Return what a report says of a start: recipe, command, versions, host and time."""
    return {
        "recipe": run.name,
        "command": shlex.join(["megatron-cp", *sys.argv[1:]]),
        "versions": about(),
        "host": f"{platform.node()}, {os.cpu_count()} CPUs",
        "started": datetime.now().astimezone().strftime("%F %T %Z"),
    }


def ready_corpus(run: Recipe) -> None:
    """Build the corpus of DATA if neither of its files exists; raises ValueError for an incomplete one."""
    if run.builds_corpus and not any(
        Path(f"{run.data['--output'].text}{suffix}").exists() for suffix in (".bin", ".idx")
    ):
        words = corpus_words(run)
        _say(f"builds the corpus: megatron-cp {shlex.join(words)}")
        typer.main.get_command(data.app).main(words[1:], prog_name="megatron-cp data", standalone_mode=False)
    model = complete(run).model_args
    setting = model.get("--data-path")
    if setting is None:
        return
    from megatron_cp.corpus.conversations import check_conversations
    from megatron_cp.corpus.index import check_data_path

    if "--sft" in flag_words(model):
        check_conversations(setting.values)
        return
    corpora = check_data_path(setting.values)
    for found in corpora:
        _say(f"corpus {found.prefix}: {many(found.documents, 'document')}, {many(found.tokens, 'token')}")
    if any(found.documents < FEW_DOCUMENTS for found in corpora):
        _check_split(run, corpora)


def _check_split(run: Recipe, corpora: "Sequence[Statistics]") -> None:
    from megatron_cp.megatron.dataset import check_split

    full = "--full-validation" in run.model_args
    evaluates = run.flag("--eval-iters", "100") != "0" and not full
    check_split(corpora, run.flag("--split", "") or None, evaluates, only_train=full)


def _is_done(run: Recipe, words: Sequence[str]) -> bool:
    """Say from which checkpoint the run goes on; True if there is nothing left to do."""
    done = runlog.checkpoint_iteration(run.save) if run.save else None
    if done is None or run.flag("--load", str(run.save)) != str(run.save) or "--finetune" in run.model_args:
        return False
    wanted = run.number("--train-iters", 0)
    if done >= wanted > 0 and "--skip-train" not in run.model_args:
        asked = shlex.join(["megatron-cp", "train", *words])
        short = re.sub(r" --train-iters[ =][0-9]+", "", asked)
        said = f"all {wanted} iterations are done and saved in {run.save}"
        if re.search(r" --(?!save\b)", short):
            _say(
                f"{said}; the other flags given now were not compared with that run: give another --save to start "
                f"afresh with them, or more than --train-iters {wanted} to go on"
            )
        else:
            _say(f"{said}; to go on: {short} --train-iters {2 * wanted}; give another --save to start afresh")
        return True
    _say(f"resumes from the checkpoint of iteration {done} in {run.save}; give another --save to start afresh")
    return False


def _stream(line: Command, folder: Path, shown: Shown) -> tuple[int, list[runlog.Iteration], dict[str, Any]]:
    """Run the command, show and keep its output as it comes; return exit status, iterations, summary."""
    with Record(folder, shown) as record:
        record.note(f"{datetime.now().astimezone():%F %T %Z}: {shlex.join(line.words)}")
        try:
            with shown, _started(line, record) as process:
                assert process.stdout is not None
                for raw in process.stdout:
                    record.line(raw)
                status = process.wait()
        except KeyboardInterrupt:
            typer.echo(f"megatron-cp: {_interrupted(record.steps, folder)}", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        if status:
            shown.failed()
            typer.echo(f"megatron-cp: the run failed; all that it printed is in {record.log}", err=True)
            if record.reason.text:
                typer.echo(f"megatron-cp: {record.reason.text}", err=True)
    # ended by a signal: the number a shell would give
    return (128 - status if status < 0 else status), record.steps, record.summary


@contextmanager
def _started(line: Command, record: Record) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command, its errors into the record; at the end of the block all of its processes have ended."""
    reader, writer = os.pipe()
    # own session: Ctrl-C reaches only us and is passed on once, instead of a traceback from each rank
    process = subprocess.Popen(
        line.words,
        env={"PYTHONUNBUFFERED": "1", **config.environment(), **line.environment},
        stdout=subprocess.PIPE,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    errors = threading.Thread(target=_keep_errors, args=(reader, record), daemon=True)
    errors.start()
    with process, data.ending_on_signals():
        try:
            yield process
        except BaseException:
            record.stops()
            _stop(process, record)
            raise
        finally:
            errors.join(SECONDS_FOR_ERRORS)


def _keep_errors(reader: int, record: Record) -> None:
    # the record is closed before the errors end where a process outlives the run
    with open(reader, "rb") as lines, suppress(ValueError):
        for raw in lines:
            record.error(raw)


def _stop(process: subprocess.Popen[bytes], record: Record) -> None:
    process.terminate()
    try:
        # keep reading so that the child does not block on a full pipe
        rest, _ = process.communicate(timeout=SECONDS_TO_STOP)
        for raw in rest.splitlines(keepends=True):
            record.line(raw)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)


def _interrupted(steps: Sequence[runlog.Iteration], folder: Path) -> str:
    done = runlog.checkpoint_iteration(folder)
    at = f"at step {steps[-1].number}" if steps else "before its first step was logged"
    if done is None:
        return f"interrupted {at}; no checkpoint in {folder}; the same command starts again"
    return f"interrupted {at}; saved: iteration {done} in {folder}; the same command goes on"


def _sum_up(run: Recipe, folder: Path, steps: Sequence[runlog.Iteration], summary: dict[str, Any]) -> None:
    from megatron_cp.plots.loss import draw_loss

    history = runlog.read(folder / runlog.LOG_NAME)
    picture = draw_loss(history, folder / "loss.png", run.name)
    rows = {
        "backend": summary.get("backend", "unknown"),
        "kernel": summary.get("kernel", "unknown"),
        **_measured(run, steps),
        "bytes sent by CP": _bytes(summary.get("cp_bytes_per_step"), " per step"),
        "peak memory": _bytes(summary.get("peak_rss_bytes"), " per process"),
        "loss": _losses(history),
        "checkpoint": _checkpoint(run),
        "loss curve": str(picture or "no iteration was logged here"),
    }
    _say(f"summary of {run.name}")
    for label, text in rows.items():
        print(f"  {label:<18}{text}")


def _measured(run: Recipe, steps: Sequence[runlog.Iteration]) -> dict[str, str]:
    pace = runlog.pace(steps, run.number("--seq-length", 1))
    if pace is None:
        return {"tokens/s": "no step was logged"}
    return {"tokens/s": f"{pace.tokens_per_second:,.0f} (median step {pace.milliseconds:,.0f} ms)"}


def _losses(history: Sequence[runlog.Iteration]) -> str:
    known = [step for step in history if step.loss is not None]
    if not known:
        return "no iteration was logged here"
    first, last = known[0], known[-1]
    return f"{first.loss:.4f} at iteration {first.number}, {last.loss:.4f} at iteration {last.number}"


def _checkpoint(run: Recipe) -> str:
    done = runlog.checkpoint_iteration(run.save) if run.save else None
    return "none" if done is None else f"{run.save}/iter_{done:07d}"


def _bytes(count: int | None, unit: str) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e6:,.1f} MB{unit}"


def _say(text: str) -> None:
    print(f"[megatron-cp] {text}", flush=True)
