import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_cp.corpus import pieces
from megatron_cp.corpus.encode import encode
from megatron_cp.corpus.tokenizers import load_tokenizer
from megatron_cp.megatron import dataset
from megatron_cp.megatron.dataset import Limits, check_data_path, check_prefix, check_split, write
from tests import ranks as _preloaded_server  # noqa: F401
from tests.corpus.conftest import TEXTS
from tests.corpus.reading import arrays_of, build, ids_of, jsonl, texts_of
from tests.corpus.test_documents import _write as written_file


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of several kinds of files, in which no document is like another."""
    folder = tmp_path / "texts"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [f"line {number} {TEXTS[number % 4]}" for number in range(300)])
    for number, text in enumerate(TEXTS):
        (folder / f"b{number}.txt").write_text(text)
    written_file(folder / "c.txt.gz", "compressed 漢字".encode())
    written_file(folder / "d.jsonl.zst", b'{"text": "also compressed"}\n' * 3)
    return folder


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_file_comes_back(tmp_path: Path, name: str) -> None:
    build(tmp_path / "out", written_file(tmp_path / name, TEXTS[1].encode()).path)
    assert texts_of(tmp_path / "out") == [TEXTS[1]]


def test_documents_come_back_in_order(tmp_path: Path) -> None:
    written = build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS))
    assert texts_of(tmp_path / "out") == list(TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (written.documents, written.tokens, written.text_bytes) == (4, size + 4, size)
    assert check_prefix(str(tmp_path / "out"))[1:5] == (4, 4, size + 4, "uint16")


@pytest.mark.parametrize("kind", ["hugging-face", "sentencepiece", "tiktoken", "tiktoken-json"])
def test_each_tokenizer_writes_its_ids_and_its_end(tmp_path: Path, kind: str, vocabularies: dict[str, Path]) -> None:
    build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=str(vocabularies[kind]))
    tokenizer = load_tokenizer(str(vocabularies[kind]))
    assert ids_of(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]


def test_end_of_document_can_be_left_out(tmp_path: Path) -> None:
    build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["abc"]), append_eod=False)
    assert ids_of(tmp_path / "out") == [[97, 98, 99]]


def test_dtype_is_written_as_asked(tmp_path: Path) -> None:
    build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["abc"]), dtype="int32")
    assert arrays_of(tmp_path / "out")[0].dtype == np.int32


@pytest.mark.parametrize("workers", [2, 3])
def test_files_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, corpus: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    build(tmp_path / "one", corpus)
    build(tmp_path / "many", corpus, workers=workers)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"many.{suffix}").read_bytes()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_input_gives_the_same_corpus(tmp_path: Path, corpus: Path, suffix: str) -> None:
    plain = corpus / "a.jsonl"
    compressed = written_file(tmp_path / f"a.jsonl{suffix}", plain.read_bytes()).path
    build(tmp_path / "plain", plain)
    build(tmp_path / "small", compressed)
    for name in ("bin", "idx"):
        assert (tmp_path / f"plain.{name}").read_bytes() == (tmp_path / f"small.{name}").read_bytes()


def test_limits_end_with_a_whole_document_wherever_pieces_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{number:04}" * 10 for number in range(50)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    for piece_bytes in (1, 300, 1 << 20):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        for limits, expected in ((Limits(text_bytes=401), 11), (Limits(400), 10), (Limits(documents=7), 7)):
            written = build(tmp_path / "out", source, limits=limits, overwrite=True)
            assert texts_of(tmp_path / "out") == texts[:expected]
            assert written.stopped
        assert not build(tmp_path / "out", source, limits=Limits(10**9, 10**9), overwrite=True).stopped


def test_what_comes_after_the_limit_may_be_bad(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two", 3])
    assert build(tmp_path / "out", source, limits=Limits(documents=2)).documents == 2


def test_bad_documents_are_refused_or_counted(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", None, "", " \n", 4, "six"])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: field 'text' is a JSON null.*--skip-bad"):
        build(tmp_path / "out", source)
    assert _left(tmp_path) == ["a.jsonl"]
    written = build(tmp_path / "out", source, skip_bad=True)
    assert texts_of(tmp_path / "out") == ["one", "six"]
    assert (written.documents, written.empty) == (2, 2)
    assert [bad.where for bad in written.bad] == [f"{source}, line {number}" for number in (2, 5)]


@pytest.mark.parametrize(
    ("texts", "why"), [([], "input holds no document"), (["", " "], "2 empty"), ([1], "1 bad, the first .*line 1")]
)
def test_corpus_without_text_is_refused(tmp_path: Path, texts: list[object], why: str) -> None:
    with pytest.raises(ValueError, match=f"the corpus has no text: .*{why}"):
        build(tmp_path / "new" / "folder" / "out", jsonl(tmp_path / "a.jsonl", texts), skip_bad=True)
    assert _left(tmp_path) == ["a.jsonl"]


def test_existing_corpus_is_kept_unless_told(tmp_path: Path) -> None:
    build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["old"]))
    indices = tmp_path / "out" / "cache" / "GPTDataset_indices"
    indices.mkdir(parents=True)
    source = jsonl(tmp_path / "b.jsonl", ["new", None])
    with pytest.raises(ValueError, match=r"out.bin and .*out.idx already exist; replace with --overwrite"):
        build(tmp_path / "out", source)
    with pytest.raises(ValueError, match="line 2"):
        build(tmp_path / "out", source, overwrite=True)
    assert texts_of(tmp_path / "out") == ["old"]
    assert indices.exists()
    build(tmp_path / "out", source, overwrite=True, skip_bad=True)
    assert texts_of(tmp_path / "out") == ["new"]
    assert not indices.exists()


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for prefix in (tmp_path / "file" / "out", Path("/proc/megatron-cp/out")):
        with pytest.raises(ValueError, match="cannot write to output folder"):
            build(prefix, jsonl(tmp_path / "a.jsonl", ["x"]))


@pytest.mark.parametrize("prefix", ["out.bin", "out.idx", "folder/", "folder/..", "..", "."])
def test_output_is_a_prefix(prefix: str) -> None:
    with pytest.raises(ValueError, match="must be a prefix"):
        dataset.check_output(prefix, overwrite=False)


def test_two_builds_of_one_corpus_do_not_mix(tmp_path: Path) -> None:
    with dataset._building(tmp_path / "out"), pytest.raises(ValueError, match="another process is building"):
        build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["x"]))


def test_a_full_disk_is_named_with_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "_add", full)
    with pytest.raises(RuntimeError, match=r"cannot write .*/out\.bin: No space left on device; free some space"):
        build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["x"]))
    assert _left(tmp_path) == ["a.jsonl"]


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(partial: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "_publish", full)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["x"]))
    assert _left(tmp_path) == ["a.jsonl"]


def _build_from_pipe(folder: Path, workers: int) -> None:
    from megatron_cp.cli import main

    os.setpgid(0, 0)
    arguments = ["--input", str(folder / "pipe.jsonl"), "--output", str(folder / "out"), "--workers", str(workers)]
    with contextlib.redirect_stderr(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["megatron-cp", "data", "build", *arguments])
        main()


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _write_until_closed(pipe: io.FileIO, line: bytes, seconds: float = 60) -> None:
    """Go on with the input until no process reads it; a build that does not end would fill the disk."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pipe.write(line)
        time.sleep(0.001)


