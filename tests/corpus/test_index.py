import struct
import warnings
from pathlib import Path

import pytest

from megatron_cp.corpus.index import DTYPES, HEADER, MAGIC, check_prefix, first_document
from tests.corpus.reading import build, jsonl


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    build(tmp_path / "corpus", jsonl(tmp_path / "a.jsonl", ["first", "and second"]))
    return tmp_path / "corpus"


def test_format_is_megatrons() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset

    assert indexed_dataset._INDEX_HEADER == MAGIC
    assert {each.value: each.name for each in indexed_dataset.DType} == DTYPES


def test_statistics_and_first_document(prefix: Path) -> None:
    found = check_prefix(str(prefix))
    assert found == (str(prefix), 2, 2, 17, "uint16", 34, 11)
    assert bytes(first_document(str(prefix), found, 3).astype("uint8")) == b"fir"
    assert first_document(str(prefix), found, 99).tolist() == [*b"first", 256]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_half_is_named(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"corpus\.{suffix} not found although .* exists; build it with"):
        check_prefix(str(prefix))


def test_missing_pair_and_suffix_given_by_mistake(prefix: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.idx and .*nothing.bin not found; build it"):
        check_prefix(str(prefix.parent / "nothing"))
    with pytest.raises(ValueError, match=r"shall be given without \.idx"):
        check_prefix(f"{prefix}.idx")


@pytest.mark.parametrize("kept", range(HEADER.size + 2 * 12 + 3 * 8))
def test_index_cut_anywhere_is_truncated(prefix: Path, kept: int) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"corpus.idx is truncated: .* build the corpus again"):
        check_prefix(str(prefix))


@pytest.mark.parametrize("kept", [0, 1, 32, 33])
def test_bin_cut_anywhere_is_truncated(prefix: Path, kept: int) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"corpus.bin is truncated: {kept} bytes instead of 34"):
        check_prefix(str(prefix))


def test_bin_of_another_corpus_is_refused(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(bytes(40))
    with pytest.raises(ValueError, match="longer than its index says: 40 bytes instead of 34"):
        check_prefix(str(prefix))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "why"),
    [
        (0, "<B", 0, "is not an index"),
        (9, "<Q", 2, "is not an index"),
        (17, "<B", 99, "is not an index"),
        (18, "<Q", 1 << 60, "truncated"),
        (18, "<Q", 1, "damaged"),
        (HEADER.size, "<i", -6, "contradict"),
        (HEADER.size + 16, "<q", 4, "contradict"),
        (HEADER.size + 40, "<q", 1, "contradict"),
    ],
)
def test_damage_is_found(prefix: Path, offset: int, layout: str, value: int, why: str) -> None:
    path = Path(f"{prefix}.idx")
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, offset, value)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=why) as caught:
        check_prefix(str(prefix))
    assert "\n" not in str(caught.value)
