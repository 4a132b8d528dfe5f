"""Small models of TransformerEngine's layers on one rank."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cp.megatron.layers.specs import gpt_layer_spec
from megatron_cp.megatron.machine.cpu import cpu_runtime
from tests.te.training import TE


@contextlib.contextmanager
def ready() -> Iterator[None]:
    """Let a model be built inside the context."""
    with cpu_runtime():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield


def config(**changes: Any) -> TransformerConfig:
    """Return the config of two layers of the LLaMA kind."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    plain = {"transformer_impl": TE, "use_cpu_initialization": True, "normalization": "RMSNorm", "hidden_dropout": 0.0}
    return TransformerConfig(**{**sizes, **plain, "attention_dropout": 0.0, "add_bias_linear": False, **changes})


def model(config: TransformerConfig, spec: Any = None) -> GPTModel:
    """Return the model, of our layers unless a spec is given."""
    spec = spec or gpt_layer_spec(config=config)
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=32, position_embedding_type="rope")
