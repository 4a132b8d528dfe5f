"""The scripts for sbatch, word for word, and what they start when values are hostile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp import __version__, config
from megatron_cp.cli import app
from megatron_cp.cli.submit import jobs_of
from megatron_cp.findings import about
from megatron_cp.recipe import recipe, slurm_flags
from megatron_cp.slurm.job import job_of
from megatron_cp.slurm.script import BODY, script
from tests.conftest import Write

GOLDEN = Path(__file__).with_name("golden")
BASE = """
ENV_VARS:
  OMP_NUM_THREADS: 1
LAUNCH:
  --nnodes: 4
  --nproc-per-node: 8
  --max-restarts: 0
MODEL_ARGS:
  --context-parallel-size: 8
  --swiglu: true
  --save: /shared/run
SLURM:
  --python: /shared/venv/bin/python
  --partition: gpu
  --gpus-per-node: h100:8
  --time: 4:00:00
"""
APPTAINER = """
extends: base
SLURM:
  --wrapper: [apptainer, exec, --nv, --bind, "/shared:/shared,/scratch:/tmp", /shared/a container.sif]
  --python: python3
  --signal: SIGUSR2@600
  --uenv: prgenv-gnu/24.7
  --hint: nomultithread
  --wait: true
  --parsable: true
"""
CONTAINER = """
extends: base
DATA:
  --input: [/shared/a text, /shared/b]
  --output: /shared/corpus
SLURM:
  --python: python3
  --container-image: nvcr.io#nvidia/nemo:25.07
  --container-mounts: [/shared:/shared, /scratch:/tmp]
  --container-workdir: /shared
  --no-container-mount-home: true
  --cpus-per-task: 96
"""
# one of each kind of place where a shell could take a value for a program
HOSTILE = (
    "$(touch hacked)",
    "`touch hacked`",
    "'; touch hacked; '",
    '"; touch hacked; "',
    "a\n#SBATCH --wrap=x\ntouch hacked",
    "*",
)
# notes its words, then does what it was asked for from the first word that is no option
SRUN = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open("calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
while words[0].startswith("-"):
    words.pop(0)
os.environ["SLURM_NODEID"] = "3"
os.execvp(words[0], words)
"""
# stands for Python: notes its words and its environment, and leaves what a trainer that was stopped leaves
PYTHON = """#!{python}
import json, os, pathlib, sys
with open("started", "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
if "--save" in sys.argv and os.environ.get("STOPPED"):
    folder = pathlib.Path(sys.argv[sys.argv.index("--save") + 1])
    (folder / f"unfinished-{{os.environ['SLURM_JOB_ID']}}.json").write_text("{{}}")
sys.exit(int(os.environ.get("STATUS", "0")) if "--save" in sys.argv else 0)
"""
SCONTROL = """#!/bin/sh
case "$*" in
*hostnames*) printf '%s\\n' n3 n4 n5 n6 ;;
*node*) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=$4 Version=22.05" ;;
*) echo "$*" >>requeued ;;
esac
"""
SQUEUE = """#!/bin/sh
echo "${STATE:-RUNNING}"
"""


