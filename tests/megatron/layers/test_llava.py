"""Megatron's LLaVAModel trains on several context-parallel ranks as on one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cp.errors import Refused
from megatron_cp.megatron.layers.llava import ContextParallelLLaVA, llava_specs
from megatron_cp.megatron.layers.specs import SpecProvider, local_layer_spec
from megatron_cp.megatron.machine.cpu import cpu_runtime
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

IMAGE, VOCABULARY, LONGEST = -200, 64, 32


def config(heads: int, ranks: int, **changes: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        context_parallel_size=ranks,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        **changes,
    )


def arguments(ranks: int, tensor: int = 1) -> dict[str, Any]:
    sizes = {"tensor_model_parallel_size": tensor}
    language = config(4, ranks, **sizes, sequence_parallel=tensor > 1)
    vision, projection = config(2, 1, **sizes), config(4, 1, **sizes)
    vision.vision_model_type = "internvit"
    projection.ffn_hidden_size = 24
    specs = llava_specs(language, vision)
    return {
        "language_transformer_config": language,
        "language_transformer_layer_spec": specs.language,
        "language_vocab_size": VOCABULARY,
        "language_max_sequence_length": LONGEST,
        "vision_transformer_config": vision,
        "vision_transformer_layer_spec": specs.vision,
        "drop_vision_class_token": False,
        "vision_projection_config": projection,
        "vision_projection_layer_spec": specs.projection,
        "language_position_embedding_type": "rope",
        "img_h": 8,
        "img_w": 8,
        "patch_dim": 4,
    }


def batch(step: int) -> tuple[Any, ...]:
    """Tiles of five tokens in two samples, one of which begins with a tile: three, at last one for all ranks."""
    torch.manual_seed(step)
    text = 11 if step else 12
    ids, images = torch.randint(VOCABULARY, (2, text)), torch.randn(3 if step < 2 else 1, 3, 8, 8)
    ids[0, 0] = IMAGE
    if step < 2:
        ids[0, 6] = ids[1, 4] = IMAGE
    labels = torch.roll(ids, -1, 1)
    mask = (torch.arange(text) < text - 1).float().expand(2, -1) * (labels != IMAGE)
    return images, ids, torch.arange(text).expand(2, -1), None, labels, mask


def trained(ranks: int, tensor: int = 1, steps: int = 3) -> dict[str, Any]:
    """Losses and gradient norms of some steps, tiles that this rank encodes, and what is refused."""
    dist.init_process_group("gloo")
    with cpu_runtime():
        parallel_state.initialize_model_parallel(tensor, context_parallel_size=ranks)
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        model = ContextParallelLLaVA(**arguments(ranks, tensor))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found: dict[str, Any] = {"losses": [], "norms": [], "tokens": [], "tiles": []}
        model.vision_model.register_forward_pre_hook(lambda _, args: found["tiles"].append(len(args[0])))
        for step in range(steps):
            losses, mask = model(*batch(step))
            if ranks == tensor == 1 and step == 0:
                # even lengths need no pads, and upstream's own forward takes them
                assert_equal(LLaVAModel.forward(model, *batch(step)), (losses, mask))
            loss = (losses * mask).sum()
            optimizer.zero_grad()
            loss.backward()
            assert all(weight.grad is not None for weight in model.vision_model.parameters())
            total, count = loss.detach().clone(), mask.sum()
            for part in (total, count, *(weight.grad for weight in model.parameters())):
                dist.all_reduce(part)
            optimizer.step()
            found["losses"].append(float(total / count))
            found["norms"].append([float(weight.grad.norm()) for weight in model.parameters()])
            found["tokens"].append(losses.shape[1])
        found["refused"] = refusals(model) if ranks > 1 else []
        dist.barrier()
    return found


def assert_equal(theirs: Any, ours: Any) -> None:
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other)


def refusals(model: ContextParallelLLaVA) -> list[str]:
    """Return why calls are refused: packed images, more tokens than the language model takes; by upstream, any."""
    texts, stock = [], arguments(2)
    layer = local_layer_spec(stock["language_transformer_config"], SpecProvider(), moe=False)
    # the reason for our class; once this is gone, upstream's own can be built
    with pytest.raises(AssertionError, match="supported only with TE DotProductAttention"):
        LLaVAModel(**{**stock, "language_transformer_layer_spec": layer})
    for others in ({"imgs_sizes": torch.ones(3, 2)}, {}):
        model._language_max_sequence_length = 12
        with pytest.raises(Refused) as refused:
            model(*batch(0), **others)
        texts.append(str(refused.value))
    return texts


def test_llava_trains_on_two_ranks_as_on_one() -> None:
    (alone,) = run_ranks(1, trained, 1)
    parts = run_ranks(2, trained, 2)
    # one of one tile is encoded on each rank, by the first for the sake of its gradients: of zeros
    assert [found["tiles"] for found in parts] == [[1, 1, 1], [2, 2, 1]]
    for found in parts:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        for ours, theirs in zip(found["norms"], alone["norms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        # of both ranks: 10 and 9 texts with two tiles, 10 with one, padded to a multiple of 4
        assert found["tokens"] == [10, 10, 8]
        packed, long = found["refused"]
        assert "deals tiles of whole samples in training, got imgs_sizes; leave it out, or use" in packed
        assert "do not fit into 12 tokens of a sequence, which has room for 12 of 15: no rank can take" in long


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_llava_under_sequence_parallelism_has_the_loss_of_one_rank(ranks: int) -> None:
    (alone,) = run_ranks(1, trained, 1, 1, 1)
    for found in run_ranks(2 * ranks, trained, ranks, 2, 1):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_decoder": False}, "on one pipeline stage"),
        ({"tile_tags": [[1]], "dynamic_resolution": True}, "got dynamic_resolution and tile_tags; leave it out"),
        ({"temporal_patch_dim": 2}, "got temporal_patch_dim 2"),
        ({"ranks of the tower": 2}, "the vision tower takes whole tiles, got its context_parallel_"),
    ],
)
def test_models_whose_tiles_cannot_be_dealt_are_refused(changes: dict[str, Any], message: str) -> None:
    changes = {**changes}
    tower = config(2, changes.pop("ranks of the tower", 1))
    with pytest.raises(Refused, match=message):
        ContextParallelLLaVA(
            language_transformer_config=config(4, 2),
            language_transformer_layer_spec=None,
            vision_transformer_config=tower,
            **changes,
        )
