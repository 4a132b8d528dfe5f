"""`megatron-cp data`: build and inspect corpora for training."""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cp.cli.data_balance import balance
from megatron_cp.cli.lengths import lengths
from megatron_cp.units import many

if TYPE_CHECKING:
    from megatron_cp.corpus.encode import Batch
    from megatron_cp.corpus.tokenizers import Tokenizer
    from megatron_cp.megatron.dataset import Written

app = typer.Typer(no_args_is_help=True, help="Build and inspect corpora in Megatron's .bin/.idx format.")

app.command()(balance)
app.command()(lengths)

SHOWN_BAD = 5
SHOWN_TEXT_BYTES = 400


def parse_size(text: str) -> int:
    """Return the bytes that `500`, `20K`, `1.5M` or `2G` mean; units are powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size such as 500, 20K, 1.5M or 2G")
    return size


@app.command()
def build(
    output: Annotated[str, typer.Option(help="Prefix of the corpus: PREFIX.bin and PREFIX.idx.", metavar="PREFIX")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="PATH…",
            help="Files, folders and patterns such as 'c4/*.json.gz', in this order; `python-stdlib` is the source of "
            "Python's own library. .jsonl, .jsonlines, .jl and .ndjson hold a document per line, .json one per line or "
            "per element of its array, .parquet one per row, any other file is one document; .gz .zst .bz2 .xz are "
            "decompressed.",
        ),
    ] = None,
    more_inputs: Annotated[list[str] | None, typer.Argument(metavar="[PATH…]", help="More inputs.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="`byte`, or the path of a Hugging Face tokenizer.json, SentencePiece model or tiktoken vocabulary."
        ),
    ] = "byte",
    glob: Annotated[
        list[str] | None,
        typer.Option(
            help="Files of a folder to read, by name or path below it, such as '*.py'; may be repeated. "
            "By default *.txt *.text *.md *.rst *.jsonl *.jsonlines *.jl *.ndjson *.json, plain or compressed, and "
            "*.parquet."
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="Field of a JSON object, or column of a parquet table, that holds the text; `text` by default. "
            "`a.b` is the field b of the object in a. May be repeated: the texts are joined by a line end."
        ),
    ] = None,
    append_eod: Annotated[bool, typer.Option(help="End each document with the end-of-document token.")] = True,
    eod_id: Annotated[int | None, typer.Option(help="Use this id as the end of a document.")] = None,
    dtype: Annotated[str | None, typer.Option(help="uint16 or int32; by default the smaller that fits.")] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that read and encode; 0: as many as pay off for the size, at most one per CPU.", min=0
        ),
    ] = 0,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Stop with the document that reaches so much text, such as 20M."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many documents.", min=1)] = None,
    split_documents: Annotated[
        int | None,
        typer.Option(
            help="Cut a text of more tokens into documents of so many, each of which goes on in the next.",
            metavar="TOKENS",
            min=1,
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files and lines that cannot be read, and count them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing corpus.")] = False,
) -> None:
    """Turn text into a corpus for Megatron; both files appear only when complete."""
    from megatron_cp.corpus.encode import encode, make_plan, workers_for
    from megatron_cp.corpus.pieces import cut
    from megatron_cp.corpus.sources import find_sources
    from megatron_cp.corpus.tokenizers import load_tokenizer
    from megatron_cp.megatron.dataset import Limits, check_output, write

    names = [*(inputs or []), *(more_inputs or [])]
    if not names:
        raise ValueError("no input; name files, folders or python-stdlib with --input")
    check_output(output, overwrite)
    loaded = load_tokenizer(tokenizer, eod_id)
    plan = make_plan(loaded, eod_id, append_eod, field or ("text",), dtype, split_documents)
    sources, skipped = find_sources(names, glob or ())
    disk_bytes = sum(source.size for source in sources)
    processes = workers or workers_for(disk_bytes, tokenizer)
    with (
        ending_on_signals(),
        progress_bar(disk_bytes) as advance,
        closing(encode(cut(sources), plan, processes)) as batches,
    ):
        limits = Limits(max_bytes, limit)
        written = write(
            output, batches, plan.dtype, limits=limits, skip_bad=skip_bad, overwrite=overwrite, progress=advance
        )
    typer.echo(report(output, len(sources), written, plan.dtype, processes, list(map(str, skipped))))
    typer.echo(training_flags(output, loaded))


@app.command()
def info(prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Prefix of PREFIX.bin and PREFIX.idx.")]) -> None:
    """Check a corpus and print its sizes and its beginning."""
    from megatron_cp.corpus.index import check_prefix, first_document

    found = check_prefix(prefix)
    typer.echo(
        f"documents  {found.documents:,}\ntokens     {found.tokens:,} ({found.dtype}, {found.bin_bytes:,} bytes)"
    )
    typer.echo(f"longest    {found.longest:,} tokens")
    ids = first_document(prefix, found, SHOWN_TEXT_BYTES)
    typer.echo(f"first ids  {' '.join(map(str, ids[:16]))}")
    if ((ids >= 0) & (ids <= 256)).all():
        typer.echo(f"as bytes   {bytes(ids[ids < 256].astype('uint8')).decode(errors='replace')!r}")


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that nothing half-written stays behind."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(total_bytes: int) -> Iterator["Callable[[Batch], None]"]:
    """Show a bar over the bytes of the input on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[documents]:,} documents"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total_bytes, documents=0)
        documents = 0

        def advance(batch: "Batch") -> None:
            nonlocal documents
            documents += len(batch.lengths)
            bar.update(task, advance=batch.disk_bytes, documents=documents)

        yield advance


def report(prefix: str, files: int, written: "Written", dtype: str, processes: int, skipped: Sequence[str] = ()) -> str:
    """Return a text on what was written and left out, and the speed; `skipped` are paths that are no regular files."""
    lines = [
        f"{prefix}.bin, {prefix}.idx: {many(written.documents, 'document')}, "
        f"{many(written.tokens, 'token')} as {dtype}, "
        f"from {many(written.text_bytes, 'byte')} of text in {many(files, 'file')}",
        f"{written.documents / written.seconds:,.0f} documents/s, {written.tokens / written.seconds:,.0f} tokens/s "
        f"({written.seconds:.2f} s, workers: {processes})",
    ]
    if written.stopped:
        lines.append("stopped at the limit that was asked for")
    if written.cut:
        lines.append(f"cut into several documents: {written.cut:,} texts")
    if written.empty:
        lines.append(f"left out, without text: {written.empty:,}")
    if written.bad:
        lines += [f"left out, bad: {len(written.bad):,}", *_first(list(map(str, written.bad)))]
    if skipped:
        lines += [f"left out, no regular files: {len(skipped):,}", *_first(skipped)]
    return "\n".join(lines)


def _first(names: Sequence[str]) -> list[str]:
    shown = [f"  {name}" for name in names[:SHOWN_BAD]]
    return [*shown, f"  and {len(names) - SHOWN_BAD:,} more"] if len(names) > SHOWN_BAD else shown


def training_flags(prefix: str, tokenizer: "Tokenizer") -> str:
    """Return the Megatron flags that train on the corpus with its token ids."""
    flags: Sequence[str] = ("--data-path", shlex.quote(prefix), *tokenizer.flags)
    text = f"train with: {' '.join(flags)}"
    return f"{text}\n({tokenizer.hint})" if tokenizer.hint else text
