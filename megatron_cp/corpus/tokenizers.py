"""Encode text as token ids: bytes by default; Hugging Face, SentencePiece and tiktoken from files on this machine.

Markers such as `<|endoftext|>` that stand in a text are encoded as ordinary characters, so that a document cannot end
another one; no tokenizer adds tokens of its own. The only special token in a corpus is the end of document.
"""

import base64
import importlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_cp.registry import suggest

BYTE = "byte"


@dataclass(frozen=True)
class Tokenizer:
    """Ids are below `vocabulary`; `eod` is None when the file names no end of document.

    `flags` are Megatron's own tokenizer flags for this vocabulary and end of document, `hint` explains them.
    """

    name: str
    vocabulary: int
    eod: int | None
    encode: Callable[[str], Sequence[int] | NDArray[np.integer[Any]]]
    flags: tuple[str, ...]
    hint: str = ""


def load_tokenizer(name: str, eod: int | None = None) -> Tokenizer:
    """Load the tokenizer called `byte`, or one in a file: tokenizer.json, SentencePiece model, tiktoken vocabulary.

    A folder is searched for tokenizer.json and tokenizer.model. `eod` replaces the end-of-document id of the file.
    Raises ValueError when there is no such file or its content is of no known kind, RuntimeError when the package that
    reads it is not installed.
    """
    path = Path(name)
    if name == BYTE:
        loaded = _byte_level()
    elif path.exists():
        loaded = _load_file(_in_folder(path) if path.is_dir() else path)
    else:
        raise ValueError(
            f"tokenizer {name!r} is neither {BYTE!r} nor an existing file{suggest(name, [BYTE])}; "
            "give the path of a tokenizer.json, SentencePiece .model or .tiktoken file"
        )
    return loaded if eod is None else _with_eod(loaded, eod)


def _with_eod(tokenizer: Tokenizer, eod: int) -> Tokenizer:
    if not 0 <= eod < tokenizer.vocabulary:
        raise ValueError(
            f"--eod-id {eod} is not in the vocabulary of {tokenizer.name}: 0 to {tokenizer.vocabulary - 1}"
        )
    flags = _null_flags(tokenizer.vocabulary, eod)
    return Tokenizer(tokenizer.name, tokenizer.vocabulary, eod, tokenizer.encode, flags)


def _null_flags(vocabulary: int, eod: int | None) -> tuple[str, ...]:
    # training reads ids, never text: Megatron's NullTokenizer stands for any vocabulary with its size and its eod
    size = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary))
    return size if eod is None else (*size, "--null-tokenizer-eod-id", str(eod))


def _byte_level() -> Tokenizer:
    # ids 0 to 255 are UTF-8 bytes and 256 ends a document; Megatron's own byte tokenizer cannot be chosen by a flag
    return Tokenizer(BYTE, 257, 256, _bytes_of, _null_flags(257, 256))


def _bytes_of(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _in_folder(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"tokenizer folder {folder} holds neither tokenizer.json nor tokenizer.model")


def _load_file(path: Path) -> Tokenizer:
    raw = path.read_bytes()
    try:
        if raw.lstrip()[:1] in (b"{", b"["):
            return _load_json(path, raw)
        if (ranks := _tiktoken_ranks(raw)) is not None:
            return _tiktoken(path, ranks)
        # the first field of SentencePiece's protobuf is the list of pieces
        if raw[:1] == b"\n":
            return _sentencepiece(path, raw)
    except ImportError as error:
        raise RuntimeError(f"tokenizer {path} needs the package {error.name}: pip install {error.name}") from error
    raise _unknown(path)


def _unknown(path: Path, why: str = "") -> ValueError:
    reason = f" ({why})" if why else ""
    return ValueError(
        f"tokenizer {path} is of no known kind{reason}; known: Hugging Face tokenizer.json, SentencePiece model, "
        "tiktoken vocabulary (lines of base64 and rank, or a JSON list of ranks)"
    )


def _load_json(path: Path, raw: bytes) -> Tokenizer:
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise _unknown(path, f"not JSON: {error}") from None
    if isinstance(content, dict) and "model" in content:
        return _hugging_face(path, raw.decode())
    if isinstance(content, list) and content and isinstance(content[0], dict) and "token_bytes" in content[0]:
        return _tiktoken_json(path, content)
    raise _unknown(path, "JSON, but neither a tokenizer with a 'model' nor a list of 'token_bytes'")


def _hugging_face(path: Path, content: str) -> Tokenizer:
    library = importlib.import_module("tokenizers")
    try:
        model = library.Tokenizer.from_str(content)
    except Exception as error:
        raise _unknown(path, str(error)) from None
    # a file saved after fine-tuning may cut or pad every text
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    vocabulary = max(model.get_vocab(with_added_tokens=True).values()) + 1
    eod = _hugging_face_eod(path, model)
    folder = shlex.quote(str(path.parent))
    hint = f"or, with the package transformers: --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"

    def encode(text: str) -> Sequence[int]:
        return model.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    return Tokenizer(str(path), vocabulary, eod, encode, _null_flags(vocabulary, eod), hint)


# what published models call the end of a document, when no tokenizer_config.json says it
EOD_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "<|EOT|>", "[EOS]", "[SEP]")


