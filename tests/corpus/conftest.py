"""Small corpora and tokenizers, made here: nothing is downloaded."""

import base64
import json
import warnings
from pathlib import Path

import pytest

TEXTS = (
    "Hello world, this is a first document.\nIt has two lines.",
    "Umlaute äöü, 漢字, and 🙂 need more than one byte each.",
    "def add(a, b):\n    return a + b  # 42\n",
    "A text may say </s> or <|endoftext|> without ending there.",
)


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind that a tokenizer can be loaded from."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "hugging-face": _hugging_face(folder / "tokenizer.json"),
        "sentencepiece": _sentencepiece(folder / "pieces"),
        "tiktoken": _tiktoken(folder / "ranks.tiktoken"),
        "tiktoken-json": _tiktoken_json(folder / "ranks.json"),
    }


def ranks() -> list[bytes]:
    return [bytes([byte]) for byte in range(256)] + [b"th", b"is", b" a", b" d", b"oc", b"this"]


def _hugging_face(path: Path) -> Path:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    # what must not leak into a corpus: a begin token, cutting, padding
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.enable_truncation(5)
    model.enable_padding(length=50)
    model.save(str(path))
    return path


def _sentencepiece(prefix: Path) -> Path:
    with warnings.catch_warnings():
        # its SWIG wrapper defines types without a module
        warnings.simplefilter("ignore", DeprecationWarning)
        import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()] * 20),
        model_prefix=str(prefix),
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def _tiktoken(path: Path) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks())))
    return path


def _tiktoken_json(path: Path) -> Path:
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(ranks())
    ]
    path.write_text(json.dumps(entries))
    return path
