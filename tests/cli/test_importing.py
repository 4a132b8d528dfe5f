"""A command or a script, where a recipe may stand."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.recipe import recipe

MODEL = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --swiglu --seq-length 8192 "
    "--max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 8 --lr 1e-4 --train-iters 10 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 32000 --context-parallel-size 2 --cp-comm-type zigzag --bf16 "
    "--attention-dropout 0"
)
COMMAND = f"torchrun --nproc-per-node 8 pretrain_gpt.py {MODEL}"


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "train.sh"
    file.write_text(
        f"export NCCL_DEBUG=WARN\nFLAGS=({MODEL})\ntorchrun --nproc-per-node 8 pretrain_gpt.py ${{FLAGS[@]}}\n"
    )
    return str(file)


def run(*words: str) -> tuple[str, str]:
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout, done.stderr


def test_a_recipe_is_printed_or_written_and_its_unknown_flags_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    printed, told = run("import", f"{COMMAND} --enable-zero-bubble")
    written, where = run("import", "--write", str(file), *COMMAND.split(), "--enable-zero-bubble")
    assert printed.split("\n", 1)[1] == file.read_text().split("\n", 1)[1]
    assert not written
    assert f"wrote {file}" in where
    assert told in where
    assert "unknown flag '--enable-zero-bubble'; --enable-zero-bubble is a flag of the zero-bubble fork" in told
    assert "  --enable-zero-bubble: true\n" in printed
    assert recipe.load(str(file), {}).flag("--cp-comm-type", "") == "zigzag"
    assert CliRunner().invoke(app, ["import", "--write", str(file), COMMAND]).exit_code == 1


def test_commands_take_what_import_takes(script: str) -> None:
    for words in ([script], COMMAND.split()):
        rendered = run("render", *words)[0]
        assert "-m megatron_cp.launch pretrain_gpt.py" in rendered
        assert ("NCCL_DEBUG=WARN" in rendered) is (words[0] == script)
        batch = run("submit", "--dry-run", "--partition", "gpu", "--time", "1:00:00", "--", *words)[0]
        assert "#SBATCH --partition=gpu\n" in batch
        assert "--cp-comm-type zigzag" in batch


@pytest.mark.slow
def test_a_command_is_estimated_and_planned(script: str) -> None:
    cluster = ("--cluster", "h100-ib")
    assert "valid for 8 processes on h100-ib" in run("validate", *cluster, script)[0]
    estimates = [run("estimate", "--json", *cluster, *words)[0] for words in ((script,), ("--", *COMMAND.split()))]
    assert '"step_seconds"' in estimates[0]
    assert estimates[0] == estimates[1]
    sizes = "--seq 8K --gpus 8 --backends zigzag --schedules 1f1b".split()
    assert "on 8 GPUs of h100-ib" in run("plan", *sizes, *cluster, "--", *COMMAND.split())[0]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["plan", "--seq", "8K", "--gpus", "8", "--cluster", "h100-ib"], "give one of the two"),
        (["submit", "--partition", "gpu", "--"], "expected a command after --"),
        (["import", "nothing.sh"], r"cannot read the script nothing\.sh: No such file|starts no training script"),
    ],
)
def test_what_is_missing_is_said(words: list[str], error: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    with pytest.raises(ValueError, match=error):
        raise done.exception or AssertionError(done.output)


def test_a_config_of_another_system_becomes_a_recipe_over_a_shipped_model(tmp_path: Path) -> None:
    config, file = tmp_path / "ds.json", tmp_path / "run.yaml"
    config.write_text('{"train_batch_size": 8, "fp16": {"enabled": true}, "zero_optimization": {"stage": 3}, "a": 1}')
    words = ("--model", "llama3-8b", str(config), "--micro-batch-size", "1", "--nproc-per-node", "8")
    told = run("import", "--write", str(file), *words)[1]
    assert "DeepSpeed: 2 mapped, 2 approximated, 1 unknown" in told
    assert "unknown: a 1: not in the table, left out" in told
    assert "# approximated: zero_optimization.stage 3: gradients are added in float32" in file.read_text()
    made = recipe.load(str(file), {})
    assert made.flag("--data-parallel-sharding-strategy", "") == "optim_grads_params"
    assert (made.flag("--num-layers", ""), made.flag("--global-batch-size", "")) == ("32", "8")
    assert "--fp16" in made.model_args
    assert "--bf16" not in made.model_args


def test_a_command_of_another_system_stands_where_a_recipe_may() -> None:
    command = "torchrun --nproc-per-node 8 pretrain.py --recipe llama3_8b_pretrain_config model.context_parallel_size=2"
    rendered, told = run("render", *command.split())
    assert "-m megatron_cp.pretrain_gpt" in rendered
    assert "--context-parallel-size 2" in rendered
    assert "--num-layers 32" in rendered
    assert "not taken: pretrain.py, in whose place runs megatron_cp.pretrain_gpt" in told


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--model", "no-such", "model.num_layers=2"), "no recipe 'models/no-such'"),
        (("model.num_layers=2", "more"), "expected SECTION.KEY=VALUE, got 'more'"),
    ],
)
def test_what_cannot_be_imported_is_said(words: tuple[str, ...], error: str) -> None:
    done = CliRunner().invoke(app, ["import", *words])
    with pytest.raises(ValueError, match=error):
        raise done.exception or AssertionError(done.output)
