import gzip
import sysconfig
from pathlib import Path

import pytest

from megatron_cp.corpus.sources import find_sources, kind_of


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def _names(folder: Path, *globs: str) -> list[str]:
    return [source.path.relative_to(folder).as_posix() for source in find_sources([str(folder)], globs).sources]


def test_folder_is_searched_below_in_sorted_order(tmp_path: Path) -> None:
    _touch(tmp_path, "b.txt", "a/z.md", "a/b/c.jsonl.gz", "a.txt.zst", "code.py", ".hidden.txt", ".git/x.txt")
    assert _names(tmp_path) == ["a/b/c.jsonl.gz", "a/z.md", "a.txt.zst", "b.txt"]


def test_globs_match_names_and_paths_and_replace_the_suffixes(tmp_path: Path) -> None:
    _touch(tmp_path, "a.py", "src/b.py", "src/c.txt", "docs/d.txt")
    assert _names(tmp_path, "*.py") == ["a.py", "src/b.py"]
    assert _names(tmp_path, "src/*") == ["src/b.py", "src/c.txt"]


def test_inputs_stay_in_the_order_given_and_named_files_need_no_suffix(tmp_path: Path) -> None:
    _touch(tmp_path, "b.log", "a.txt")
    found = find_sources([str(tmp_path / "b.log"), str(tmp_path / "a.txt")]).sources
    assert [source.path.name for source in found] == ["b.log", "a.txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("a.jsonl", "jsonl"),
        ("a.JSONL.gz", "jsonl"),
        ("a.b.ndjson.zst", "jsonl"),
        ("a.jsonlines", "jsonl"),
        ("a.jl.gz", "jsonl"),
        ("jsonl", "text"),
        ("a.json.txt", "text"),
    ],
)
def test_kind_follows_the_suffix_under_the_compression(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize("name", ["a.jsonl.1", "a.JSON.bak", "a.ndjson.part.gz", "a.parquet.1"])
def test_records_under_an_unknown_suffix_are_refused(tmp_path: Path, name: str) -> None:
    _touch(tmp_path, name)
    inner = Path(name).suffixes[0].lower()
    with pytest.raises(ValueError, match=rf"{name} is {inner} by one suffix .* by a name that ends in {inner}$"):
        find_sources([str(tmp_path / name)])


@pytest.mark.parametrize("start", [b'{"text": "a"}\n', b'\xef\xbb\xbf [{"text": "a"}]'])
@pytest.mark.parametrize("name", ["part-00000", "a.data", "part-00000.gz", "a.1"])
def test_json_under_a_name_of_plain_text_is_refused(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(start) if name.endswith(".gz") else start)
    for given in (str(path), str(tmp_path / (name[:3] + "*"))):
        with pytest.raises(ValueError, match=rf"{name} holds JSON, which its name does not say, .* ends in \.json"):
            find_sources([given])
    path = tmp_path / "a.txt"
    path.write_bytes(start)
    assert find_sources([str(path)]).sources[0].kind == "text"


def test_standard_library_is_there_without_tests_and_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [source.path.relative_to(root) for source in find_sources(["python-stdlib"]).sources]
    assert Path("argparse.py") in names
    assert Path("asyncio/events.py") in names
    assert names == sorted(names, key=lambda path: path.parts)
    assert not {"site-packages", "test"} & {part for name in names for part in name.parts}


def test_missing_path_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="'python-stlib' does not exist; did you mean 'python-stdlib'"):
        find_sources(["python-stlib"])


def test_folder_without_text_names_what_was_looked_for(tmp_path: Path) -> None:
    _touch(tmp_path, "a.py")
    with pytest.raises(ValueError, match=r"no file below .* matches \*\.txt .*--glob"):
        find_sources([str(tmp_path)])
