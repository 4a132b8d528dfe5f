"""Bytes that a layer keeps for its backward: sequence parallelism with selective recompute (arXiv:2205.05198)."""

import contextlib
import sys

import pytest

from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks


def kept_by_a_layer(flags):
    """Bytes of the tensors that the first layer keeps in its first forward, by their shapes, parameters left out."""
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_cp.megatron.process import pretrain
    from megatron_cp.megatron.process.launch import launched

    kept, sizes = {}, {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in parameters:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = tensor
            sizes[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape), str(tensor.dtype))
        return tensor

    parameters, inside = set(), contextlib.ExitStack()

    def watch(models):
        for model in models:
            parameters.update(one.untyped_storage().data_ptr() for one in model.parameters())
        layer = next(one for model in models for one in model.modules() if isinstance(one, TransformerLayer))

        def enter(*_):
            if not sizes:
                inside.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(lambda *_: inside.close())
        return models

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags):
        pretrain.run(prepare=lambda config: config.pre_wrap_hooks.append(watch))
    return sorted(sizes.values())


def kept(ranks, *flags):
    model = "--num-attention-heads 8 --num-query-groups 8 --hidden-size 64 --ffn-hidden-size 256 --train-iters 1"
    return run_ranks(ranks, kept_by_a_layer, tiny(model, *flags))[0]


def of_tokens(sizes):
    """Bytes of the tensors that have tokens and features: rotary tables, row statistics and random states left out."""
    return sum(size for size, shape, _ in sizes if len(shape) > 2 and shape[1] > 1 and size >= TOKENS * HIDDEN)


TOKENS, HIDDEN = 64, 64


@pytest.mark.slow
def test_sequence_parallelism_divides_what_a_layer_keeps_by_the_ranks():
    one = of_tokens(kept(1, "--tp-comm-type 1d"))
    tensor = of_tokens(kept(2, "--tensor-model-parallel-size 2 --tp-comm-type 1d"))
    sequence = of_tokens(
        kept(
            2,
            "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective --tp-comm-type 1d",
        )
    )
    # 34 s b h / t: all of it is divided; 10 + 24 / t without: norms, their outputs and the residuals are not
    assert sequence == one / 2
    whole = 2 * tensor - one
    assert whole == 6 * 4 * TOKENS * HIDDEN
