"""Chunks of MLP, output layer and loss: memory falls with their number, and nothing else changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.layers.chunks import free_mlp_chunks, put_off_logits
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.megatron.run import Settings
from megatron_cp.megatron.spec import gpt_layer_spec
from tests.cases import slow_unless
from tests.megatron import spec_run
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.megatron.test_packed import corpus_of_documents
from tests.megatron.test_parity import assert_equal_runs
from tests.ranks import run_ranks, run_ranks_with_log

HIDDEN, FFN, VOCAB = 16, 56, 512
CHUNKS = (1, 2, 4, 8)


def model_in(chunks: int, tokens: int, **changes: Any) -> GPTModel:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=1,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mlp_chunks_for_training=chunks,
        use_cpu_initialization=True,
        transformer_impl="local",
        **changes,
    )
    model = GPTModel(
        config,
        gpt_layer_spec(config),
        vocab_size=VOCAB,
        max_sequence_length=tokens,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    )
    put_off_logits(lambda model: None, Settings(our_layers=True, attention=AttentionFlags(loss_chunks=chunks)), model)
    free_mlp_chunks([model])
    return model


def peak(model: GPTModel, run: Callable[[Tensor], Tensor], tokens: int) -> int:
    """Most live bytes of a forward and a backward beside weights, gradients, inputs, outputs and their gradients."""
    hidden = torch.randn(tokens, 1, HIDDEN, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    with LiveBytes(hidden, hidden.grad, *model.parameters(), *(w.grad for w in model.parameters())) as live:
        out = run(hidden)
        out.backward(torch.ones_like(out))
    gradient = HIDDEN * tokens * 4
    return live.peak - 2 * out.nbytes - gradient


def peaks(tokens: int, layers: bool) -> dict[str, list[int]]:
    """Peaks of the parts by number of chunks; of whole layers where they are asked for."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    found: dict[str, list[int]] = {"MLP": [], "head and loss": [], **({"layer": []} if layers else {})}
    labels = torch.randint(VOCAB, (1, tokens))
    with cpu.cpu_runtime():
        for chunks in CHUNKS:
            model = model_in(chunks, tokens)
            layer: Any = model.decoder.layers[0]

            def loss(hidden: Tensor, model: Any = model) -> Any:
                return model.compute_language_model_loss(labels, model.output_layer(hidden)[0])

            if layers:
                found["layer"].append(peak(model, lambda hidden, layer=layer: layer(hidden, None)[0], tokens))
            layer.pre_mlp_layernorm = IdentityOp()
            found["MLP"].append(peak(model, layer._forward_mlp, tokens))
            found["head and loss"].append(peak(model, loss, tokens))
    return found


@pytest.mark.parametrize(("tokens", "layers"), slow_unless([(2048, False)], [(2048, False), (32768, True)]))
def test_memory_of_mlp_and_loss_falls_with_the_number_of_chunks(tokens: int, layers: bool) -> None:
    (found,) = run_ranks(1, peaks, tokens, layers)
    for part, bytes_of in found.items():
        print(f"{part:>14}", *(f"{n}: {each / 2**20:.2f} MiB" for n, each in zip(CHUNKS, bytes_of, strict=True)))
    for part in ("MLP", "head and loss"):
        whole = found[part][0]
        assert found[part] == pytest.approx([whole / n for n in CHUNKS], rel=0.15)
    assert sorted(found.get("layer", ()), reverse=True) == found.get("layer", [])


BOTH = "--cp-loss-chunks 3 --mlp-chunks-for-training 3"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# ranks, and the rest of the run; a rank's last chunk is shorter
CASES = {
    "context": (2, "--context-parallel-size 2 --calculate-per-token-loss"),
    "tensor and sequence": (4, f"--context-parallel-size 2 {TENSOR} --tp-comm-type flux"),
    "tied, zb-h1": (4, f"{PP2} {TENSOR} --pp-schedule zb-h1 --mtp-num-layers 1"),
    "packed documents, recomputed": (2, f"--context-parallel-size 2 --dataloader-inter-document-masking {FULL}"),
}


@contextmanager
def counted_chunks() -> Iterator[list[int]]:
    """Count the calls of this rank that compute a chunk again."""
    calls = [0]

    def counting(old: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return old(*args, **kwargs)

        return counted

    done = replace("megatron_cp.megatron.layers.chunks:_computed_again", counting)
    try:
        yield calls
    finally:
        restore(done)


def trained(flags: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """Losses, and the calls of each rank that compute a chunk again."""
    with counted_chunks() as calls:
        return pretrain_losses(flags), calls


@pytest.mark.parametrize("case", slow_unless(["context"], CASES))
def test_chunks_change_no_loss_and_no_gradient(case: str, tmp_path: Path) -> None:
    ranks, flags = CASES[case]
    data, without = "", ""
    if "packed" in case:
        data, without = corpus_of_documents(tmp_path), "--mock-data"
    if "tied" in case:
        without = "--untie-embeddings-and-output-weights"
    whole, chunked = (run_ranks(ranks, trained, tiny(flags, data, added, without=without)) for added in ("", BOTH))
    assert all(calls == [0] for _, calls in whole)
    assert all(calls[0] > 0 for _, calls in chunked)
    assert_equal_runs(chunked[0][0], whole[0][0])


HYBRID = "--context-parallel-size 2 --cp-comm-type zigzag --hybrid-layer-pattern *-*- --num-layers 4"


def trained_hybrid(flags: str) -> int:
    with counted_chunks() as calls:
        spec_run.train(flags, name="hybrid_stack_spec", hooked=("flags", "checks", "loss-chunks"))
    return calls[0]


@pytest.mark.slow
def test_chunks_of_a_hybrid_model_change_no_loss_and_no_gradient() -> None:
    (none, whole), (some, chunked) = (
        run_ranks_with_log(2, trained_hybrid, f"{HYBRID} {added}") for added in ("", "--cp-loss-chunks 3")
    )
    assert none == [0, 0]
    assert all(some)
    assert spec_run.losses(chunked) == pytest.approx(spec_run.losses(whole), rel=1e-6)
    assert spec_run.grad_norms(chunked) == pytest.approx(spec_run.grad_norms(whole), rel=1e-3)
    assert len(spec_run.losses(whole)) == 4