@pytest.fixture
def write(write: Write, monkeypatch: pytest.MonkeyPatch) -> Write:
    write(BASE, "base.yaml")
    monkeypatch.setattr("megatron_cp.slurm.script.about", lambda: "megatron-cp 0.1.0, commit 0123456789ab")
    return write


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment in which SLURM's commands, and `python`, note how they are called."""
    programs = {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in programs.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.format(python=sys.executable) if "{python}" in text else text)
        file.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    return {"PATH": path, "SLURM_JOB_ID": "40007", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[3-6]"}


def rendered(*names: str, overrides: str = "") -> str:
    return script([job_of(recipe.load(name, {}, overrides.split(), job=True)) for name in names])


def run(text: str, environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    Path("job.sbatch").write_text(text)
    return subprocess.run(
        ["bash", "job.sbatch"], env={**environment, **more}, capture_output=True, text=True, check=False
    )


def noted(name: str) -> list:
    file = Path(name)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.mark.parametrize(
    ("name", "names", "overrides"),
    [
        ("bare", ["base.yaml"], ""),
        ("container", ["run.yaml"], ""),
        ("apptainer", ["apptainer.yaml"], ""),
        ("srun", ["base.yaml"], "--launcher srun --max-restarts=false --cpu-bind cores"),
        ("array", ["base.yaml", "second.yaml"], "--requeues 3"),
        ("singleton", ["base.yaml"], "--chain 5 --job-name long --output logs/%x-%j.out"),
    ],
)
def test_script_is_the_golden_one(write: Write, name: str, names: list[str], overrides: str) -> None:
    write(CONTAINER)
    write(APPTAINER, "apptainer.yaml")
    write("extends: base\nMODEL_ARGS:\n  --lr: 1e-4\n  --save: /shared/second\n", "second.yaml")
    text = rendered(*names, overrides=overrides)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert text.endswith(BODY.read_text())
    assert text.removesuffix(BODY.read_text()) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize("value", HOSTILE)
def test_no_shell_evaluates_a_value(write: Write, stubs: dict[str, str], launcher: str, value: str) -> None:
    save = f"runs/{value}"
    quoted = json.dumps(value)
    write(
        f"LAUNCH:\n  --nnodes: 4\n  entry: {json.dumps(value + '.py')}\n"
        f"ENV_VARS:\n  A: {quoted}\n  BASH_ENV: {quoted}\n"
        f"DATA:\n  --input: {quoted}\n  --output: {quoted}\n"
        f"MODEL_ARGS:\n  --save: {json.dumps(save)}\n  --spec: [a, {quoted}]\n"
        f"SLURM:\n  --python: python\n  --launcher: {launcher}\n  --container-image: {quoted}\n"
    )
    done = run(rendered("run.yaml"), stubs)
    assert done.returncode == 0, done.stderr
    assert not list(Path().rglob("hacked"))
    started = noted("started")
    words, environment = started[-1]
    assert words[-1 - words[::-1].index("--spec") :][:3] == ["--spec", "a", value]
    assert f"{value}.py" in words
    assert (environment["A"], environment["BASH_ENV"]) == (value, value)
    assert environment.get("PET_NODE_RANK") == ("3" if launcher == "torchrun" else None)
    assert environment["MASTER_ADDR"] == "10.0.0.7"
    assert environment["MASTER_PORT"] == "24007"
    build = next(words for words, _ in started if words[2:4] == ["data", "build"])
    assert build[-4:] == ["--input", value, "--output", value]
    assert all(f"--container-image={value}" in call for call in noted("calls"))


@pytest.mark.parametrize("value", HOSTILE[:-1])
def test_a_value_that_a_header_cannot_hold_is_refused(write: Write, value: str) -> None:
    write(f"extends: base\nSLURM:\n  --comment: {json.dumps(value)}\n")
    with pytest.raises(ValueError, match=r"run\.yaml:3: --comment .* does not fit into a #SBATCH line"):
        rendered("run.yaml")


def test_a_name_that_a_header_cannot_hold_is_mended(write: Write) -> None:
    name = write("extends: base\n", "a b\n#SBATCH --wrap='touch hacked'.yaml")
    assert "#SBATCH --job-name=a_b__SBATCH_--wrap__touch_hacked_\n" in rendered(name)


@pytest.mark.parametrize(
    ("more", "status", "requeued", "text"),
    [
        ({"STOPPED": "1", "STATUS": "1"}, 0, True, "requeues job 40007, 1 of at most 10 times"),
        ({"STOPPED": "1", "SLURM_RESTART_COUNT": "9"}, 0, True, "requeues job 40007, 10 of at most 10 times"),
        ({"STOPPED": "1", "SLURM_RESTART_COUNT": "10"}, 1, False, "requeued 10 times, which is the limit"),
        ({"STOPPED": "1", "STATE": "COMPLETING"}, 0, False, "stopped before the last iteration"),
        ({"STATUS": "1"}, 1, False, ""),
        ({"STATUS": "0"}, 0, False, ""),
        ({"SLURM_JOB_NUM_NODES": "2"}, 1, False, "the recipe runs on 4 nodes and this job has 2"),
    ],
    ids=["stopped", "last-requeue", "too-often", "cancelled", "failed", "done", "wrong-nodes"],
)
def test_a_job_is_requeued_when_the_trainer_says_so_and_not_for_ever(
    write: Write, stubs: dict[str, str], more: dict[str, str], status: int, requeued: bool, text: str
) -> None:
    write("extends: base\nMODEL_ARGS:\n  --save: runs\nSLURM:\n  --python: python\n")
    done = run(rendered("run.yaml"), stubs, **more)
    assert done.returncode == status, done.stderr
    assert text in done.stdout + done.stderr
    assert Path("requeued").exists() == requeued
    assert not list(Path("runs").glob("unfinished*"))


def test_a_task_of_an_array_is_requeued_alone(write: Write, stubs: dict[str, str]) -> None:
    """The last task's job has the number of the whole array: asked for by that, SLURM requeues all tasks."""
    write("extends: base\nMODEL_ARGS:\n  --save: runs\nSLURM:\n  --python: python\n")
    done = run(rendered("run.yaml"), stubs, STOPPED="1", SLURM_ARRAY_JOB_ID="40007", SLURM_ARRAY_TASK_ID="3")
    assert "requeues job 40007_3, 1 of" in done.stdout
    assert Path("requeued").read_text() == "requeue 40007_3\n"


def test_nodes_of_gpus_are_checked_for_those_that_ranks_use() -> None:
    def gpus(words: str) -> int:
        return job_of(recipe.load("llama3.1-8b-8k-h100x8", {"DATA_PATH": "corpus"}, words.split(), job=True)).gpus

    assert gpus("") == 8
    assert gpus("--nproc-per-node 4") == 4
    assert gpus("--node-gpus 0") == 0
    assert job_of(recipe.load("quickstart", {}, job=True)).gpus == 0


SIZES = "-N 4 --ntasks 32 --ntasks-per-node 8"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            "-p big -A proj -q high -t 2:00:00 -J mine -o log -c12",
            "partition=big account=proj qos=high time=2:00:00 job-name=mine output=log cpus-per-task=12",
        ),
        (SIZES, "nodes=4 ntasks-per-node=1"),
        (f"{SIZES} --launcher srun --max-restarts=false", "nodes=4 ntasks-per-node=8"),
    ],
    ids=["short", "sizes", "sizes-srun"],
)
def test_sbatchs_words_are_taken(write: Write, words: str, lines: str) -> None:
    header = [line[10:] for line in rendered("base.yaml", overrides=words).splitlines() if line.startswith("#SBATCH ")]
    assert set(lines.split()) <= set(header)
    assert len({line.partition("=")[0] for line in header}) == len(header)
    assert not any(line.startswith("ntasks=") for line in header)


