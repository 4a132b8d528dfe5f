"""What `megatron-cp inspect` says of checkpoints that Megatron itself has saved, whole and damaged."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, save
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.megatron.checkpoint import contents, resume
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import RankError, run_ranks


def saving(folder: Path, *flags: str) -> list[str]:
    return tiny(f"--train-iters 2 --save-interval 1 --ckpt-format torch_dist --save {folder}", *flags)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iterations 1 and 2 of a run with TP=2 and the distributed optimizer."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, pretrain_losses, saving(folder, "--tensor-model-parallel-size 2 --use-distributed-optimizer"))
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for path in saved.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(saved)).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / path.relative_to(saved)).write_bytes(path.read_bytes())
    return tmp_path


def inspected(folder: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["inspect", str(folder), *options])
    return done.exit_code, done.stdout


def test_a_whole_checkpoint(saved: Path) -> None:
    code, text = inspected(saved, "--json")
    found = json.loads(text)
    assert code == 0
    assert [one["iteration"] for one in found["iterations"]] == [1, 2]
    assert (found["iteration"], found["damage"]) == (2, [])
    # embedding and output; per layer q, k and v, projection, MLP, two norms; the last norm
    assert found["parameters"] == 2 * 128 * 32 + 2 * (64 * 32 + 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32
    assert found["saved"]["tensor_model_parallel_size"] == 2
    on_disk = sum(path.stat().st_size for path in (saved / "iter_0000002").glob("*.distcp"))
    assert sum(found["stored"].values()) == on_disk


def refusal(folder: Path) -> str:
    """The one line that refuses the folder, as `main` prints it; fails on any exception that would be a traceback."""
    done = CliRunner().invoke(app, ["inspect", str(folder)])
    assert isinstance(done.exception, (ValueError, RuntimeError, OSError, SystemExit)), done.exception
    text = done.stdout if isinstance(done.exception, SystemExit) else str(done.exception)
    assert done.exit_code == 1
    return text


@pytest.mark.parametrize("name", ["iter_0000003", "release", "."])
def test_a_checkpoint_of_a_file_per_rank_is_named_and_not_called_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "mp_rank_00").mkdir(parents=True)
    (tmp_path / name / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    text = refusal(tmp_path)
    assert text.endswith(
        "is in the format torch, a file per rank, and only torch_dist is read; save with --ckpt-format torch_dist"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["iter_0000003", "."])
def test_a_checkpoint_of_torch_alone_is_named_and_not_called_damaged(tmp_path: Path, name: str) -> None:
    state = {"args": SimpleNamespace(num_layers=1), "iteration": 3, "model": {"weight": torch.ones(3)}}
    save(state, checkpoint_id=tmp_path / name, no_dist=True)
    text = refusal(tmp_path)
    assert text.endswith(
        "is in the format torch_dcp or fsdp_dtensor, and only torch_dist is read; save with --ckpt-format torch_dist"
    )


def test_a_hugging_face_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "is a Hugging Face model" in refusal(tmp_path)


GARBAGE = (
    b"", b"\0" * 100, b"\xff\xfe garbage \x80", b"{}", b"[1, 2]", b"[" * 100_000, b"3", pickle.dumps({"a": 1}),
    pickle.dumps(3), pickle.dumps(None), pickle.dumps([1, "x"]),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "../latest_checkpointed_iteration.txt", "common.pt"])
def test_garbage_in_any_file_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    save({"weight": torch.ones(3)}, checkpoint_id=folder)
    (folder / name).write_bytes(content)
    assert "Traceback" not in refusal(tmp_path)


def test_the_topologies_that_it_names_do_load(saved: Path) -> None:
    flag, size = "--pipeline-model-parallel-size", "2"
    found = contents.read(saved / "iter_0000002")
    assert size in found.takes[flag].split(" (")[0].split(", ")
    assert (
        found.optimizer
        == "moves to any CP and DP at TP=2 and PP=1; elsewhere only the weights do, with --no-load-optim"
    )
    resumed = tiny(f"--load {saved} --train-iters 3 --no-load-optim --no-load-rng {flag} {size}")
    log = run_ranks(int(size), pretrain_losses, resumed)[0]
    assert [step["iteration"] for step in log] == [3]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("__1_0.distcp", cut, "__1_0.distcp is cut off: "),
        ("__0_0.distcp", remove, "__0_0.distcp is missing, "),
        (".metadata", cut, "the index .metadata cannot be read"),
        (".metadata", remove, "the save was interrupted"),
    ],
)
def test_damage_is_named_and_not_resumed_from(copy: Path, name: str, change: Callable[[Path], None], text: str) -> None:
    change(copy / "iter_0000002" / name)
    code, said = inspected(copy)
    assert code == 1
    assert text in said
    assert "iter_0000001  whole" in said
    with pytest.raises(RankError, match=r"is damaged: .*latest whole one with --ckpt-step 1"):
        run_ranks(2, pretrain_losses, saving(copy, f"--load {copy} --tensor-model-parallel-size 2"))


def test_damaged_arguments_are_one_line_and_not_resumed_from(copy: Path) -> None:
    folder = copy / "iter_0000002"
    stored = next(
        stored
        for key, stored in FileSystemReader(folder).read_metadata().storage_data.items()
        if key.fqn.startswith("common_state")
    )
    with (folder / stored.relative_path).open("r+b") as file:
        file.seek(stored.offset)
        file.write(bytes(stored.length))
    text = "iter_0000002: its arguments cannot be read (invalid load key, "
    assert text in refusal(copy)
    with pytest.raises(RankError) as ended:
        run_ranks(2, pretrain_losses, saving(copy, f"--load {copy} --tensor-model-parallel-size 2"))
    assert all(text in error.splitlines()[0] for error in ended.value.errors.values())
    assert len(ended.value.errors) == 2


def test_a_save_without_its_last_file_was_interrupted(copy: Path) -> None:
    (copy / "iter_0000002" / "metadata.json").unlink()
    code, said = inspected(copy)
    assert code == 1
    assert "metadata.json is missing: the save was interrupted" in said
    os.truncate(copy / "iter_0000001" / ".metadata", 10)
    (copy / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(ValueError, match="no other one is whole"):
        resume.check(SimpleNamespace(load=str(copy)))


def test_a_save_that_was_interrupted_hides_no_other(copy: Path) -> None:
    (copy / "iter_0000003").mkdir()
    (copy / "iter_0000003" / "__0_0.distcp").touch()
    code, said = inspected(copy)
    assert code == 0
    assert "iter_0000003  DAMAGED\n    metadata.json is missing: the save was interrupted" in said
    assert "iter_0000002  whole, resumed from here" in said


@pytest.mark.parametrize("index", [pickle.dumps(3), b"cnowhere\nNothing\n."])
def test_an_index_of_another_kind_is_damage(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / ".metadata").write_bytes(index)
    assert contents.read(tmp_path).damage[0].startswith("the index .metadata cannot be read")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_another_trainer_is_said(tmp_path: Path) -> None:
    save({"weight": torch.ones(4)}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(ValueError, match="another trainer has saved it"):
        contents.read(tmp_path)


@pytest.mark.parametrize(("make", "text"), [(False, "no folder"), (True, "holds no checkpoint")])
def test_what_is_no_checkpoint_is_said(tmp_path: Path, make: bool, text: str) -> None:
    folder = tmp_path / "runs"
    if make:
        folder.mkdir()
    with pytest.raises(ValueError, match=text):
        CliRunner().invoke(app, ["inspect", str(folder)], catch_exceptions=False)
