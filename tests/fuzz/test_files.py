"""Recipes, clusters, costs, tables, corpora and checkpoints that are nearly right are read, or named in one line."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_cp.config import configs_folder
from megatron_cp.corpus.index import check_prefix
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.pipeline import costs_file
from tests.cli.test_report import LOG
from tests.fuzz.commands import asked, assert_said_by_us
from tests.fuzz.conftest import Cases, cases
from tests.fuzz.strategies import HOSTILE, changed, damaged
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=6)
RECIPES = sorted((configs_folder() / "recipes").glob("*.yaml"))
CLUSTERS = sorted((configs_folder() / "clusters").glob("*.yaml"))
# a case of these takes a second or more
FEW = settings(max_examples=cases or 3)
TABLE = """0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3
"""
COSTS = """model:
  num_layers: 4
  hidden_size: 64
  seq_length: 32
  micro_batch_size: 1
  tensor_model_parallel_size: 1
  context_parallel_size: 1
  pipeline_model_parallel_size: 2
  virtual_pipeline_model_parallel_size: 1
T_F: [1.0, 2.0]
T_I: [1.0, 2.0]
T_W: [1.0, 0.5]
T_comm: 0.1
M_B: [10, 20]
M_W: [5, 5]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(st.data())
def test_recipe(counted: Cases, folder: Path, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(RECIPES)).read_text()
    (folder / "recipe.yaml").write_bytes(data.draw(changed(whole)).encode(errors="surrogatepass"))
    flags = data.draw(st.lists(HOSTILE.filter(lambda word: word and "\0" not in word), max_size=2))
    with counted.one():
        code, _ = asked("render", str(folder / "recipe.yaml"), *flags)
        counted.refused += code != 0


@given(st.data())
def test_cluster(counted: Cases, folder: Path, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(CLUSTERS)).read_text()
    (folder / "cluster.yaml").write_bytes(data.draw(changed(whole)).encode(errors="surrogatepass"))
    with counted.one():
        try:
            load_cluster(str(folder / "cluster.yaml"))
        except ValueError as refusal:
            assert_said_by_us(refusal)
            counted.refused += 1


@given(changed(COSTS))
@example(COSTS.replace("model:", "model: &a").replace("num_layers:", "num_layers: &a"))
@example(COSTS.replace("T_comm: 0.1", f"T_comm: {'9' * 5000}"))
@example(COSTS.replace("T_comm: 0.1", f"T_comm: {'9' * 400}"))
def test_costs(counted: Cases, folder: Path, text: str) -> None:
    (folder / "costs.yaml").write_bytes(text.encode(errors="surrogatepass"))
    with counted.one():
        try:
            costs_file.read(folder / "costs.yaml")
        except ValueError as refusal:
            assert_said_by_us(refusal)
            counted.refused += 1


@example("9" * 5000 + "F0", "1,1,1,0")
@example("0F" + "9" * 5000, "1,1,1,0")
@given(changed(TABLE), st.sampled_from(["1,1,1,0", "1,2,0.5,0.1", "0,0,0,0", "1e308,1e308,1,1", "nan,1,1,1", "1,1"]))
def test_schedule_table(counted: Cases, folder: Path, text: str, times: str) -> None:
    (folder / "table.txt").write_bytes(text.encode(errors="surrogatepass"))
    with counted.one():
        code, _ = asked("simulate", "--table", str(folder / "table.txt"), "--times", times)
        counted.refused += code != 0


@FEW
@given(changed(LOG))
def test_report(counted: Cases, folder: Path, text: str) -> None:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "slurm-7.out").write_bytes(text.encode(errors="surrogatepass"))
    with counted.one():
        code, _ = asked("report", str(run))
        counted.refused += code != 0


@FEW
@given(st.data())
def test_validated_recipe(counted: Cases, folder: Path, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(RECIPES)).read_text()
    (folder / "validated.yaml").write_bytes(data.draw(changed(whole)).encode(errors="surrogatepass"))
    with counted.one():
        code, _ = asked("validate", str(folder / "validated.yaml"), "--cluster", "dgx-h100-ib")
        counted.refused += code != 0