DERIVED = {"gpus-per-node=8", "exclusive", "mem=0"}


@pytest.mark.parametrize(
    ("words", "asked", "missing"),
    [
        ("", DERIVED, []),
        ("--gres gpu:8", DERIVED - {"gpus-per-node=8"} | {"gres=gpu:8"}, []),
        ("--gpus-per-node=false", DERIVED - {"gpus-per-node=8"}, []),
        ("-c 96 --mem 100G", {"gpus-per-node=8", "cpus-per-task=96", "mem=100G"}, []),
        ("--nproc-per-node 4 --context-parallel-size 1", {"gpus-per-node=4"}, ["CPUs", "memory"]),
    ],
)
def test_what_a_node_gives_follows_from_the_cluster_or_is_said_to_be_missing(
    words: str, asked: set[str], missing: list[str]
) -> None:
    job = job_of(recipe.load("llama3.1-8b-8k-h100x8", {"DATA_PATH": "corpus"}, words.split(), job=True))
    assert set(job.header) == {f"--{line}" for line in asked}
    assert [text.split()[0] for text in job.missing] == missing
    assert job_of(recipe.load("quickstart", {}, job=True)).header == ()


LONE = "LAUNCH:\n  --nnodes: 2\n  --nproc-per-node: 8\nMODEL_ARGS:\n  --num-layers: 2\n"


