"""Inspect a checkpoint in Megatron's distributed format: contents, damage, and topologies that can load it."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.grid import divisors
from megatron_cp.runlog import checkpoint_iteration
from megatron_cp.units import is_whole

INDEX = ".metadata"
DESCRIPTION = "metadata.json"
# the common state of releases before 0.19
COMMON_FILE = "common.pt"
# Megatron's arguments for the sizes of a model's layers
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_experts")
# what a run must share with the checkpoint, in the order in which a reader asks
SHAPE = (*SIZES, "padded_vocab_size", "seq_length")
TOPOLOGY = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
    "pp_schedule",
)


class Bytes(NamedTuple):
    """Bytes on disk by kind."""

    weights: int = 0
    optimizer: int = 0
    other: int = 0


class Contents(NamedTuple):
    """One iteration's checkpoint.

    damage:     what is missing or cut off, one sentence per file; empty for a whole checkpoint
    parameters: elements of all weight tensors
    saved:      the training arguments that the checkpoint carries; empty when it is damaged
    takes:      for every parallel size the values that can load it
    optimizer:  what may happen to the optimizer state
    """

    folder: Path
    iteration: int
    damage: list[str]
    parameters: int
    dtypes: list[str]
    stored: Bytes
    saved: dict[str, Any]
    takes: dict[str, str]
    optimizer: str


def iterations(folder: Path) -> list[Path]:
    """Return the iterations in a --save folder, oldest first; `folder` itself when it is one."""
    if (folder / DESCRIPTION).is_file() or folder.name.startswith("iter_") or _other_format(folder):
        return [folder]
    return sorted(path for path in (*folder.glob("iter_*"), folder / "release") if path.is_dir())


def chosen(folder: Path) -> Path | None:
    """Return the iteration that a run with `--load folder` resumes from, by Megatron's tracker file."""
    newest = checkpoint_iteration(folder)
    return None if newest is None else folder / f"iter_{newest:07d}"


def read(folder: Path) -> Contents:
    """Read the metadata of one iteration's folder; tensors are not loaded.

    The arguments are unpickled as Megatron does when it resumes: read only checkpoints that you would also load.
    Raises ValueError for a checkpoint of another format than torch_dist.
    """
    undescribed = _undescribed(folder)
    index, damage = (None, undescribed) if undescribed else _index(folder)
    damage += [] if index is None else list(_cut_off(folder, index))
    digits = folder.name.removeprefix("iter_")
    number = int(digits) if is_whole(digits) else -1
    weights = {} if index is None else _weights(index)
    elements = sum(prod(tensor.size) for tensor in weights.values())
    dtypes = sorted({str(tensor.properties.dtype).removeprefix("torch.") for tensor in weights.values()})
    if index is None or damage:
        return Contents(
            folder=folder,
            iteration=number,
            damage=damage,
            parameters=elements,
            dtypes=dtypes,
            stored=Bytes(),
            saved={},
            takes={},
            optimizer="",
        )
    with _readable(folder):
        return _described(folder, number, index, elements, dtypes)


def _described(folder: Path, number: int, index: Any, elements: int, dtypes: list[str]) -> Contents:
    arguments = _arguments(folder, index)
    saved = {name: getattr(arguments, name, None) for name in (*SHAPE, *TOPOLOGY)}
    stored = _stored(index)
    return Contents(
        folder=folder,
        iteration=number,
        damage=[],
        parameters=elements,
        dtypes=dtypes,
        stored=stored,
        saved=saved,
        takes=takes(arguments),
        optimizer=optimizer_rule(arguments, stored),
    )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raise ValueError in one line for what ends the reading of the arguments: what was unpickled may be anything."""
    # torch's exception of a failed load is no Exception
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except Refused:
        raise
    except (Exception, CheckpointException) as error:
        raise Refused(
            f"{folder}: its arguments cannot be read ({_one_line(error)}): damaged, or not saved by Megatron; "
            "another iteration is loaded with --ckpt-step"
        ) from error


def common_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside its sharded tensors; raises ValueError where that cannot be read."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    with _readable(folder):
        found = load_common_state_dict(str(folder))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}")
        return found


def unreadable(folder: Path) -> list[str]:
    """Return what is wrong with one iteration's index, in a sentence; empty for one that can be read."""
    return _index(folder)[1]


def damage(folder: Path) -> list[str]:
    """Return which of one iteration's files are missing or cut off, a sentence each; empty for a whole checkpoint."""
    index, problems = _index(folder)
    return problems if index is None else list(_cut_off(folder, index))


