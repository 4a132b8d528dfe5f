import argparse
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cp.corpus import tokenizers
from megatron_cp.corpus.tokenizers import Tokenizer, load_tokenizer
from tests.corpus.conftest import TEXTS

KINDS = ["hugging-face", "sentencepiece", "tiktoken", "tiktoken-json"]


@pytest.fixture(autouse=True)
def _rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # megatron.core warns when it has to guess it
    monkeypatch.setenv("RANK", "0")


def _megatron(tokenizer: Tokenizer) -> Any:
    """The tokenizer that megatron.core builds from our flags, parsed by its own parser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        from megatron.training.arguments import _add_tokenizer_args

    parser = argparse.ArgumentParser()
    _add_tokenizer_args(parser)
    args = parser.parse_args(list(tokenizer.flags))
    sizes = {"rank": 1, "make_vocab_size_divisible_by": 1, "tensor_model_parallel_size": 1}
    return build_tokenizer(argparse.Namespace(**vars(args), **sizes))


def test_bytes_are_utf8_and_256_ends_a_document() -> None:
    tokenizer = load_tokenizer("byte")
    assert bytes(np.asarray(tokenizer.encode("ä🙂"), np.uint8)).decode() == "ä🙂"
    assert (tokenizer.vocabulary, tokenizer.eod) == (257, 256)


@pytest.mark.parametrize("kind", ["byte", *KINDS])
def test_megatron_flags_mean_the_same_size_and_end_of_document(kind: str, vocabularies: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(vocabularies.get(kind, kind)))
    theirs = _megatron(tokenizer)
    assert theirs.vocab_size == tokenizer.vocabulary
    assert theirs.eod == tokenizer.eod


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken-json"])
@pytest.mark.parametrize("text", TEXTS[:3])
def test_ids_are_those_of_megatrons_own_tokenizer(kind: str, text: str, vocabularies: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(vocabularies[kind]))
    assert list(tokenizer.encode(text)) == _megatron(tokenizer).tokenize(text)


@pytest.mark.parametrize("kind", ["hugging-face", "tiktoken"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_decode_to_the_text_with_its_markers(kind: str, text: str, vocabularies: dict[str, Path]) -> None:
    import tiktoken.load
    import tokenizers as library

    path = vocabularies[kind]
    ids = list(load_tokenizer(str(path)).encode(text))
    if kind == "hugging-face":
        assert library.Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=True) == text
    else:
        tokens = {rank: token for token, rank in tiktoken.load.load_tiktoken_bpe(str(path)).items()}
        assert b"".join(tokens[each] for each in ids).decode() == text


def test_patterns_are_those_of_megatron_and_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    import regex
    import tiktoken_ext.openai_public as public
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer

    assert tokenizers.NEMO == tiktoken_tokenizer._PATTERN_TIKTOKEN_V2
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    text = Path(regex.__file__).read_text() + "".join(TEXTS) + "I'LL we'Re  HTTPServer\t1234567 \r\n\n  x/\n/ É́tude "
    for name, ours in (("r50k_base", 50256), ("cl100k_base", 100256), ("o200k_base", 199998)):
        theirs = getattr(public, name)()
        known = tokenizers.PUBLISHED[ours]
        assert regex.findall(known.pattern, text) == regex.findall(theirs["pat_str"], text)
        assert theirs["special_tokens"]["<|endoftext|>"] == known.eod
        assert max(theirs["special_tokens"].values()) + 1 == known.vocabulary


def test_folder_stands_for_the_tokenizer_in_it_and_its_config_names_the_end(
    tmp_path: Path, vocabularies: dict[str, Path]
) -> None:
    shutil.copy(vocabularies["hugging-face"], tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).eod == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load_tokenizer(str(tmp_path)).eod == 0


def test_end_of_document_can_be_chosen(vocabularies: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(vocabularies["sentencepiece"]), eod=7)
    assert tokenizer.eod == _megatron(tokenizer).eod == 7
    with pytest.raises(ValueError, match="--eod-id 257 is not in the vocabulary of byte: 0 to 256"):
        load_tokenizer("byte", eod=257)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "of no known kind"),
        (b"\x00\x01\x02", "of no known kind"),
        (b"{broken", "not JSON"),
        (b'{"a": 1}', "neither a tokenizer with a 'model'"),
        (b'{"model": {"type": "nonsense"}}', "of no known kind"),
        (b"\n\x05wrong", "of no known kind"),
        (b"aGVsbG8= 0\n", "without a token for byte 0x00"),
    ],
)
def test_file_of_no_known_kind_is_refused_in_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'bytes' is neither 'byte' nor an existing file; did you mean 'byte'"):
        load_tokenizer("bytes")
    with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "package"), [("hugging-face", "tokenizers"), ("sentencepiece", "sentencepiece"), ("tiktoken", "tiktoken")]
)
def test_package_that_is_not_installed_is_named(
    kind: str, package: str, vocabularies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=f"needs the package {package}: pip install {package}"):
        load_tokenizer(str(vocabularies[kind]))


def test_nothing_here_imports_torch() -> None:
    modules = "megatron_cp.cli, megatron_cp.corpus.encode, megatron_cp.corpus.index"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