@pytest.mark.parametrize(
    ("words", "header", "gpus"),
    [
        ("lone.yaml", ["--gpus-per-node=8"], 8),
        ("lone.yaml --distributed-backend gloo", [], 0),
        ("lone.yaml --gpus-per-node=false", [], 8),
        ("lone.yaml --gres gpu:8", ["--gres=gpu:8"], 8),
        ("lone.yaml --cluster a100-ib", ["--gpus-per-node=8", "--exclusive", "--mem=0"], 8),
        ("lone.yaml --cluster=this-cpu", [], 0),
        ("--partition gpu lone.yaml -t 60", ["--gpus-per-node=8", "--partition=gpu", "--time=60"], 8),
        ("--partition gpu quickstart", ["--partition=gpu"], 0),
    ],
)
def test_gpus_of_a_node_follow_from_its_ranks_without_a_cluster(
    write: Write, words: str, header: list[str], gpus: int
) -> None:
    write(LONE, "lone.yaml")
    job = jobs_of(words.split())[0]
    assert list(job.header) == header
    assert job.gpus == gpus


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("lone.yaml --cluster a100", "no cluster 'a100'; did you mean 'a100-ib'?"),
        ("lone.yaml --cluster --time 60", "--cluster needs the name of a cluster or a file"),
        ("lone.yaml --partion gpu", "unknown flag '--partion'; did you mean '--partition'?"),
        ("--partition gpu", "expected a recipe, got only flags and values: --partition gpu"),
    ],
)
def test_a_job_without_its_cluster_or_recipe_is_refused(write: Write, words: str, error: str) -> None:
    write(LONE, "lone.yaml")
    with pytest.raises(ValueError, match=re.escape(error)):
        jobs_of(words.split())


def test_the_file_of_a_site_is_weaker_than_a_recipe_and_stronger_than_nothing(write: Write) -> None:
    write(
        "ENV_VARS:\n  NCCL_IB_HCA: mlx5\n  OMP_NUM_THREADS: 9\n"
        "SLURM:\n  --account: proj\n  --partition: slow\n  --time: 1:00:00\n"
        "SETUP:\n- module load cuda/12.8\n- source /site/env.sh 'a b'\n",
        "site.yaml",
    )
    write("extends: base\nSETUP: ulimit -l unlimited\n", "own.yaml")
    site = Path("site.yaml")
    text = script([job_of(recipe.load("base.yaml", {}, ["-t", "3:00:00"], job=True, site=site))])
    for line in ("account=proj", "partition=gpu", "time=3:00:00"):
        assert f"#SBATCH --{line}\n" in text
    assert "    NCCL_IB_HCA=mlx5\n    OMP_NUM_THREADS=1\n" in text
    assert "\n# lines of SETUP\nmodule load cuda/12.8\nsource /site/env.sh 'a b'\n\nset -euo pipefail\n" in text
    own = script([job_of(recipe.load("own.yaml", {}, job=True, site=site))])
    assert "\n# lines of SETUP\nulimit -l unlimited\n\nset" in own
    assert recipe.load("base.yaml", {}, job=True).env_vars.keys() == {"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "MEGATRON_CP_SITE: no file site.yaml; correct it, or unset the variable"),
        ("MODEL_ARGS:\n  --lr: 1\n", "site.yaml: a site's file has ENV_VARS, SLURM and SETUP, got MODEL_ARGS"),
        ("extends: base\n", "site.yaml:1: a site's file extends no other"),
        ("SLURM:\n  --partion: x\n", "site.yaml:2: unknown SLURM flag '--partion'"),
    ],
)
def test_a_wrong_file_of_a_site_is_refused(write: Write, text: str | None, error: str) -> None:
    if text is not None:
        write(text, "site.yaml")
    with pytest.raises(ValueError, match=re.escape(error)):
        recipe.load("base.yaml", {}, job=True, site=Path("site.yaml"))


