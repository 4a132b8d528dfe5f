"""Recipes made from command lines and scripts: flags unchanged, nothing run, what is left out is named."""

import contextlib
from pathlib import Path

import pytest

from megatron_cp.recipe import recipe
from megatron_cp.recipe.from_command import as_yaml, imported, is_command
from megatron_cp.recipe.recipe import Recipe, overridden
from megatron_cp.recipe.shell import read_script

SCRIPT = r"""#!/bin/bash
#SBATCH --nodes=4
# trains
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1 NCCL_DEBUG=WARN
export WANDB_API_KEY=secret
GPUS_PER_NODE=${GPUS:-8}
NUM_NODES=4
MASTER_ADDR=$(scontrol show hostnames | head -n 1)
HERE=$(cd "$(dirname "$0")" && pwd)
CKPT=$HERE/ckpt; rm -rf $CKPT; mkdir -p "$CKPT" > {out}/log 2>&1
source {out}/env.sh
module load cuda
SIZE=${1:-8b}
if [ "$SIZE" = 8b ]; then LAYERS=32; else LAYERS=80; fi
MODEL_ARGS=(
    --num-layers $LAYERS   # of the model
    --hidden-size $((64 * 64))
    --swiglu
)
add() { MODEL_ARGS+=("$@"); }
for flag in bf16 sequence-parallel; do add --$flag; done
cat > {out}/config <<EOF
rm -rf /
EOF
DISTRIBUTED="--nproc_per_node $GPUS_PER_NODE --nnodes $NUM_NODES --rdzv_backend c10d --no_python_x"
nohup torchrun $DISTRIBUTED pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    --save "$CKPT" --split 949,50,1 --lr 3e-4 --data-path 1 "a b" 2 c 2>&1 | tee {out}/train.log &
wait
echo done >> {out}/done
"""


def texts(section: dict[str, recipe.Setting]) -> dict[str, tuple[str, ...]]:
    return {key: setting.values for key, setting in section.items()}


def script(folder: Path, text: str) -> str:
    file = folder / "train.sh"
    file.write_text(text.replace("{out}", str(folder / "out")))
    (folder / "out").mkdir()
    (folder / "out" / "env.sh").write_text(f"touch {folder}/out/sourced\n")
    return str(file)


def test_a_script_becomes_a_recipe_and_nothing_of_it_runs(tmp_path: Path) -> None:
    kept = tmp_path / "ckpt"
    kept.mkdir()
    made = imported([script(tmp_path, SCRIPT), "70b"], {"PATH": "/usr/bin:/bin", "HOME": "/"})
    assert texts(made.recipe.launch) == {
        "--nproc-per-node": ("8",),
        "--nnodes": ("4",),
        "entry": ("pretrain_gpt.py",),
    }
    assert texts(made.recipe.env_vars) == {"CUDA_DEVICE_MAX_CONNECTIONS": ("1",), "NCCL_DEBUG": ("WARN",)}
    assert texts(made.recipe.model_args) == {
        "--num-layers": ("80",),
        "--hidden-size": ("4096",),
        "--swiglu": (),
        "--bf16": (),
        "--sequence-parallel": (),
        "--save": (str(kept),),
        "--split": ("949,50,1",),
        "--lr": ("3e-4",),
        "--data-path": ("1", "a b", "2", "c"),
    }
    assert [line.split(";")[0] for line in made.told] == [
        "not taken: torchrun's --no-python-x",
        "not taken: #SBATCH --nodes=4",
        "not taken: --rdzv-backend",
        "not taken: the variables WANDB_API_KEY",
        "not run, and without output here: scontrol, rm, mkdir, source, module, cat, tee",
    ]
    assert "secret" not in as_yaml(made, "train.sh")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["ckpt", "env.sh", "out", "train.sh"]


