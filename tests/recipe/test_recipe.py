"""Recipes say exactly which command they stand for, and where they are wrong."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cp.cli import data
from megatron_cp.megatron.arguments import foreign_flags, known_flags, recipe_flags
from megatron_cp.planner.model import model_of
from megatron_cp.recipe import file, recipe
from megatron_cp.recipe.command import (
    Command,
    check_processes,
    command,
    complete,
    corpus_command,
    corpus_words,
    flag_words,
    processes,
)
from megatron_cp.recipe.recipe import Recipe
from tests.conftest import Write

VARIABLES = {"DATA_PATH": "/data/corpus"}
# billions of parameters, from the published models
BILLIONS = {
    "llama2-7b": 6.74,
    "llama2-13b": 13.02,
    "llama2-70b": 68.98,
    "llama3-8b": 8.03,
    "llama3.1-8b": 8.03,
    "llama3-70b": 70.55,
    "llama3.1-70b": 70.55,
    "llama3.1-405b": 405.85,
    "llama3.2-1b": 1.24,
    "llama3.2-3b": 3.21,
    "mistral-7b": 7.25,
    "mixtral-8x7b": 46.7,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "gpt-oss-20b": 20.91,
    "deepseek-v3": 671.03,
    "mt-nlg-530b": 529.6,
}


@pytest.fixture(scope="session")
def megatron_parser() -> argparse.ArgumentParser:
    return known_flags.parser()


def said(section: recipe.Section) -> dict[str, tuple[str, ...]]:
    return {key: setting.values for key, setting in section.items()}


def parameters(run: Recipe) -> int:
    """The parameters of the dense LLaMA that the flags describe, or of a GPT as arXiv:2104.04473 counts them."""
    layers, hidden, ffn = (run.number(f"--{name}", 0) for name in ("num-layers", "hidden-size", "ffn-hidden-size"))
    if "--swiglu" not in run.model_args:
        ends = (run.number("--vocab-size", 0) + run.number("--max-position-embeddings", 0)) * hidden
        return layers * (4 * hidden**2 + 2 * hidden * ffn + 13 * hidden) + ends
    heads, width, vocabulary = (
        run.number(f"--{name}", 0) for name in ("num-attention-heads", "kv-channels", "vocab-size")
    )
    groups = run.number("--num-query-groups", heads) if "--group-query-attention" in run.model_args else heads
    attention = 2 * hidden * heads * width + 2 * hidden * groups * width
    embeddings = 2 if "--untie-embeddings-and-output-weights" in run.model_args else 1
    return embeddings * vocabulary * hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden


def test_values_are_literal_texts_lists_bare_flags_and_taken_back_flags(write: Write) -> None:
    write("MODEL_ARGS:\n  --bf16: true\n  --lr: 1.0e-5\n  --swiglu: true\n", "base.yaml")
    name = write(
        "extends: base\nENV_VARS:\n  A: true\nMODEL_ARGS:\n  --swiglu: false\n  --sizes: [4, 2]\n  --name: 'true'\n"
    )
    run = recipe.load(name, {})
    assert said(run.model_args) == {"--bf16": (), "--lr": ("1.0e-5",), "--sizes": ("4", "2"), "--name": ("true",)}
    assert said(run.env_vars) == {"A": ("true",)}


def test_later_parents_win_and_the_file_wins_over_all(write: Write) -> None:
    write("MODEL_ARGS: {--a: 1, --b: 1, --c: 1}\n", "one.yaml")
    write("MODEL_ARGS: {--b: 2, --c: 2}\nLAUNCH: {--nproc-per-node: 2}\n", "two.yaml")
    run = recipe.load(write("extends: [one, two.yaml]\nMODEL_ARGS: {--c: 3}\n"), {})
    assert said(run.model_args) == {"--a": ("1",), "--b": ("2",), "--c": ("3",)}
    assert said(run.launch) == {"--nproc-per-node": ("2",)}


def test_the_command_line_wins_and_stands_last(write: Write) -> None:
    name = write("MODEL_ARGS: {--lr: 1, --bf16: true, --seed: 1}\nLAUNCH: {--nproc-per-node: 2}\n")
    words = ["--lr", "-1e-3", "--bf16=false", "--split=9,1,0", "--sizes", "4", "2", "--nproc-per-node", "4"]
    run = recipe.load(name, {}, words)
    assert list(said(run.model_args).items()) == [
        ("--seed", ("1",)),
        ("--lr", ("-1e-3",)),
        ("--split", ("9,1,0",)),
        ("--sizes", ("4", "2")),
    ]
    assert said(run.launch) == {"--nproc-per-node": ("4",)}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("${A}/x", "a/x"),
        ("${B:-b}", "b"),
        ("${EMPTY:-b}", "b"),
        ("${A:-b}", "a"),
        ("${B:-${A}-${C:-c}}", "a-c"),
        ("$A {x}", "$A {x}"),
    ],
)
def test_variables_expand_as_in_a_shell(text: str, expanded: str) -> None:
    assert file.expand(text, {"A": "a", "EMPTY": ""}) == expanded


def test_a_variable_may_be_missing_where_the_value_is_replaced(write: Write) -> None:
    name = write("MODEL_ARGS:\n  --data-path: ${NOWHERE}\n")
    assert said(recipe.load(name, {}, ["--data-path", "here"]).model_args) == {"--data-path": ("here",)}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("MODEL_ARGS:\n  --lr: [1,\n", "run.yaml:3: not YAML"),
        ("MODEL_ARGS:\n  --a: b\n --c: d\n", "run.yaml:3: not YAML"),
        ("junk\nMODEL_ARGS:\n", "run.yaml:2: not YAML: a key stands below a text"),
        ("ENV_VARS: {}\njunk\nMODEL_ARGS:\n", "run.yaml:3: not YAML: a line is no 'key: value'"),
        ("'a'\n'b'\n", "run.yaml:2: not YAML: expected the end of the file but found a text"),
        ("just words\n", "run.yaml:1: a recipe is a mapping"),
        ("", "run.yaml:1: a recipe is a mapping"),
        ("MODEL_ARG:\n  --lr: 1\n", "run.yaml:1: unknown section 'MODEL_ARG'; did you mean 'MODEL_ARGS'?"),
        ("MODEL_ARGS:\n- --lr\n", "run.yaml:2: MODEL_ARGS is a mapping"),
        ("MODEL_ARGS:\n  --lr: 1\n  --lr: 2\n", "run.yaml:3: --lr is given twice, first in line 2"),
        ("MODEL_ARGS:\n  --lr:\n", "run.yaml:2: --lr: no value"),
        ("MODEL_ARGS:\n  --lr: {a: b}\n", "run.yaml:2: a value is one text"),
        ("MODEL_ARGS:\n  --lr: ${LR}\n", "run.yaml:2: --lr: variable LR is not set"),
        (
            "MODEL_ARGS:\n  --data-path: ${CORPUS}\n",
            "run.yaml:2: --data-path: variable CORPUS is not set; set it, give a default, ${CORPUS:-…}, or a value "
            "on the command line (megatron-cp data build makes one)",
        ),
        ("MODEL_ARGS:\n  --lr: ${LR-1}\n", "run.yaml:2: --lr: cannot read the variable"),
        ("LAUNCH:\n  --nproc: 1\n", "run.yaml:2: unknown LAUNCH key '--nproc'"),
        ("DATA:\n  --input: x\n  --outptu: y\n", "run.yaml:3: unknown DATA key '--outptu'; did you mean '--output'?"),
        ("DATA:\n  --input: x\n", "run.yaml:2: DATA needs --output"),
        ("CLUSTER: [a, b]\n", "run.yaml:1: CLUSTER: takes one text"),
        ("CLUSTR: a\n", "run.yaml:1: unknown section 'CLUSTR'; did you mean 'CLUSTER'?"),
        ("ENV_VARS:\n  A;touch x: 1\n", "run.yaml:2: 'A;touch x' is not a name of an environment variable"),
        ("LAUNCH:\n  entry: -c\n", "run.yaml:2: entry is a module such as megatron_cp.pretrain_gpt or a script"),
        ("LAUNCH:\n  entry: a b\n", "run.yaml:2: entry is a module"),
        (
            "MODEL_ARGS:\n  --save: !!python/object/apply:os.system [touch x]\n",
            "run.yaml:2: a recipe has texts and lists",
        ),
        ("MODEL_ARGS:\n  --save: !!python/name:os.system\n", "run.yaml:2: a recipe has texts and lists"),
        ("MODEL_ARGS:\n  --save: [!env HOME]\n", "run.yaml:2: a recipe has texts and lists only, got the tag '!env'"),
        ("MODEL_ARGS: !!python/dict {--save: x}\n", "run.yaml:1: a recipe has texts and lists"),
        ("MODEL_ARGS:\n  !x --save: x\n", "run.yaml:2: a recipe has texts and lists"),
        ('MODEL_ARGS:\n  --save: "a\\0b"\n', "run.yaml:2: no command line can carry 'a\\x00b'"),
        ('MODEL_ARGS:\n  --save: "\\ud800"\n', "run.yaml:2: no command line can carry"),
        ("MODEL_ARGS: " + 2000 * "[" + "\n", "run.yaml: nested too deeply"),
        ("extends: nothing-like-it\n", "run.yaml:1: extends: no recipe 'nothing-like-it'"),
        ("extends: run\n", "run.yaml: extends itself: run.yaml -> run.yaml"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(write: Write, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(error)}") as caught:
        recipe.load(write(text), {})
    assert "\n" not in str(caught.value)


def test_a_long_cycle_of_extends_is_named(write: Write) -> None:
    write("extends: b\n", "a.yaml")
    write("extends: a\n", "b.yaml")
    with pytest.raises(ValueError, match=r"extends itself: a.yaml -> b.yaml -> a.yaml"):
        recipe.load("a.yaml", {})


def test_bytes_that_are_no_text_are_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="not YAML"):
        recipe.load(str(tmp_path / "x.yaml"), {})


def test_a_recipe_names_its_cluster_and_itself(write: Write) -> None:
    write("CLUSTER: h100-ib\nMODEL_ARGS:\n  --save: runs/${RECIPE}\n", "parent.yaml")
    assert recipe.load("parent.yaml", {}).cluster == "h100-ib"
    run = recipe.load(write("extends: parent\nCLUSTER: ${CLUSTER:-a100-ib}\n"), {"RECIPE": "other"})
    assert (run.cluster, run.save) == ("a100-ib", Path("runs/run"))


def test_a_recipe_can_be_looked_at_without_its_variables(write: Write) -> None:
    name = write("MODEL_ARGS:\n  --data-path: ${DATA}/${DATA}\n  --lr: ${LR:-1}\n  --seed: ${SEED}\n")
    variables = file.Unset({"SEED": "3", "LR": ""})
    run = recipe.load(name, variables)
    assert said(run.model_args) == {"--data-path": ("<DATA>/<DATA>",), "--lr": ("1",), "--seed": ("3",)}
    assert variables.names == ["DATA"]


def test_a_size_that_is_missing_is_named(write: Write) -> None:
    run = recipe.load(write("MODEL_ARGS: {--seq-length: 8}\n"), {})
    assert run.required("--seq-length") == 8
    with pytest.raises(ValueError, match="recipe run has no --num-layers; add it to MODEL_ARGS"):
        run.required("--num-layers")


def test_an_unknown_recipe_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        recipe.load("quickstrat", {})


def test_a_word_before_the_first_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a --flag after the recipe, got 'word'"):
        recipe.command_line_flags(["word", "--lr", "1"])


def test_torchruns_flags_may_have_underscores_as_for_torchrun() -> None:
    run = recipe.load("quickstart", {}, ["--nproc_per_node", "4", "--rdzv_id=7", "--save", "a_b"])
    assert said(run.launch) == {"--nproc-per-node": ("4",), "--rdzv-id": ("7",)}
    assert run.flag("--save", "") == "a_b"


def test_the_dialect_of_megatrons_own_tests_is_read(write: Write) -> None:
    text = (
        "ENV_VARS:\n  NVTE_ALLOW_NONDETERMINISTIC_ALGO: 0\nTEST_TYPE: regular\nMODEL_ARGS:\n"
        "  --bf16: true\n  --lr-warmup-fraction: .01\n  --data-path: ${DATA_PATH}/text\nMETRICS:\n  - lm loss\n"
    )
    run = recipe.load(write(text), VARIABLES)
    assert command(run).environment == {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    assert command(run).words[-5:] == ["--bf16", "--lr-warmup-fraction", ".01", "--data-path", "/data/corpus/text"]


def test_one_node_gets_a_free_port_and_more_nodes_their_rendezvous(write: Write) -> None:
    name = write("LAUNCH:\n  --nproc-per-node: 2\n")
    assert "--standalone" in command(recipe.load(name, {})).words
    words = command(recipe.load(name, {}, ["--nnodes", "2", "--master-addr", "host"])).words
    assert "--standalone" not in words
    assert words[words.index("--nnodes") + 1] == "2"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("", ["-m", "megatron_cp.pretrain_gpt"]),
        ("my.module", ["-m", "my.module"]),
        ("up/pretrain_gpt.py", ["-m", "megatron_cp.launch", "up/pretrain_gpt.py"]),
    ],
)
def test_a_module_runs_as_it_is_and_a_script_through_the_launcher(write: Write, entry: str, words: list[str]) -> None:
    name = write(f"LAUNCH:\n  entry: {entry}\n" if entry else "MODEL_ARGS:\n")
    assert command(recipe.load(name, {})).words[-len(words) :] == words


def test_the_printed_command_is_the_command_in_a_shell() -> None:
    words = [
        sys.executable,
        "-c",
        "import os, sys; print(os.environ['A'], sys.argv[1:])",
        "--x",
        "a b",
        "--y",
        "$HOME'",
    ]
    printed = str(Command({"A": "1 $2"}, words))
    result = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1 $2 ['--x', 'a b', '--y', \"$HOME'\"]"


@pytest.mark.parametrize(("count", "fits"), [("8", True), ("16", True), ("4", False), ("12", False), ("gpu", True)])
def test_model_parallel_sizes_must_fit_into_the_processes(write: Write, count: str, fits: bool) -> None:
    sizes = "{--tensor-model-parallel-size: 2, --pipeline-model-parallel-size: 2, --context-parallel-size: 2}"
    run = recipe.load(write(f"MODEL_ARGS: {sizes}\nLAUNCH: {{--nproc-per-node: {count}}}\n"), {})
    if fits:
        check_processes(run)
    else:
        with pytest.raises(ValueError, match=rf"TP=2 \* PP=2 \* CP=2 needs a multiple of 8 processes, got {count}"):
            check_processes(run)


def test_the_corpus_of_data_is_trained_on_unless_another_is_named(write: Write) -> None:
    name = write("DATA:\n  --input: [a, b c]\n  --output: out\n  --skip-bad: true\nMODEL_ARGS: {--lr: 1}\n")
    run = recipe.load(name, {})
    assert said(complete(run).model_args)["--data-path"] == ("out",)
    assert corpus_words(run)[2:] == ["--input", "a", "--input", "b c", "--output", "out", "--skip-bad"]
    assert shlex.split(corpus_command(run))[:5] == ["[", "-f", "out.idx", "]", "||"]
    for other in (["--data-path", "mine"], ["--mock-data"]):
        assert not recipe.load(name, {}, other).builds_corpus


def test_flags_of_data_are_options_of_data_build() -> None:
    import typer

    build = typer.main.get_command(data.app).commands["build"]  # type: ignore[attr-defined]
    options = {name for parameter in build.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(recipe.DATA_FLAGS) <= options


def test_flags_of_launch_are_flags_of_torchrun() -> None:
    from torch.distributed.run import get_args_parser

    assert set(recipe.TORCHRUN_FLAGS) <= set(get_args_parser()._option_string_actions)


def test_a_save_folder_with_a_checkpoint_is_loaded(write: Write, tmp_path: Path) -> None:
    run = recipe.load(write("MODEL_ARGS: {--save: ckpt}\n"), {})
    assert "--load" not in complete(run).model_args
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("7")
    assert said(complete(run).model_args)["--load"] == ("ckpt",)
    assert said(complete(recipe.load("run.yaml", {}, ["--load", "other"])).model_args)["--load"] == ("other",)


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_pass_megatrons_parser(name: str, megatron_parser: argparse.ArgumentParser) -> None:
    run = recipe.load(name, VARIABLES)
    recipe_flags.check(run.model_args, megatron_parser)
    check_processes(run)
    args = megatron_parser.parse_args(flag_words(run.model_args))
    assert args.num_layers == (run.number("--num-layers", 0) or None)


@pytest.mark.parametrize("name", recipe.shipped("recipes"))
def test_shipped_runs_ask_for_nothing_that_our_attention_refuses(
    name: str, megatron_parser: argparse.ArgumentParser
) -> None:
    run = recipe.load(name, VARIABLES)
    assert processes(run) is not None
    recipe_flags.check_run(run, megatron_parser)


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    run = recipe.load(name, {})
    found = model_of(run).parameters if "--num-experts" in run.model_args else parameters(run)
    assert round(found / 1e9, 2) == BILLIONS[name]


def test_every_model_has_its_number_checked() -> None:
    assert {Path(name).name for name in recipe.shipped("models")} - {"llama"} == set(BILLIONS)


def test_the_small_models_of_llama_3_2_stretch_positions_by_32() -> None:
    assert recipe.load("llama3.2-1b", {}).flag("--rope-scaling-factor", "") == "32"
    assert recipe.load("llama3.2-3b", {}).flag("--rope-scaling-factor", "") == "32"


def test_a_file_of_megatrons_harness_is_read_by_its_rules(
    write: Write, megatron_parser: argparse.ArgumentParser
) -> None:
    text = """
