"""Configs of other systems become recipes; each key is mapped, approximated, refused or ignored, and always named."""

import json
import re
from pathlib import Path

import pytest

from megatron_cp.megatron.arguments import validate
from megatron_cp.megatron.arguments.known_flags import kept_parser
from megatron_cp.megatron.arguments.recipe_flags import problems
from megatron_cp.recipe import recipe
from megatron_cp.recipe.foreign import BRIDGE, DEEPSPEED, NEMO, SYSTEMS
from megatron_cp.recipe.foreign.keys import ForeignConfig, Key, Outcome, flat, read, words
from megatron_cp.recipe.foreign.overrides import model_of, system_of, values_of
from megatron_cp.recipe.foreign.python_config import assignments
from megatron_cp.recipe.from_command import Imported, as_yaml, imported, whole
from megatron_cp.recipe.recipe import TORCHRUN_FLAGS, Recipe
from tests.megatron.arguments.test_validate import verdict
from tests.ranks import run_ranks
from tests.recipe.foreign_configs import CASES, Case


def made(case: Case, folder: Path) -> Imported:
    return imported(case.write(folder), {"PATH": "/usr/bin:/bin"}, case.model)


def named(told: list[str], outcome: str) -> set[str]:
    """Return the keys that lines of this outcome name."""
    return {line.removeprefix(f"{outcome}: ").split(" ")[0] for line in told if line.startswith(f"{outcome}: ")}


def texts(one: Recipe) -> dict[str, tuple[str, ...]]:
    return {flag: setting.values for flag, setting in (*one.model_args.items(), *one.launch.items())}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_config_becomes_a_recipe(case: Case, tmp_path: Path) -> None:
    done = made(case, tmp_path)
    for outcome in ("refused", "approximated", "unknown"):
        assert named(done.told, outcome) == set(getattr(case, outcome)), outcome
    assert done.extends == case.extends
    found = texts(done.recipe)
    assert {flag: found.get(flag) for flag in words(case.becomes)} == words(case.becomes)
    file = tmp_path / "made.yaml"
    file.write_text(as_yaml(done, "a config"))
    assert texts(recipe.load(str(file), {})) == texts(whole(done, {}))
    given = {flag: setting for flag, setting in done.recipe.model_args.items() if setting.given}
    assert list(problems(given, kept_parser())) == []
    told = "\n".join(done.told).replace("_config", "")
    for key in flat(case.config.get("ConfigContainer", case.config)):
        sections = [key.rsplit(".", cut)[0].replace("_config", "") for cut in range(key.count(".") + 1)]
        assert any(section in told for section in sections), f"{key} is left out silently"


@pytest.mark.slow
def test_recipes_validate(tmp_path: Path) -> None:
    answers = {}
    for case in CASES:
        folder = tmp_path / case.name
        folder.mkdir()
        try:
            run = validate.run_of(whole(made(case, folder), {}), case.cluster)
            (answers[case.name],) = run_ranks(1, verdict, run)
        except ValueError as error:
            answers[case.name] = str(error)
    refused = [f"{name}: {answer}" for name, answer in answers.items() if isinstance(answer, str)]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("system", SYSTEMS, ids=[system.name for system in SYSTEMS])
def test_tables_name_flags_that_there_are_and_each_key_once(system) -> None:
    known = {*kept_parser()._option_string_actions, *TORCHRUN_FLAGS}
    rows: tuple[Key, ...] = system.keys
    told = " ".join(f"{row.becomes} {row.note}" for row in rows)
    flags = set(re.findall(r"--[a-z0-9][\w-]*", told))
    own = {name for row in rows for name in row.names}
    assert {flag for flag in flags if flag not in known | own} == set()
    assert [row.names for row in rows if row.how == Outcome.MAPPED and not row.becomes] == []
    names = [name for row in rows for name in row.names]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_flags_given_by_hand_win_and_that_is_told(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"gradient_clipping": 1.0, "optimizer": {"params": {"lr": 1e-3}}}))
    done = imported([str(file), "--lr", "2e-4", "--clip-grad", "1.0"], {})
    assert texts(done.recipe) == {"--lr": ("2e-4",), "--clip-grad": ("1.0",)}
    assert done.told[-1] == "ignored: optimizer.params.lr: --lr 2e-4 given by hand counts"