def _until(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_build_leaves_no_corpus_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    process = multiprocessing.get_context("forkserver").Process(target=_build_from_pipe, args=(tmp_path, 2))
    process.start()
    line = b'{"text": "' + b"x" * 1000 + b'"}\n'
    partial = tmp_path / ".out.building" / "corpus.bin"
    with (tmp_path / "pipe.jsonl").open("wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
        while not (partial.exists() and partial.stat().st_size):
            pipe.write(line)
        assert process.pid is not None
        os.kill(process.pid, number)
        _write_until_closed(pipe, line)
    process.join(60)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the build goes on after {number.name}")
    assert process.exitcode not in (0, None)
    _until(lambda: _group_is_gone(process.pid or 0))
    left = [] if number != signal.SIGKILL else [".out.building"]
    assert _left(tmp_path) == [*left, "pipe.jsonl"]
    # and what SIGKILL leaves does not hinder the next build, which removes it
    build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["x"]))
    assert _left(tmp_path) == ["a.jsonl", "out.bin", "out.idx", "pipe.jsonl"]


def test_dead_worker_is_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")

    def kill_one() -> None:
        # the build cannot be done before its input ends
        with (tmp_path / "pipe.jsonl").open("wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            line = b'{"text": "' + b"x" * 1000 + b'"}\n'
            pipe.write(line)
            while not multiprocessing.active_children():
                pipe.write(line)
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            _write_until_closed(pipe, line)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RuntimeError, match="a worker process died"):
        build(tmp_path / "out", tmp_path / "pipe.jsonl", workers=2)
    killer.join()
    assert _left(tmp_path) == ["pipe.jsonl"]