def _hugging_face_eod(path: Path, model: Any) -> int | None:
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        named = _eos_token(config)
        named = named.get("content") if isinstance(named, dict) else named
        if named is not None:
            return model.token_to_id(named)  # type: ignore[no-any-return]
    ids = (model.token_to_id(name) for name in EOD_NAMES)
    return next((found for found in ids if found is not None), None)


def _eos_token(config: Path) -> Any:
    try:
        content = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config} beside the tokenizer is not JSON: {error}; mend it or take it away") from None
    if not isinstance(content, dict):
        raise ValueError(f"{config} beside the tokenizer is not a JSON object; mend it or take it away")
    return content.get("eos_token")


def _sentencepiece(path: Path, raw: bytes) -> Tokenizer:
    library = importlib.import_module("sentencepiece")
    try:
        model = library.SentencePieceProcessor(model_proto=raw)
        vocabulary = model.get_piece_size()
    except Exception as error:
        raise _unknown(path, str(error)) from None
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", shlex.quote(str(path)))
    eod = model.eos_id() if model.eos_id() >= 0 else None
    return Tokenizer(str(path), vocabulary, eod, model.encode_as_ids, flags)


_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _cased_words(ending: str) -> str:
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return f"{lead}{upper}*{lower}+{ending}|{lead}{upper}+{lower}*{ending}"


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
GPT4O = rf"{_cased_words(_ENDINGS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
# what Megatron calls pattern v2
NEMO = rf"{_cased_words('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


class Published(NamedTuple):
    """Published tiktoken vocabulary, whose file holds neither its pattern nor its special tokens."""

    name: str
    pattern: str
    eod: int
    vocabulary: int


PUBLISHED = {
    50256: Published("r50k_base", GPT2, 50256, 50257),
    100256: Published("cl100k_base", GPT4, 100257, 100277),
    128000: Published("Llama 3", GPT4, 128001, 128256),
    199998: Published("o200k_base", GPT4O, 199999, 200019),
}


def _tiktoken_ranks(raw: bytes) -> dict[bytes, int] | None:
    """Read a rank for each token's bytes from lines of base64 and number; None for a file of another kind."""
    ranks = {}
    try:
        for line in raw.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return None
    return ranks or None


def _tiktoken(path: Path, ranks: dict[bytes, int]) -> Tokenizer:
    size = max(ranks.values()) + 1
    known = PUBLISHED.get(len(ranks), Published("unknown", GPT4, size, size + 1))
    hint = f"recognised as {known.name} by its {len(ranks)} ranks"
    if known.name == "unknown":
        hint = f"{len(ranks)} ranks belong to no published vocabulary: text was split by the pattern of cl100k_base"
    encode = _tiktoken_encode(path, ranks, known.pattern)
    return Tokenizer(str(path), known.vocabulary, known.eod, encode, _null_flags(known.vocabulary, known.eod), hint)


# Megatron puts its special tokens first, 1000 of them unless told; the third ends a document
NEMO_SPECIAL, NEMO_EOD = 1000, 2


def _tiktoken_json(path: Path, content: list[dict[str, Any]]) -> Tokenizer:
    try:
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] + NEMO_SPECIAL for entry in content}
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(path, f"a token without bytes or rank: {error!r}") from None
    vocabulary = len(ranks) + NEMO_SPECIAL
    kind = ("--tokenizer-type", "TikTokenizer", "--tokenizer-model", shlex.quote(str(path)))
    flags = (*kind, "--tiktoken-pattern", "v2", "--vocab-size", str(vocabulary))
    return Tokenizer(str(path), vocabulary, NEMO_EOD, _tiktoken_encode(path, ranks, NEMO), flags)


def _tiktoken_encode(path: Path, ranks: dict[bytes, int], pattern: str) -> Callable[[str], Sequence[int]]:
    library = importlib.import_module("tiktoken")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _unknown(path, f"a tiktoken vocabulary without a token for byte 0x{missing[0]:02x}")
    encoding = library.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary  # type: ignore[no-any-return]
