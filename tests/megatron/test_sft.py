"""`--sft` through the real pretrain(): the same losses and gradient norms on any number of ranks, a loss on answers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_cp.corpus.conversations import (
    ChatTemplate,
    ConversationFile,
    Encoded,
    check_conversations,
    encoder,
    split_at_system,
    template_text,
)
from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.command_line import check_script, wants_layers
from megatron_cp.megatron.process.conversation_samples import packed_sample
from tests.cases import slow_unless
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.megatron.test_packed import counted, laid
from tests.megatron.test_parity import PIPELINE, RECOMPUTED, TENSOR, assert_equal_runs, context
from tests.ranks import run_ranks

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flags of a file of conversations of numbers, some longer than a sample."""
    path, numbers = tmp_path_factory.mktemp("sft"), random.Random(0)

    def message(role: str) -> dict[str, str]:
        words = [str(numbers.randrange(126)) for _ in range(numbers.randrange(1, 12))]
        return {"role": role, "content": " ".join(words)}

    with open(path / "chats.jsonl", "w") as file:
        for _ in range(40):
            roles = ["system", "user", "assistant", "user", "assistant"] * numbers.randrange(1, 4)
            file.write(json.dumps({"messages": [message(role) for role in roles]}) + "\n")
    (path / "template.jinja").write_text(TEMPLATE)
    return (
        f"--sft --data-path {path}/chats.jsonl --chat-template {path}/template.jinja --split 100,0,0 "
        "--seq-length 64 --max-position-embeddings 64"
    )


def sft_run(data: str, *flags: str) -> list[str]:
    return tiny(data, *flags, without="--mock-data")


def losses(ranks: int, data: str, *flags: str) -> list[dict[str, Any]]:
    results = run_ranks(ranks, counted, sft_run(data, *flags))
    assert all(packed for _, packed in results), "attention saw one document"
    return results[0][0]


@pytest.fixture(scope="module")
def alone(data: str) -> Any:
    """Runs on one rank, by their flags, each made once."""
    runs: dict[str, list[dict[str, Any]]] = {}

    def run(flags: str = "") -> list[dict[str, Any]]:
        if flags not in runs:
            runs[flags] = losses(1, data, flags)
        return runs[flags]

    return run


ONE = "--micro-batch-size 1"
TWO = "--context-parallel-size 2"
AHEAD = "--mtp-num-layers 1 --calculate-per-token-loss"
# flags of the run, those of the run on one rank that it equals, ranks
CASES = {
    "two ranks": (TWO, "", 2),
    "four ranks, ulysses and all-gather": (context("ulysses all-gather", 4), "", 4),
    "zb-h1, distributed optimizer": (
        f"{TWO} {PIPELINE} {ONE} --pp-schedule zb-h1 --use-distributed-optimizer",
        ONE,
        4,
    ),
    "middle stage": (f"--pipeline-model-parallel-size 3 {ONE} --num-layers 3", f"{ONE} --num-layers 3", 3),
    "tensor and sequence parallel, recomputed": (f"{TWO} {TENSOR} {RECOMPUTED}", "", 4),
    "pipeline, two samples, tokens ahead": (f"{TWO} {PIPELINE} {AHEAD} --pp-schedule zb-h1", AHEAD, 4),
}


@pytest.mark.parametrize("name", slow_unless(["two ranks"], CASES), ids=lambda name: name)
def test_conversations_train_alike_on_all_ranks(alone: Any, data: str, name: str) -> None:
    flags, reference, ranks = CASES[name]
    assert_equal_runs(losses(ranks, data, flags), alone(reference))


# on four ranks; the other layouts take the same way: test_packed.py
@pytest.mark.slow
def test_conversations_cut_by_their_documents_train_as_on_one_rank(alone: Any, data: str) -> None:
    flags = "--context-parallel-size 4 --cp-comm-type all-gather --cp-document-layout blocks"
    results = run_ranks(4, laid, sft_run(data, flags))
    assert {call for _, calls, _ in results for call in calls} == {(True, "blocks")}
    assert_equal_runs(next(run for run, *_ in results if run), alone())


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_conversations_that_follow(data: str, tmp_path: Path) -> None:
    flags = f"{TWO} --use-distributed-optimizer"
    unbroken = losses(2, data, f"{flags} --save {tmp_path} --save-interval 2")
    resumed = losses(2, data, f"{flags} --load {tmp_path} --ckpt-step 2")
    assert [step["iteration"] for step in resumed] == [3, 4]
    assert_equal_runs([*unbroken[:2], *resumed], unbroken)


def evaluated(flags: list[str]) -> list[float]:
    """The validation losses of a run, from the rank that has them."""
    import torch

    from megatron_cp.megatron.rebind import replace, restore

    found: list[float] = []

    def kept(old: Any) -> Any:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = old(*args, **kwargs)
            found.extend(float(loss) for loss in result[0].values())
            return result

        return evaluate

    replaced = replace("megatron.training.training:evaluate", kept)
    try:
        pretrain_losses(flags)
    finally:
        restore(replaced)
    logs: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(logs, found)
    return next((log for log in logs if log), [])


