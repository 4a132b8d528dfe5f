"""Bytes that a layer keeps for its backward: sequence parallelism with selective recompute (arXiv:2205.05198)."""

import contextlib
import sys

import pytest

from megatron_cp.recipe import recipe
from megatron_cp.recipe.command import flag_words
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


SIZES = "--num-attention-heads 8 --num-query-groups 8 --hidden-size 64 --ffn-hidden-size 256 --train-iters 1"
TOKENS, HIDDEN = 64, 64


def kept(ranks, *flags, without=""):
    """Bytes that the first rank keeps of tensors with tokens and features.

    Rotary tables, statistics of rows and states of random numbers are left out.
    """
    sizes = run_ranks(ranks, kept_by_a_layer, tiny(SIZES, *flags, without=without))[0]
    return sum(size for size, shape, _ in sizes if len(shape) > 2 and shape[1] > 1 and size >= TOKENS * HIDDEN)


def preset(ranks):
    """The flags of sequence parallelism with selective recomputation, as a shipped file has them."""
    return " ".join(
        [
            *flag_words(recipe.load("training/sequence-parallel", {}).model_args),
            "--tensor-model-parallel-size",
            str(ranks),
        ]
    )


@pytest.mark.slow
def test_sequence_parallelism_divides_what_a_layer_keeps_by_the_ranks():
    one = kept(1, "--tp-comm-type 1d")
    tensor = kept(2, "--tensor-model-parallel-size 2 --tp-comm-type 1d")
    # 34 s b h / t: all of it is divided; 10 + 24 / t without: norms, their outputs and the residuals are not
    assert kept(2, preset(2)) == one / 2
    whole = 2 * tensor - one
    assert whole == 6 * 4 * TOKENS * HIDDEN


@pytest.mark.slow
def test_a_layer_of_the_paper_keeps_34_s_b_h_over_t():
    """Of 34, each of the two masks of dropout has one; torch keeps two bytes of each on a CPU."""
    papers = "--bf16 --normalization LayerNorm --hidden-dropout 0.1 --position-embedding-type learned_absolute"
    assert kept(2, papers, preset(2), without="--swiglu") == (34 + 2) * TOKENS * HIDDEN / 2