ENV_VARS: {NVTE_FUSED_ATTN: 1}
TEST_TYPE: ckpt-resume
BEFORE_SCRIPT: |
  pip uninstall -y transformer_engine
MODEL_ARGS:
  --ffn-hidden-size: 100
  --spec: "[some.module some_spec]"
  --recompute-modules: moe_act mlp
  --profile-ranks: [1, 2]
  --step-batch-size-schedule: "0:384 200B:768"
  --ffn-hidden-size: 200
"""
    run = recipe.load(write(text), {})
    assert said(run.model_args) == {
        "--ffn-hidden-size": ("200",),
        "--spec": ("some.module", "some_spec"),
        "--recompute-modules": ("moe_act", "mlp"),
        "--profile-ranks": ("1", "2"),
        "--step-batch-size-schedule": ("0:384 200B:768",),
    }
    recipe_flags.check(run.model_args, megatron_parser)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--zero-bubble-v-schedule", ["a flag of the zero-bubble fork of Megatron", "use --pp-schedule zb-v"]),
        ("--ulysses-degree-in-cp", ["a flag of MindSpeed", "--hierarchical-context-parallel-sizes DEGREE CP/DEGREE"]),
        ("--pp_algorithm", ["--pp_algorithm is a flag of Primus", "use --pp-schedule"]),
        ("--patch-tokenizer-type", ["a flag of Pai-Megatron-Patch", "HuggingFaceTokenizer"]),
        ("--trigger-path", ["a flag of the swiss-ai fork of Megatron", "--exit-signal-handler"]),
        ("--deepspeed_config", ["a flag of DeepSpeed", "leave it out"]),
        ("--zero-stage", ["a flag of DeepSpeed", "use --use-distributed-optimizer for 1"]),
        ("--environment", ["a flag of a plugin of sbatch", "write it under SLURM: in the recipe"]),
        ("--uenv", ["a flag of a plugin of sbatch", "write it under SLURM: in the recipe"]),
        ("--num-tokens-to-generate", ["a flag of Megatron's inference scripts", "leave it out: this is pretraining"]),
        ("trainer.num_nodes", ["a flag begins with two dashes"]),
        ("--no-async-tensor-model-parallel-allreduce", ["a flag of earlier Megatron", "leave it out"]),
    ],
)
def test_a_foreign_flag_names_its_owner_and_what_to_use(
    write: Write, megatron_parser: argparse.ArgumentParser, flag: str, words: list[str]
) -> None:
    run = recipe.load(write(f"MODEL_ARGS:\n  {flag}: 1\n"), {})
    with pytest.raises(ValueError, match=f"^run.yaml:2: unknown flag '{flag}'; ") as caught:
        recipe_flags.check(run.model_args, megatron_parser)
    assert [word for word in words if word not in str(caught.value)] == []


def test_every_foreign_flag_is_unknown_here_and_what_replaces_it_is_known(
    megatron_parser: argparse.ArgumentParser,
) -> None:
    known = megatron_parser._option_string_actions
    for entry in foreign_flags.FOREIGN:
        assert [flag for flag in entry.flags.split() if f"--{flag}" in known] == []
        assert [flag for flag in re.findall(r"--[a-z0-9-]+", entry.instead) if flag not in known] == []


@pytest.mark.parametrize("flag", ["--my-company-flag", "--moe-x", "--partion"])
def test_no_flag_is_suggested_for_one_that_is_like_none(megatron_parser: argparse.ArgumentParser, flag: str) -> None:
    given = {flag: recipe.Setting(("1",), "run.yaml:1")}
    assert list(recipe_flags.problems(given, megatron_parser)) == [f"run.yaml:1: unknown flag {flag!r}"]


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("--num-layer", "4", "unknown flag '--num-layer'; did you mean '--num-layers'?"),
        ("--num-layers", "four", "--num-layers takes an int, got 'four'"),
        ("--num-layers", "4.0", "--num-layers takes an int, got '4.0'"),
        ("--lr", "fast", "--lr takes a float, got 'fast'"),
        ("--lr", "true", "--lr needs a value"),
        ("--lr", "[1, 2]", "--lr takes one value, got 2: '1' '2'"),
        ("--bf16", "1", "--bf16 takes no value, got '1'"),
        (
            "--ckpt-format",
            "torch_dit",
            "--ckpt-format takes one of torch, torch_dist, torch_dcp, fsdp_dtensor, got 'torch_dit'; did you mean",
        ),
        ("--tokenizer-type", "Bytes", "--tokenizer-type takes one of"),
        (
            "--hierarchical-context-parallel-sizes",
            "[4, -2]",
            "--hierarchical-context-parallel-sizes takes no value that",
        ),
        ("--spec", "module name", "--spec takes several values, got the one text 'module name'; write a list"),
        ("--hierarchical-context-parallel-sizes", "[4, x]", "--hierarchical-context-parallel-sizes takes an int"),
        (
            "--attention-backend",
            "flush",
            "--attention-backend takes one of flash, fused, unfused, local, auto, got 'flush'; did you mean 'flash'?",
        ),
        ("--cp-kernal", "torch", "unknown flag '--cp-kernal'; did you mean '--cp-kernel'?"),
        ("--nproc_per_node", "2", "unknown flag '--nproc_per_node'; did you mean '--nproc-per-node'?"),
    ],
)
def test_a_wrong_flag_is_named_with_its_line(
    write: Write, megatron_parser: argparse.ArgumentParser, flag: str, value: str, error: str
) -> None:
    run = recipe.load(write(f"# a comment\nMODEL_ARGS:\n  {flag}: {value}\n"), {})
    with pytest.raises(ValueError, match=f"^{re.escape(f'run.yaml:3: {error}')}") as caught:
        recipe_flags.check(run.model_args, megatron_parser)
    assert "\n" not in str(caught.value)


def test_what_the_ranks_would_refuse_is_said_before_they_start(megatron_parser: argparse.ArgumentParser) -> None:
    run = recipe.load("quickstart", {}, ["--seq-length", "510"])
    with pytest.raises(
        ValueError, match=r"--seq-length must be divisible by 2 \* --context-parallel-size = 4, got 510"
    ):
        recipe_flags.check_run(run, megatron_parser)