def _undescribed(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint's description, written last; raises ValueError for other formats."""
    description = folder / DESCRIPTION
    if other := _other_format(folder):
        raise Refused(f"{folder} is {other}, and only torch_dist is read; save with --ckpt-format torch_dist")
    if not description.is_file():
        return [f"{DESCRIPTION} is missing: the save was interrupted, or the folder is of another kind"]
    try:
        found = dict(json.loads(description.read_text())).get("sharded_backend")
    except (RecursionError, TypeError, ValueError) as error:
        return [f"{DESCRIPTION} cannot be read ({error}): it is cut off or of another kind"]
    if found != "torch_dist":
        raise Refused(f"{folder} is in the format {found!r}, and only torch_dist is read; save with --ckpt-format")
    return []


def _index(folder: Path) -> tuple[Any, list[str]]:
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / INDEX).is_file():
        return None, [f"the index {INDEX} is missing: the save was interrupted"]
    try:
        index = FileSystemReader(folder).read_metadata()
        # a pickle may hold anything
        ends = [stored.offset + stored.length for stored in index.storage_data.values()]
        assert not ends or (isinstance(max(ends), int) and isinstance(index.state_dict_metadata, dict))
    except Exception as error:
        return None, [f"the index {INDEX} cannot be read ({_one_line(error)}): it is cut off or of another kind"]
    return index, []


def _one_line(error: BaseException) -> str:
    # a failed load says what happened on each rank, with its stack
    for failed, _ in getattr(error, "failures", {}).values():
        error = failed
    return " ".join(str(error).split()) or type(error).__name__


def _other_format(folder: Path) -> str:
    """Name the format of a checkpoint that is not Megatron's distributed one, by its files; empty for any other."""
    if (folder / DESCRIPTION).is_file():
        return ""
    if any(path.name.startswith("mp_rank_") for path in folder.iterdir() if path.is_dir()):
        return "in the format torch, a file per rank"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "a Hugging Face model"
    if _of_torch_alone(folder):
        return "in the format torch_dcp or fsdp_dtensor"
    return ""


def _of_torch_alone(folder: Path) -> bool:
    """True if torch wrote the whole checkpoint: its index is there, and the common state of torch_dist is not."""
    if not (folder / INDEX).is_file() or (folder / COMMON_FILE).is_file():
        return False
    index, _ = _index(folder)
    return index is not None and not _has_common_state(index)


def _has_common_state(index: Any) -> bool:
    return any(name.startswith("common_state") for name in index.state_dict_metadata)


def _cut_off(folder: Path, index: Any) -> Iterator[str]:
    ends: dict[str, int] = {}
    for stored in index.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing, {end:,} bytes"
        elif (size := path.stat().st_size) < end:
            yield f"{name} is cut off: {size:,} bytes of {end:,}"


def _weights(index: Any) -> dict[str, Any]:
    tensors = index.state_dict_metadata
    return {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "size") and _kind(name) == "weights"}


def _kind(name: str) -> str:
    if name.startswith(("optimizer.", "chained_")):
        return "optimizer"
    states = ("rng_state", "rerun_state_machine", "common_state", "opt_param_scheduler", "earlier_weights")
    return "other" if name.startswith(states) or "_extra_state" in name else "weights"


def _stored(index: Any) -> Bytes:
    sums = dict.fromkeys(Bytes._fields, 0)
    for key, stored in index.storage_data.items():
        sums[_kind(key.fqn)] += stored.length
    return Bytes(**sums)


def _arguments(folder: Path, index: Any) -> Any:
    with warnings.catch_warnings():
        # torch warns because one process reads alone
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        has = (folder / COMMON_FILE).is_file() or _has_common_state(index)
        common = common_state(folder) if has else {}
    if "args" not in common:
        raise Refused(f"{folder} holds no arguments of Megatron's training: another trainer has saved it")
    return common["args"]


def takes(saved: Any) -> dict[str, str]:
    """Return for every parallel size the values that can load the weights, by Megatron's rules of divisibility."""
    groups = saved.num_query_groups or saved.num_attention_heads
    tensor = [
        size
        for size in divisors(saved.num_attention_heads)
        if not saved.ffn_hidden_size % size and (groups % size == 0 or size % groups == 0)
    ]
    sizes = {
        "--tensor-model-parallel-size": _listed(tensor),
        "--pipeline-model-parallel-size": f"{_listed(divisors(saved.num_layers))} (others with uneven stages)",
        "--context-parallel-size": f"any with {saved.seq_length} tokens divisible by twice its value",
    }
    if saved.num_experts:
        sizes["--expert-model-parallel-size"] = _listed(divisors(saved.num_experts))
    return sizes


def optimizer_rule(saved: Any, stored: Bytes) -> str:
    """Return in one line how far the optimizer state can move between topologies."""
    if not stored.optimizer:
        return "not saved: resume with --no-load-optim"
    # experts that are divided between ranks have an optimizer of their own
    divided = bool(saved.num_experts) and saved.expert_model_parallel_size > 1
    experts = f" with --expert-model-parallel-size {'above 1' if divided else '1'}" if saved.num_experts else ""
    if not saved.use_distributed_optimizer:
        return f"moves to any topology{experts}; without --use-distributed-optimizer only"
    if saved.dist_ckpt_optim_fully_reshardable:
        return f"moves to any topology{experts}; with --use-distributed-optimizer only"
    if saved.num_experts:
        experts = f", EP={saved.expert_model_parallel_size}"
    sizes = f"TP={saved.tensor_model_parallel_size} and PP={saved.pipeline_model_parallel_size}{experts}"
    return f"moves to any CP and DP at {sizes}; elsewhere only the weights do, with --no-load-optim"


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