def content_of(texts: list[str], kind: str) -> bytes:
    """Bytes of a file of this kind; a parquet file compresses its columns itself."""
    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind == ".parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), file)
        return file.getvalue()
    if kind == ".json":
        return json.dumps(records).encode()
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@given(TEXTS, st.sampled_from([".jsonl", ".json", ".parquet"]), st.sampled_from(sorted(COMPRESS)))
@example(["0", " "], ".jsonl", "")
@example([" "], ".jsonl", "")
def test_corpus_has_the_documents_of_its_file(
    counted: Cases, folder: Path, texts: list[str], kind: str, packed: str
) -> None:
    packed = "" if kind == ".parquet" else packed
    source = folder / f"whole{kind}{packed}"
    source.write_bytes(COMPRESS[packed](content_of(texts, kind)))
    with counted.one():
        output = folder / "whole"
        code, said = asked("data", "build", "--input", str(source), "--output", str(output), "--overwrite")
        # what is white space alone is counted as empty
        kept = [text for text in texts if text.strip()]
        if not kept:
            assert (code, said) == (1, f"the corpus has no text: {len(texts)} empty")
            return
        assert code == 0, said
        found = check_prefix(str(output))
        assert (found.documents, found.tokens) == (len(kept), sum(len(text.encode()) + 1 for text in kept))


@given(
    st.data(),
    TEXTS,
    st.sampled_from([".jsonl", ".json", ".txt", ".parquet"]),
    st.sampled_from(sorted(COMPRESS)),
    st.booleans(),
)
def test_damaged_corpus_file(
    counted: Cases, folder: Path, data: st.DataObject, texts: list[str], kind: str, packed: str, skip: bool
) -> None:
    packed = "" if kind == ".parquet" else packed
    source, output = folder / f"damaged{kind}{packed}", folder / "built" / "damaged"
    output.parent.mkdir(exist_ok=True)
    source.write_bytes(data.draw(damaged(COMPRESS[packed](content_of(texts, kind)))))
    written = [output.with_suffix(suffix) for suffix in (".bin", ".idx")]
    for path in written:
        path.unlink(missing_ok=True)
    with counted.one():
        words = ["--input", str(source), "--output", str(output), *(["--skip-bad"] if skip else [])]
        code, _ = asked("data", "build", *words, "--workers", "1")
        counted.refused += code != 0
        assert [path.is_file() for path in written] == [code == 0] * 2, "both files, or none"
        assert len(list(output.parent.iterdir())) == 2 * (code == 0), "nothing half-written is left"
        if code == 0:
            check_prefix(str(output))


@pytest.fixture(scope="module")
def corpus(folder: Path) -> dict[Path, bytes]:
    """Contents of the two files of a corpus."""
    source, output = folder / "source.jsonl", folder / "corpus"
    source.write_bytes(content_of(["one", "two", "three"], ".jsonl"))
    assert asked("data", "build", "--input", str(source), "--output", str(output))[0] == 0
    return {path: path.read_bytes() for path in (output.with_suffix(".bin"), output.with_suffix(".idx"))}


@contextmanager
def one_damaged(files: dict[Path, bytes], data: st.DataObject) -> Iterator[None]:
    """Damage one of the files inside the context; drawn before a case begins, which the clock may end."""
    path = data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(data.draw(damaged(files[path])))
    try:
        yield
    finally:
        path.write_bytes(files[path])


@given(st.data())
def test_damaged_corpus(counted: Cases, folder: Path, corpus: dict[Path, bytes], data: st.DataObject) -> None:
    with one_damaged(corpus, data), counted.one():
        code, _ = asked("data", "info", str(folder / "corpus"))
        counted.refused += code != 0


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> dict[Path, bytes]:
    """Contents of the files of a checkpoint that Megatron has saved, of which `inspect` says what it holds."""
    saved = folder / "checkpoint"
    flags = f"--train-iters 1 --save-interval 1 --ckpt-format torch_dist --save {saved}"
    run_ranks(1, pretrain_losses, tiny(flags))
    code, said = asked("inspect", str(saved))
    assert code == 0, said
    return {path: path.read_bytes() for path in sorted(saved.rglob("*")) if path.is_file()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@given(st.data())
def test_checkpoint(counted: Cases, folder: Path, checkpoint: dict[Path, bytes], data: st.DataObject) -> None:
    with one_damaged(checkpoint, data), counted.one():
        code, _ = asked("inspect", str(folder / "checkpoint"))
        counted.refused += code != 0