def test_id_beyond_the_dtype_or_the_vocabulary_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from megatron_cp.corpus.encode import encode_piece, make_plan

    (piece,) = pieces.cut(dataset_sources(jsonl(tmp_path / "a.jsonl", ["x"])))
    large = replace(load_tokenizer("byte"), vocabulary=100_000, encode=lambda text: [70_000])
    assert make_plan(large, None, True, ("text",), None).dtype == "int32"
    with pytest.raises(ValueError, match="token id 70000 of byte does not fit --dtype uint16; use int32"):
        encode_piece(piece, large, make_plan(large, None, True, ("text",), "uint16"))
    wrong = replace(large, vocabulary=60_000)
    with pytest.raises(ValueError, match="produced token id 70000, beyond its vocabulary 60000"):
        encode_piece(piece, wrong, make_plan(wrong, None, True, ("text",), "int32"))
    with pytest.raises(ValueError, match="--dtype float32 is not one of"):
        make_plan(large, None, True, ("text",), "float32")
    with pytest.raises(ValueError, match="names no end-of-document token; choose one with --eod-id"):
        make_plan(replace(large, eod=None), None, True, ("text",), None)


def dataset_sources(path: Path) -> list[pieces.Source]:
    from megatron_cp.corpus.sources import find_sources

    return find_sources([str(path)]).sources


def test_dtype_is_chosen_as_megatron_does() -> None:
    from dataclasses import replace

    from megatron.core.datasets.indexed_dataset import DType

    from megatron_cp.corpus.encode import make_plan

    for vocabulary in (257, 65499, 65500, 65501, 65536, 200_000):
        plan = make_plan(replace(load_tokenizer("byte"), vocabulary=vocabulary), None, True, ("text",), None)
        assert plan.dtype == DType.optimal_dtype(vocabulary).__name__


def test_data_path_is_checked_as_megatron_reads_it(tmp_path: Path) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    for name in ("a", "b"):
        build(tmp_path / name, jsonl(tmp_path / "x.jsonl", [name]))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert [found.prefix for found in check_data_path([a])] == [a]
    assert [found.prefix for found in check_data_path(["30", a, "70", b])] == [a, b]
    assert [found.prefix for found in check_data_path([a, b, "s3://bucket/c"])] == [a, b]
    for words in ([a], ["30", a, "70", b], [a, b], [f" {a}", b, b], ["1e-3", a]):
        assert [found.prefix for found in check_data_path(words)] == get_blend_from_list(words)[0]
    with pytest.raises(ValueError, match="has weights before some prefixes; give all of them one, or none"):
        check_data_path(["30", a, b, b])
    with pytest.raises(ValueError, match=r"nowhere.bin not found"):
        check_data_path([a, str(tmp_path / "nowhere")])


@pytest.mark.parametrize("documents", [1, 3, 24, 25, 60])
@pytest.mark.parametrize("split", ["98,2,0", "99,1,0", "100,0,0", "0.9,0.1,0", None])
def test_split_without_a_document_is_refused(tmp_path: Path, documents: int, split: str | None) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    prefix = tmp_path / "a"
    build(prefix, jsonl(tmp_path / "x.jsonl", [f"text {number}" for number in range(documents)]))
    found = check_data_path([str(prefix)])
    # as many documents as Megatron's builder gives each dataset
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split or "969,30,1"))
    given = [len(range(*(round(share * documents) for share in between))) for between in matrix if between]
    if 0 in given:
        with pytest.raises(ValueError, match=f"leaves the .* none of the {documents} documents of {prefix}: "):
            check_split(found, split)
    else:
        check_split(found, split)
    check_split(found, split, only_train=True)
    if matrix[1] is None:
        with pytest.raises(ValueError, match=f"--split {split} has no validation data, .* add --eval-iters 0"):
            check_split(found, split, evaluates=True)


def test_no_batches_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text"):
        write(str(tmp_path / "out"), [], "uint16")
    with pytest.raises(ValueError, match="--workers 0"):
        next(encode([], None, 0))  # type: ignore[arg-type]