def test_two_keys_for_one_flag_are_told() -> None:
    config = {"optimizer": {"params": {"lr": 1}}, "scheduler": {"params": {"warmup_max_lr": 2}}}
    done = read(DEEPSPEED, ForeignConfig(config))
    assert done.flags["--lr"] == ("1",)
    assert done.entries[1].taken.note == "--lr 1 of a key above counts"


def test_a_python_config_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(
        "import os\n"
        f"os.system('touch {tmp_path}/ran')\n"
        "A: int = 2\nB = A * 3 // 2\nC = dict(x=A, y={'z': [1, (2, B)]}, m=AMP.NAIVE, t=Adam)\n"
        f"D = open('{tmp_path}/ran', 'w')\nE = C['y']\nF = dict(**C)\nG = 'a' * 10\nH = 1 / 0\nI = -1\n"
    )
    found = assignments(file)
    assert not (tmp_path / "ran").exists()
    computed = {name for name, value in found.items() if type(value).__name__ == "Computed"}
    assert computed == {"D", "F", "G", "H"}
    assert found["C"] == {"x": 2, "y": {"z": [1, [2, 3]]}, "m": "AMP.NAIVE", "t": "Adam"}
    assert (found["B"], found["E"], found["I"]) == (3, {"z": [1, [2, 3]]}, -1)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.json", '{"train_batch_size": SIZE}', "not JSON"),
        ("b.json", "[1]", "expected a mapping"),
        ("c.json", '{"a": 1}', "no key of DeepSpeed among a"),
        ("d.py", "x = (\n", "cannot read this as Python"),
        ("e.py", "lr = 1\n", "no key of Colossal-AI among lr"),
        ("f.yaml", "MODEL_ARGS: {--lr: 1}\n", "is a recipe already"),
        ("g.yaml", "a: {b: 1}\n", "no key of NeMo or Megatron-Bridge among a.b"),
        ("h.yaml", "- 1\n", "expected sections"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(name: str, text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error) as refused:
        imported([str(tmp_path / name)], {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("model.num_layers=2", "model.num_layers", 2),
        ("++optim.lr=3e-4", "optim.lr", 3e-4),
        ("checkpoint.save=null", "checkpoint.save", None),
        ("dataset.blend=[a,b]", "dataset.blend", ["a", "b"]),
        ("a.b={c: [}", "a.b", "{c: [}"),
    ],
)
def test_overrides_are_read_as_yaml(word: str, key: str, value: object) -> None:
    assert values_of([word]) == {key: value}


def test_whose_overrides_and_which_model() -> None:
    assert system_of({"model.num_layers": 2, "train.train_iters": 1}) is BRIDGE
    assert system_of({"model.num_layers": 2, "trainer.max_steps": 1}) is NEMO
    shipped = [name.rpartition("/")[2] for name in recipe.shipped("models")]
    assert model_of("llama31_405b_pretrain_config", shipped) == "llama3.1-405b"
    assert model_of("llama3_8b", shipped) == "llama3-8b"
    assert model_of("unknown_1b", shipped) is None


@pytest.mark.parametrize(
    ("more", "becomes", "told"),
    [
        ({}, "--zero-quantized-gradients int8 --zero-quantized-weights", ["approximated", "mapped"]),
        ({"zero_optimization.stage": 3}, "", ["refused", "refused"]),
        (
            {"zero_optimization.stage": 3, "pipeline.stages": 2},
            "--zero-quantized-gradients int8 --zero-quantized-weights",
            ["approximated", "mapped"],
        ),
        ({"fp16.enabled": True}, "", ["refused", "refused"]),
    ],
    ids=["stage 1", "stage 3", "beside a pipeline", "fp16"],
)
def test_quantised_messages_of_deepspeed(more: dict[str, object], becomes: str, told: list[str]) -> None:
    keys = ("zero_optimization.zero_quantized_gradients", "zero_optimization.zero_quantized_weights")
    done = read(DEEPSPEED, ForeignConfig({"zero_optimization.stage": 1, **dict.fromkeys(keys, True), **more}))
    assert {flag: done.flags[flag] for flag in done.flags if "quantized" in flag} == words(becomes)
    assert [entry.taken.outcome for entry in done.entries if entry.key in keys] == told
    entry, *_ = read(DEEPSPEED, ForeignConfig({"zero_optimization.zero_hpz_partition_size": 8})).entries
    assert (entry.taken.outcome, "training/hsdp" in entry.taken.note) == (Outcome.REFUSED, True)


def test_states_on_disk_of_deepspeed() -> None:
    device, path = (f"zero_optimization.offload_optimizer.{name}" for name in ("device", "nvme_path"))
    given = {"zero_optimization.stage": 1, device: "nvme", path: "/nvme", "bf16.enabled": True}
    for more, becomes, told in [
        ({}, "--optimizer-state-dir /nvme --optimizer-state-weights", "approximated"),
        ({"bf16.enabled": False}, "--optimizer-state-dir /nvme", "approximated"),
        ({path: None}, "", "refused"),
        ({"zero_optimization.stage": 3}, "", "refused"),
    ]:
        values = {key: value for key, value in {**given, **more}.items() if value is not None}
        done = read(DEEPSPEED, ForeignConfig(values))
        assert {flag: done.flags[flag] for flag in done.flags if "state" in flag} == words(becomes)
        assert [entry.taken.outcome for entry in done.entries if entry.key == device] == [told]


@pytest.mark.parametrize("value", ["auto", "???", "${multiply:${a}, 2}"])
def test_values_of_another_program_are_refused_by_name(value: str) -> None:
    (entry, *_) = read(DEEPSPEED, ForeignConfig({"gradient_clipping": value})).entries
    assert entry.taken.outcome == Outcome.REFUSED
    assert "--clip-grad" in entry.taken.note


@pytest.mark.parametrize(
    ("key", "value", "flags", "outcome"),
    [
        ("dataset.blend", [["a", "b"], [1, 2]], "--data-path 1 a 2 b", Outcome.MAPPED),
        ("dataset.blend", [["a"], None], "--data-path a", Outcome.MAPPED),
        ("dataset.blend", ["a", "b"], "--data-path a b", Outcome.MAPPED),
        ("model.virtual_pipeline_model_parallel_size", 1, "", Outcome.MAPPED),
        ("model.activation_func", "torch.nn.functional.silu", "--swiglu", Outcome.MAPPED),
        ("model.sequence_parallel", "perhaps", "", Outcome.REFUSED),
        ("mixed_precision", "bf16_with_fp8_current_scaling_mixed", None, Outcome.MAPPED),
        ("model.cuda_graph_impl", "none", "", Outcome.MAPPED),
        ("checkpoint.save", None, "", Outcome.IGNORED),
        ("peft.dim", 8, "", Outcome.REFUSED),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value),
)
def test_values_of_bridge(key: str, value: object, flags: str | None, outcome: Outcome) -> None:
    done = read(BRIDGE, ForeignConfig({key: value}))
    assert done.entries[0].taken.outcome == outcome
    if flags is not None:
        assert done.flags == words(flags)


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"trainer.max_time": "00:01:30:59"}, "--exit-duration-in-mins 90"),
        ({"trainer.devices": -1}, ""),
        ({"model.fp8": True, "model.fp8_margin": 1}, "--fp8-format hybrid --fp8-margin 1"),
        ({"model.fp8": False, "model.fp8_margin": 1}, ""),
        ({"trainer.precision": 16, "model.native_amp_init_scale": 4096}, "--fp16 --initial-loss-scale 4096"),
        ({"trainer.val_check_interval": 0.5}, ""),
        ({"model.data.data_prefix": [0.5, "a", 0.5, "b"]}, "--data-path 0.5 a 0.5 b"),
        ({"resume.restore_config.path": "/x"}, ""),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_values_of_nemo(values: dict[str, object], flags: str) -> None:
    assert read(NEMO, ForeignConfig(values)).flags == words(flags)


def test_secrets_and_line_breaks_stay_out_of_the_summary() -> None:
    told = read(DEEPSPEED, ForeignConfig({"wandb": {"api_key": "hidden"}, "x\ny": "a\nb"})).told()
    assert "hidden" not in "".join(told)
    assert not [line for line in told if "\n" in line]


def test_a_word_of_another_section_is_no_override() -> None:
    done = imported(["torchrun --nproc-per-node 2 a.py --data-path v1.2=x --lr 1"], {})
    assert texts(done.recipe)["entry"] == ("a.py",)
    assert done.told == []


def test_chunks_of_colossal_ai_are_stage_three_where_only_running_would_show_how(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("zero = dict(model_config=dict(shard_strategy=TensorShardStrategy()), optimizer_config=dict())\n")
    done = imported([str(file)], {})
    assert done.extends == ("training/zero3",)
    assert named(done.told, "approximated") == {"zero.model_config", "zero.optimizer_config", "clip_grad_norm"}