def test_where_the_file_of_a_site_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_CP_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config.site_file() is None
    file = tmp_path / "megatron-cp" / "site.yaml"
    file.parent.mkdir()
    file.touch()
    assert config.site_file() == file
    monkeypatch.setenv("MEGATRON_CP_SITE", "elsewhere.yaml")
    assert config.site_file() == Path("elsewhere.yaml")


def test_the_log_begins_with_what_runs_where(write: Write, stubs: dict[str, str]) -> None:
    write("extends: base\nMODEL_ARGS:\n  --save: runs\nSLURM:\n  --python: python\n")
    first, second = run(rendered("run.yaml"), stubs).stdout.splitlines()[:2]
    assert first == "[megatron-cp] job 40007 trains run on 4 nodes: n3 n4 n5 n6"
    assert second.startswith("[megatron-cp] submitted with megatron-cp 0.1.0, commit 0123456789ab; started 2")


def test_versions_and_commit_are_told() -> None:
    assert re.fullmatch(
        rf"megatron-cp {__version__}, torch \S+, megatron-core 0\.19\S*(, transformer-engine \S+)?"
        r"(, commit [0-9a-f]+(-dirty)?)?",
        about(),
    )


def test_scripts_are_clean_for_shellcheck(write: Write) -> None:
    write(CONTAINER)
    write(APPTAINER, "apptainer.yaml")
    write("extends: base\nMODEL_ARGS:\n  --split: 99,1,0\n  --save: /shared/second\n", "second.yaml")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for index, names in enumerate((["base.yaml", "second.yaml"], ["apptainer.yaml"], ["run.yaml"])):
        Path(f"{index}.sbatch").write_text(rendered(*names))
    done = subprocess.run([shellcheck, *Path().glob("?.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_training_does_not_start_when_a_node_fails(write: Write, stubs: dict[str, str]) -> None:
    write("extends: base\nMODEL_ARGS:\n  --save: runs\nSLURM:\n  --python: python\n")
    Path("bin/python").write_text('#!/bin/sh\necho "$*" >>started\ncase "$*" in *--reports*) exit 1 ;; esac\n')
    done = run(rendered("run.yaml"), stubs)
    assert done.returncode == 1
    assert "training was not started" in done.stderr
    assert "torch.distributed.run" not in Path("started").read_text()


def test_the_array_runs_the_recipe_of_its_task(write: Write, stubs: dict[str, str]) -> None:
    write("extends: base\nMODEL_ARGS:\n  --save: one\n  --lr: 1\nSLURM:\n  --python: python\n", "one.yaml")
    write("extends: one\nMODEL_ARGS:\n  --save: two\n  --lr: 2\n", "two.yaml")
    done = run(rendered("one.yaml", "two.yaml"), stubs, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    words, _ = noted("started")[-1]
    assert words[words.index("--lr") + 1] == "2"
    assert words[words.index("--save") + 1] == "two"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("--nodes 2", "command line: --nodes 2 is another size than --nnodes 4 with --nproc-per-node 8; leave it out"),
        ("-N2", "command line: --nodes 2 is another size than --nnodes 4 with --nproc-per-node 8"),
        ("-n 16", "command line: --ntasks 16 is another size than --nnodes 4 with --nproc-per-node 8"),
        ("--ntasks-per-node 4", "--ntasks-per-node 4 is another size than --nnodes 4 with --nproc-per-node 8"),
        ("--signal B:USR2@600", "--signal takes TERM@SECONDS or USR2@SECONDS of more than 30"),
        ("--signal USR1@600", "got 'USR1@600'; write USR2@600, or give --grace SECONDS instead"),
        ("--signal USR2@30", "of more than 30, which the ranks save and exit on, got 'USR2@30'"),
        ("--signal USR2@600 --grace 60", "--signal and --grace both give the time of the warning"),
        ("--wrapper=", "--wrapper needs words, such as [apptainer, exec, --nv, image.sif]"),
        ("--wrapper apptainer'", '--wrapper "apptainer\'": No closing quotation; write a list of words'),
        ("--time soon", "command line: --time 'soon' is not a time limit"),
        ("--time 6", "--time of 6 minutes leaves none to train before saving; lower --grace"),
        ("--launcher mpirun", "--launcher must be torchrun or srun, got 'mpirun'"),
        ("--launcher srun", "base.yaml:7: --max-restarts is a flag of torchrun, which --launcher srun does not start"),
        ("--rdzv-endpoint a:1", "command line: in a job --rdzv-endpoint follows from SLURM"),
        ("--nproc-per-node gpu", "command line: a job needs --nproc-per-node as a number, got 'gpu'"),
        ("--gpus-per-node 4", "8 ranks on a node with 4 GPUs"),
        ("--requeues many", "--requeues takes a whole number, got 'many'"),
        ("--chain 0", "--chain takes a whole number, got '0'"),
        ("--chain 2 --dependency afterok:1", "--chain makes its own --dependency"),
        ("--load elsewhere", "each attempt would begin at --load 'elsewhere' again, not at --save"),
        ("--finetune", "each attempt would begin at iteration 0 again with --finetune"),
        ("--exit-signal SIGINT", "a job is stopped by SIGTERM"),
        ("--save=false --requeues 1", "--requeues needs --save"),
    ],
)
def test_what_cannot_be_a_job_is_refused_in_one_line(write: Write, overrides: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as refused:
        rendered("base.yaml", overrides=overrides)
    assert "\n" not in str(refused.value)


def test_an_unknown_flag_of_the_block_has_a_suggestion(write: Write) -> None:
    write("SLURM:\n  --partion: gpu\n")
    with pytest.raises(ValueError, match=r"run\.yaml:2: unknown SLURM flag '--partion'; did you mean '--partition'\?"):
        recipe.load("run.yaml", {})


def test_flags_of_plugins_go_to_sbatch_as_they_are(write: Write) -> None:
    block = (
        "SLURM:\n  --uenv: prgenv-gnu/24.7\n  --environment: my.toml\n  --hint: nomultithread\n  --nv-special: true\n"
    )
    write(f"extends: base\n{block}", "plugin.yaml")
    lines = rendered("plugin.yaml").splitlines()
    for line in ("--uenv=prgenv-gnu/24.7", "--environment=my.toml", "--hint=nomultithread", "--nv-special"):
        assert f"#SBATCH {line}" in lines


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_wrapper_runs_every_step_and_has_the_python_of_a_container(
    write: Write, stubs: dict[str, str], launcher: str
) -> None:
    block = f"SLURM:\n  --launcher: {launcher}\n  --wrapper: singularity exec --bind '/a b' image.sif\n"
    write(f"LAUNCH:\n  --nnodes: 4\nMODEL_ARGS:\n  --save: runs\n{block}", "run.yaml")
    wrapper = Path("bin/singularity")
    wrapper.write_text('#!/bin/sh\nprintf "%s|" "$@" >>wrapped\necho >>wrapped\nshift 4\nexec "$@"\n')
    wrapper.chmod(0o755)
    Path("bin/python").rename("bin/python3")
    done = run(rendered("run.yaml"), stubs)
    assert done.returncode == 0, done.stderr
    # nodes are checked, their reports are read, and the ranks start
    assert Path("wrapped").read_text().count("exec|--bind|/a b|image.sif|") == len(noted("started")) == 3


def test_usr2_reaches_torchrun_as_sigterm(write: Write, stubs: dict[str, str]) -> None:
    write("extends: base\nMODEL_ARGS:\n  --save: runs\nSLURM:\n  --python: python\n  --signal: USR2@600\n")
    # SLURM signals every process of the task: this one, which stands for torchrun, and the shell that started it
    Path("bin/python").write_text(
        '#!/bin/sh\ntrap "touch told; exit 7" TERM\nwhile :; do kill -USR2 $$ $PPID; sleep 0.1; done\n'
    )
    text = rendered("run.yaml", overrides="--no-preflight")
    assert "#SBATCH --signal=USR2@600\n" in text
    assert run(text, stubs).returncode == 7
    assert Path("told").exists()


@pytest.mark.parametrize("name", ["--acount", "--Uenv x", "--$(touch hacked)", "--a b", "uenv"])
def test_what_is_like_a_known_flag_or_no_flag_is_refused(write: Write, name: str) -> None:
    write(f"SLURM:\n  {json.dumps(name)}: x\n")
    with pytest.raises(ValueError, match=r"run\.yaml:2: unknown SLURM flag"):
        recipe.load("run.yaml", {})


@pytest.mark.parametrize("name", ["$(touch hacked)", "A B", "A=B", "1A", ""])
def test_a_name_of_a_variable_is_one_word(write: Write, name: str) -> None:
    write(f"ENV_VARS:\n  {json.dumps(name)}: 1\n")
    with pytest.raises(ValueError, match=r"run\.yaml:2: .* is not a name of an environment variable"):
        recipe.load("run.yaml", {})


def test_recipes_of_an_array_ask_for_the_same_job_and_save_apart(write: Write) -> None:
    write("extends: base\nLAUNCH:\n  --nnodes: 2\nMODEL_ARGS:\n  --save: other\n", "small.yaml")
    with pytest.raises(ValueError, match="small asks for another job than base"):
        rendered("base.yaml", "small.yaml")
    with pytest.raises(ValueError, match="two recipes of the array save in the same folder"):
        rendered("base.yaml", "base.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("30:59", 30),
        ("4:00:00", 240),
        ("1-2", 26 * 60),
        ("1-2:30", 26 * 60 + 30),
        ("2-0:15:0", 2880 + 15),
        ("UNLIMITED", 0),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    assert slurm_flags.minutes(text) == expected


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_every_shipped_recipe_is_a_job(launcher: str) -> None:
    # how nodes find each other when they are started by hand is not for a job
    for name in recipe.shipped("recipes"):
        run = recipe.load(name, {"DATA_PATH": "/data"}, ["--launcher", launcher], job=True)
        text = script([job_of(run)])
        assert f"#SBATCH --nodes={run.launch['--nnodes'].text if '--nnodes' in run.launch else 1}\n" in text
        assert "--rdzv" not in text
        assert "--node-rank" not in text


def test_no_flag_means_two_things() -> None:
    from megatron_cp.megatron.arguments.known_flags import parser

    assert not set(parser()._option_string_actions) & {*slurm_flags.KNOWN, *slurm_flags.WRITTEN_BY_US}
    assert not {*recipe.TORCHRUN_FLAGS} & {*slurm_flags.KNOWN, *slurm_flags.WRITTEN_BY_US}


def test_a_dry_run_prints_the_script_and_submits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # without sbatch, submitting would fail
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(app, ["submit", "--dry-run", "quickstart", "--requeues", "3"])
    assert result.exit_code == 0, result.exception
    assert result.stdout == rendered("quickstart", overrides="--requeues 3")