@pytest.mark.slow
def test_validation_has_the_loss_of_one_rank(data: str) -> None:
    flags = f"{data} --split 50,50,0 --eval-interval 2 --eval-iters 1"
    expected, found = (run_ranks(ranks, evaluated, sft_run(flags, more))[0] for ranks, more in ((1, ""), (2, TWO)))
    assert len(expected) >= 2
    assert found == pytest.approx(expected, rel=1e-6)


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "uu"},
    {"role": "assistant", "content": "aa"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b"},
]
PROMPTING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}>{% endif %}{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def characters(text: str) -> list[int]:
    return [ord(each) for each in text]


def test_only_answers_are_trained_on() -> None:
    encoded = ChatTemplate(PROMPTING, characters)(CHAT)
    assert "".join(map(chr, encoded.tokens)) == "s.uu.>aa.v.>b."
    answers = [chr(token) for token, answer in zip(encoded.tokens, encoded.answers, strict=True) if answer]
    assert answers == ["a", "a", ".", "b", "."]


def test_megatrons_own_tokenizer_says_which_tokens_answer() -> None:
    class Tokenizer:
        def tokenize_conversation(self, conversation: Any, *, return_target: bool, add_generation_prompt: bool) -> Any:
            assert (return_target, add_generation_prompt) == (True, False)
            return [5, 6, 7], [-100, 6, 7]

    assert encoder(Tokenizer(), None)(CHAT) == Encoded([5, 6, 7], [False, True, True])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for", "no template of Jinja"),
        ("{{ nothing.more }}", "fails on a conversation"),
        ("{{ messages[-1].content }}", "changes the text of earlier messages .* at a message of user; use one that"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str, text: str) -> None:
    with pytest.raises(Refused, match=text):
        ChatTemplate(template, characters)(CHAT)


def test_a_template_comes_from_a_file_or_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "chat").write_text(PROMPTING)
    assert template_text(str(tmp_path / "chat")) == template_text(PROMPTING) == PROMPTING
    with pytest.raises(Refused, match=r"--chat-template chat\.jinja: No such file or directory; name a file"):
        template_text("chat.jinja")


@pytest.mark.parametrize("text", ["", "hello"])
def test_a_file_without_a_template_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat").write_text(text)
    with pytest.raises(Refused, match=r"chat' is no chat template: .*; name a file that loops over `messages`"):
        template_text(str(tmp_path / "chat"))


def test_a_system_message_starts_a_conversation() -> None:
    assert split_at_system(CHAT[1:3] + CHAT + CHAT) == [CHAT[1:3], CHAT, CHAT]


def test_a_sample_ends_in_a_document_of_pads() -> None:
    sample = packed_sample([Encoded([1, 2, 3], [False, True, True]), Encoded([], []), Encoded([4], [True])], 6, 0)
    assert sample["tokens"].tolist() == [1, 2, 3, 4, 0, 0]
    assert sample["labels"].tolist() == [2, 3, 0, 0, 0, 0]
    # 4 has no token before it in its document
    assert sample["loss_mask"].tolist() == [1, 1, 0, 0, 0, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 0, 1]
    assert sample["cu_seqlens"].tolist() == [0, 3, 4, 6, 6, 6, 6]
    assert sample["max_seqlen"] == 3


def test_a_long_conversation_is_cut_and_keeps_its_last_label() -> None:
    sample = packed_sample([Encoded([1, 2, 3], [True] * 3), Encoded([4, 5, 6], [True] * 3)], 5, 0)
    assert sample["tokens"].tolist() == [1, 2, 3, 4, 5]
    assert sample["labels"].tolist() == [2, 3, 0, 5, 6]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 1]
    assert sample["cu_seqlens"].tolist() == [0, 3, 5, 5, 5, 5]


def test_lines_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps({'messages': CHAT})}\n\n{json.dumps({'messages': CHAT[1:3]})}\n[]\n")
    lines = ConversationFile(str(file))
    assert (len(lines), lines[1], lines[0]) == (3, CHAT[1:3], CHAT)
    with pytest.raises(Refused, match="conversation 3: a line has no list of messages"):
        lines[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file or directory; --sft reads a JSONL file"),
        ("\n", "holds no conversation"),
        ("{", "a line is no JSON"),
        ('{"text": "a"}', "a line has no list of messages; write"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "one of system, user, assistant, tool, got .*bot"),
    ],
)
def test_files_that_hold_no_conversations_are_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "chats.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(Refused, match=words):
        check_conversations(["0.5", str(file)])


def test_conversations_need_our_layers_without_transformer_engine() -> None:
    assert wants_layers(["--sft"], te=False)
    assert not wants_layers(["--sft"], te=True)


def test_scripts_that_cut_each_document_are_refused() -> None:
    flags = ["--sft", "--context-parallel-size", "2"]
    with pytest.raises(Refused, match=r"run megatron_cp\.pretrain_gpt instead of the script"):
        check_script(flags, layers=True)
    check_script([*flags, "--calculate-per-token-loss"], layers=False)
    check_script(["--sft"], layers=True)
