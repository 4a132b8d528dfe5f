"""A model of transformers trains with our attention, and its weights fit Megatron's model."""

import runpy
from typing import Any

import torch

from tests.docs.pages import DOCS
from tests.ranks import run_ranks

EXAMPLES = DOCS / "examples"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def run_example(path: str) -> None:
    runpy.run_path(path, run_name="__main__")


def test_a_model_of_transformers_trains_on_two_ranks() -> None:
    run_ranks(2, run_example, str(EXAMPLES / "hugging_face.py"))
    assert "torchrun --nproc-per-node 2 docs/examples/hugging_face.py" in (EXAMPLES / "hugging_face.py").read_text()


def logits(tied: bool) -> tuple[Any, Any, set[str], set[str]]:
    """Return the logits of one model in transformers and in Megatron, and the names that were mapped and wanted."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn.functional import silu
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_cp.megatron.layers.specs import gpt_layer_spec
    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.manual_seed(1)
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5}
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, tie_word_embeddings=tied, use_cache=False))
    with cpu_runtime():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=SIZES["num_hidden_layers"],
            hidden_size=SIZES["hidden_size"],
            num_attention_heads=SIZES["num_attention_heads"],
            num_query_groups=2,
            ffn_hidden_size=64,
            gated_linear_unit=True,
            activation_func=silu,
            normalization="RMSNorm",
            layernorm_epsilon=1e-5,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            transformer_impl="local",
            use_cpu_initialization=True,
        )
        ours = GPTModel(
            config,
            gpt_layer_spec(config=config),
            vocab_size=128,
            max_sequence_length=32,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
        )
        mapped = runpy.run_path(str(EXAMPLES / "hugging_face_weights.py"))["megatron_weights"](
            dict(theirs.named_parameters()), layers=2, groups=2
        )
        wanted = {name for name, _ in ours.named_parameters()}
        ours.load_state_dict(mapped, strict=False)
        tokens = torch.randint(128, (1, 16))
        found = ours(input_ids=tokens, position_ids=torch.arange(16)[None], attention_mask=None)
        return theirs(input_ids=tokens).logits.detach(), found.detach(), {*mapped}, wanted


def test_weights_of_a_llama_give_megatron_the_same_logits() -> None:
    for tied in (False, True):
        ((theirs, ours, mapped, wanted),) = run_ranks(1, logits, tied)
        assert mapped == wanted
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
