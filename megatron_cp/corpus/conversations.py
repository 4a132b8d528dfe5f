"""Conversations of a JSONL file, and their tokens by a chat template, for `--sft`.

A line holds `messages`, each with a `role` and a `content`; a message of the system starts the next conversation of the
line.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_cp.errors import Refused

ROLES = ("system", "user", "assistant", "tool")
# target of Megatron's SFTTokenizer for what is not an answer
_IGNORED = -100

type Conversation = list[dict[str, Any]]


class Encoded(NamedTuple):
    """Tokens of a conversation, and for each True if it belongs to an answer, which is trained on."""

    tokens: list[int]
    answers: list[bool]


type Encode = Callable[[Conversation], Encoded]


class ConversationFile:
    """Lines of a JSONL file, each a list of messages, read when they are asked for; empty lines are left out.

    Raises ValueError for a line that is no list of messages.
    """

    def __init__(self, path: str) -> None:
        self.path, starts, place = path, [], 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(place)
                place += len(line)
        self._starts = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Conversation:
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[index]))
            return _messages(file.readline(), f"{self.path}, conversation {index + 1}")


def split_at_system(messages: Conversation) -> list[Conversation]:
    """Return the conversations of a line: a message of the system starts the next one."""
    found: list[Conversation] = []
    for message in messages:
        if message["role"] == "system" or not found:
            found.append([])
        found[-1].append(message)
    return found


def encoder(tokenizer: Any, template: str | None) -> Encode:
    """Return the function that encodes a conversation: by the chat template, or by Megatron's SFTTokenizer itself.

    template: --chat-template, a template of Jinja or the path of a file that holds one
    Raises ValueError for a template that cannot be read.
    """
    if template is None:
        return lambda conversation: _by_tokenizer(tokenizer, conversation)
    return ChatTemplate(template_text(template), tokenizer.tokenize)


def _by_tokenizer(tokenizer: Any, conversation: Conversation) -> Encoded:
    tokens, targets = tokenizer.tokenize_conversation(conversation, return_target=True, add_generation_prompt=False)
    return Encoded([int(token) for token in tokens], [int(target) != _IGNORED for target in targets])


class ChatTemplate:
    """A chat template that encodes conversations message by message, so that it is known which tokens answer.

    The prompt of an answer, which the template adds for `add_generation_prompt`, is no part of the answer.
    Raises ValueError for a template that fails, and for one that rewrites earlier messages when later ones follow.
    """

    def __init__(self, text: str, text_to_ids: Callable[[str], Sequence[int]]) -> None:
        self._text_to_ids = text_to_ids
        try:
            self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
        except TemplateError as error:
            raise Refused(f"--chat-template is no template of Jinja: {error}; correct it") from None

    def __call__(self, conversation: Conversation) -> Encoded:
        encoded, before = Encoded([], []), ""
        for index, message in enumerate(conversation):
            answers, text = message["role"] == "assistant", self._rendered(conversation[: index + 1])
            prompt = self._rendered(conversation[:index], prompt=True) if answers else before
            if prompt.startswith(before) and text.startswith(prompt):
                self._add(encoded, prompt[len(before) :], False)
                before = prompt
            if not text.startswith(before):
                raise Refused(
                    "--chat-template changes the text of earlier messages when a later one follows, so that no token "
                    f"can be told to be of an answer, at a message of {message['role']}; use one that only appends"
                )
            self._add(encoded, text[len(before) :], answers)
            before = text
        return encoded

    def _add(self, encoded: Encoded, text: str, answers: bool) -> None:
        tokens = list(self._text_to_ids(text)) if text else []
        encoded.tokens.extend(tokens)
        encoded.answers.extend([answers] * len(tokens))

    def _rendered(self, messages: Conversation, prompt: bool = False) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt)
        except TemplateError as error:
            raise Refused(f"--chat-template fails on a conversation: {error}; correct one of the two") from None


def template_text(template: str) -> str:
    """Return the text of --chat-template, from its file if it names one.

    Raises ValueError for a file that is not there, and for a text in which no `messages` stand.
    """
    text = template if "{" in template or "\n" in template else _file_text(template)
    if "messages" not in text:
        raise Refused(
            f"--chat-template {template!r} is no chat template: it writes the same text for any messages; name a file "
            f"that loops over `messages`"
        )
    return text


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise Refused(f"--chat-template {path}: {reason}; name a file with a template of Jinja") from None


def check_conversations(paths: Sequence[str]) -> None:
    """Check the first line of each file of --data-path, with or without weights; ValueError says which is wrong."""
    for path in paths:
        if _is_weight(path):
            continue
        try:
            with open(path, "rb") as file:
                first = next((line for line in file if line.strip()), None)
        except OSError as error:
            raise Refused(f"--data-path {path}: {error.strerror}; --sft reads a JSONL file of conversations") from None
        if first is None:
            raise Refused(f"--data-path {path} holds no conversation; --sft reads one from each line")
        _messages(first, path)


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _messages(line: bytes, where: str) -> Conversation:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise Refused(f"{where}: a line is no JSON ({error}); --sft reads JSONL with messages") from None
    messages = found.get("messages") if isinstance(found, dict) else None
    if not messages or not isinstance(messages, list):
        raise Refused(f'{where}: a line has no list of messages; write {{"messages": [{{"role": …, "content": …}}]}}')
    for message in messages:
        if not isinstance(message, dict) or "content" not in message or message.get("role") not in ROLES:
            raise Refused(
                f"{where}: a message has a content and a role, one of {', '.join(ROLES)}, got "
                f"{json.dumps(message)[:80]}; correct the line"
            )
    return messages