def test_the_file_that_is_written_says_the_same(tmp_path: Path) -> None:
    flags = (
        "--lr 1e-4 --n 007 --adam-eps 1e-08 --x true --y 0.10 --z -1 --no-masked-softmax-fusion --v 'a: b' 1_000 --w ''"
    )
    made = imported([f"torchrun --nproc-per-node=2 /m/pretrain_gpt.py {flags}"], {})
    assert made.told == ["not taken: --w has an empty value here"]
    file = tmp_path / "made.yaml"
    file.write_text(as_yaml(made, "a command"))
    assert file.read_text().startswith("# Made from: a command\n")
    assert "  --lr: 1e-4\n" in file.read_text()
    read = recipe.load(str(file), {})
    for section in ("env_vars", "model_args", "launch"):
        assert texts(getattr(read, section)) == texts(getattr(made.recipe, section))


LAUNCH = {"--nproc-per-node": ("2",), "entry": ("x/pretrain_gpt.py",)}


@pytest.mark.parametrize(
    ("command", "launch", "environment"),
    [
        ("torchrun --nproc_per_node=2 x/pretrain_gpt.py --lr 1", LAUNCH, {}),
        ("/opt/bin/torchrun --nproc-per-node 2 x/pretrain_gpt.py --lr 1", LAUNCH, {}),
        ("python3.12 -u -m torch.distributed.run --nproc_per_node 2 x/pretrain_gpt.py --lr 1", LAUNCH, {}),
        ("python -m torch.distributed.launch --nproc_per_node 2 x/pretrain_gpt.py --lr 1", LAUNCH, {}),
        (
            "NCCL_DEBUG=INFO exec torchrun --nproc_per_node 2 x/pretrain_gpt.py --lr 1",
            LAUNCH,
            {"NCCL_DEBUG": ("INFO",)},
        ),
        ("env NCCL_DEBUG=INFO torchrun --nproc_per_node 2 x/pretrain_gpt.py --lr 1", LAUNCH, {"NCCL_DEBUG": ("INFO",)}),
        (
            "srun -N 4 bash -c 'export OMP_NUM_THREADS=3; torchrun --nproc_per_node 2 x/pretrain_gpt.py --lr 1'",
            LAUNCH,
            {"OMP_NUM_THREADS": ("3",)},
        ),
        ("eval 'torchrun --nproc_per_node 2 x/pretrain_gpt.py --lr 1'", LAUNCH, {}),
        ("torchrun --nproc_per_node 2 -m megatron_cp.launch x/pretrain_gpt.py --lr 1", LAUNCH, {}),
        ("torchrun -m megatron_cp.pretrain_gpt --lr 1", {"entry": ("megatron_cp.pretrain_gpt",)}, {}),
        ("python x/pretrain_gpt.py --lr 1", {"entry": ("x/pretrain_gpt.py",)}, {}),
        ("numactl --cpunodebind 0 python x/pretrain_gpt.py --lr 1", {"entry": ("x/pretrain_gpt.py",)}, {}),
        (
            "torchrun --standalone \\\n --nproc_per_node 2 \\\n x/pretrain_gpt.py \\\n --lr 1",
            LAUNCH,
            {},
        ),
    ],
)
def test_launchers(command: str, launch: dict[str, tuple[str, ...]], environment: dict[str, tuple[str, ...]]) -> None:
    made = imported([command], {"PATH": "/bin"}).recipe
    assert texts(made.launch) == launch
    assert texts(made.env_vars) == environment
    assert texts(made.model_args) == {"--lr": ("1",)}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("echo hello\n", "train.sh: starts no training script through torchrun or python, got no launcher; give"),
        ("python -m pip install x\n", r"train.sh: starts no training script .*, got python -m pip install x"),
        ("torchrun a.py --lr 1\ntorchrun b.py --lr 1\n", r"train.sh: starts 2 training commands: a.py, b.py; give one"),
        ("x=1\nif [ 1 ; then\n", r"train.sh:\d: cannot read this as bash"),
        ("set -u\necho $NODES\ntorchrun a.py\n", r"train.sh: bash ends with status 1.*NODES: unbound variable"),
        ("while true; do sleep 1; done\n", "train.sh: does not end within 1 s"),
    ],
)
def test_a_script_without_one_training_command_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: str
) -> None:
    monkeypatch.setattr("megatron_cp.recipe.shell.SECONDS", 1)
    with pytest.raises(ValueError, match=error) as refused:
        imported([script(tmp_path, text)], {"PATH": "/bin"})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", [["torchrun 'x"], [""], ["torchrun"], ["torchrun", "--nproc-per-node", "2"]])
