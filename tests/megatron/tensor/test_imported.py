"""One config of Colossal-AI, imported in each of its tensor modes, trains alike through the real pretrain()."""

from pathlib import Path

import pytest

from megatron_cp.recipe.command import flag_words, processes
from megatron_cp.recipe.from_command import imported, whole
from tests.megatron.pretraining import pretrain_losses
from tests.ranks import run_ranks
from tests.tolerances import GRAD_NORM_DIGITS, LOSS_DIGITS

CONFIG = {
    "BATCH_SIZE": 4,
    "NUM_MICRO_BATCHES": 2,
    "SEQ_LEN": 32,
    "NUM_LAYERS": 2,
    "HIDDEN_SIZE": 64,
    "NUM_HEADS": 8,
    "MLP_RATIO": 2,
    "VOCAB_SIZE": 127,
    "TRAIN_ITERS": 2,
    "SEED": 7,
    "clip_grad_norm": 1.0,
    "optimizer": {"type": "Adam", "lr": 1e-3, "weight_decay": 1e-2},
}
# what the config does not say; the modes but 1d have no biases
FLAGS = (
    "--mock-data --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 16 --attention-dropout 0 "
    "--hidden-dropout 0 --eval-interval 1000 --eval-iters 0 --log-interval 1 --transformer-impl local "
    "--no-create-attention-mask-in-dataloader --disable-bias-linear"
)
MODES = {"2d": {"size": 4}, "2.5d": {"size": 8, "depth": 2}, "3d": {"size": 8}}


def log_of(file, tensor):
    parallel = {"pipeline": 1, "tensor": tensor}
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in {**CONFIG, "parallel": parallel}.items()))
    recipe = whole(imported([str(file), *FLAGS.split(), "--nproc-per-node", str(tensor["size"])], {}), {})
    return run_ranks(processes(recipe), pretrain_losses, flag_words(recipe.model_args))[0]


@pytest.mark.slow
def test_one_config_of_colossal_ai_has_equal_losses_in_all_tensor_modes(tmp_path: Path) -> None:
    expected = log_of(tmp_path / "config.py", {"size": 2, "mode": "1d"})
    for mode, tensor in MODES.items():
        found = log_of(tmp_path / "config.py", {**tensor, "mode": mode})
        for step, other in zip(found, expected, strict=True):
            assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS), mode
            assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS), mode