def test_a_command_that_starts_nothing_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"check its quotes|give"):
        imported(words, {})


def test_what_only_a_node_knows_is_left_out_and_what_no_shell_reads_is_told() -> None:
    found = "--node-rank $SLURM_NODEID --master-addr $HEAD --master-port 6000 --rdzv-endpoint $HEAD:29500"
    made = imported([f"torchrun --nnodes 2 {found} --nproc-per-node 8 a.py --save $OUT/x --lr 1"], {})
    assert texts(made.recipe.launch) == {"--nnodes": ("2",), "--nproc-per-node": ("8",), "entry": ("a.py",)}
    by_hand, kept = made.told
    assert by_hand.startswith("not taken: --node-rank, --master-addr, --master-port, --rdzv-endpoint; submit takes")
    assert kept.startswith("kept as written: --save '$OUT/x'; no shell reads it")


def test_a_flag_whose_variable_is_empty_is_told(tmp_path: Path) -> None:
    made = imported([script(tmp_path, "torchrun --nnodes $N --nproc-per-node 2 a.py --lr 1\n")], {})
    assert texts(made.recipe.launch) == {"--nproc-per-node": ("2",), "entry": ("a.py",)}
    assert made.told == [
        "not taken: --nnodes has no value here; set the variable that it comes from, or add it to LAUNCH"
    ]


@pytest.mark.parametrize(
    "command",
    [
        "a=$(touch {})",
        "x=`touch {}`",
        ": > {}",
        "echo x >> {}",
        "cat <(touch {})",
        "/usr/bin/touch {}",
        "\\touch {}",
        "t=touch; $t {}",
        "bash -c 'touch {}'",
        "f() {{ touch {}; }}; f",
        "[[ $(touch {}) ]]",
        "trap 'touch {}' EXIT",
        "tee {} <<< x",
        "a=(1 $(touch {}))",
        "echo $(( $(touch {}) + 1 ))",
        "cd /; exec touch {}",
        ". {}.sh",
        "if touch {}; then :; fi",
        "! touch {}",
        "touch {} && :",
        "( touch {} )",
        "{{ touch {}; }} 2>&1",
        "coproc touch {}",
        '"touch" {}',
        "'to''uch' {}",
        "for x in $(touch {}); do :; done",
        "export A=$(touch {})",
    ],
)
def test_no_command_of_a_script_runs(tmp_path: Path, command: str) -> None:
    target = tmp_path / "made"
    (tmp_path / "made.sh").write_text(f"/usr/bin/touch {target}\n")
    # a script that ends badly is refused
    with contextlib.suppress(ValueError):
        read_script(command.format(target) + "\n", "train.sh", [], {"PATH": "/usr/bin:/bin"})
    assert not target.exists()


@pytest.mark.parametrize(("word", "is_one"), [("torchrun", True), ("run.sh", True), ("python3.12", True)])
def test_commands_are_told_from_recipes(word: str, is_one: bool) -> None:
    assert is_command(word) is is_one
    assert not any(is_command(name) for name in recipe.shipped())


def test_flags_go_on_top_of_a_recipe_that_is_loaded() -> None:
    made: Recipe = imported(["torchrun --nproc-per-node 2 a.py --lr 1 --bf16"], {}).recipe
    above = overridden(made, ["--partition", "gpu", "--lr", "2", "--nnodes", "4", "--bf16=false"], job=True)
    assert texts(above.slurm) == {"--partition": ("gpu",)}
    assert texts(above.model_args) == {"--lr": ("2",)}
    assert texts(above.launch) == {"--nproc-per-node": ("2",), "entry": ("a.py",), "--nnodes": ("4",)}
