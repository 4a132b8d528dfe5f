"""Flags of a large run shrink to a few small layers that train on a CPU and keep what was asked for."""

import argparse
import importlib.util
from math import isfinite
from pathlib import Path
from types import ModuleType

import pytest

from megatron_cp.megatron.arguments.known_flags import parser
from megatron_cp.recipe import recipe
from tests.conftest import Write
from tests.megatron.pretraining import script_losses
from tests.ranks import run_ranks

COMMON = """
LAUNCH: {--nproc-per-node: 8, --nnodes: 4}
MODEL_ARGS:
  --num-layers: 32
  --hidden-size: 4096
  --ffn-hidden-size: 14336
  --num-attention-heads: 32
  --group-query-attention: true
  --num-query-groups: 8
  --kv-channels: 128
  --seq-length: 8192
  --max-position-embeddings: 8192
  --position-embedding-type: rope
  --swiglu: true
  --disable-bias-linear: true
  --attention-dropout: 0
  --hidden-dropout: 0
  --micro-batch-size: 1
  --global-batch-size: 128
  --train-samples: 1953125000
  --lr-decay-samples: 1949218748
  --lr-warmup-samples: 3906252
  --lr: 0.00015
  --bf16: true
  --use-distributed-optimizer: true
  --overlap-grad-reduce: true
  --overlap-param-gather: true
  --manual-gc: true
  --cross-entropy-loss-fusion: true
  --tensor-model-parallel-size: 4
  --sequence-parallel: true
  --pipeline-model-parallel-size: 2
  --num-layers-per-virtual-pipeline-stage: 4
  --tokenizer-type: HuggingFaceTokenizer
  --tokenizer-model: somebody/tokenizer
  --data-path: /data/text
  --save: /checkpoints
  --ckpt-format: torch
  --tensorboard-dir: /logs
"""
DENSE = """
  --apply-layernorm-1p: true
  --fp8-format: hybrid
  --fp8-amax-history-len: 1024
  --fp8-amax-compute-algo: max
  --fp8-param-gather: true
  --use-precision-aware-optimizer: true
  --main-grads-dtype: bf16
  --untie-embeddings-and-output-weights: true
"""
EXPERTS = """
  --normalization: RMSNorm
  --num-experts: 64
  --moe-layer-freq: ([0]*3+[1]*29)
  --moe-ffn-hidden-size: 2048
  --moe-shared-expert-intermediate-size: 2048
  --moe-router-topk: 8
  --moe-router-num-groups: 8
  --moe-router-group-topk: 4
  --moe-router-score-function: sigmoid
  --moe-router-enable-expert-bias: true
  --moe-router-load-balancing-type: seq_aux_loss
  --moe-aux-loss-coeff: 1e-4
  --moe-grouped-gemm: true
  --moe-permute-fusion: true
  --moe-token-dispatcher-type: alltoall
  --expert-model-parallel-size: 8
"""
V = {"--pipeline-model-parallel-size": "2", "--pp-schedule": "zb-v"}
CP = {"--context-parallel-size": "2", "--cp-comm-type": "zigzag"}


@pytest.fixture(scope="module")
def shrink() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "scripts" / "shrink.py"
    spec = importlib.util.spec_from_file_location("shrink", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def known() -> argparse.ArgumentParser:
    return parser()


def test_switches_stay_and_sizes_and_paths_go(write: Write, shrink: ModuleType, known: argparse.ArgumentParser) -> None:
    run = recipe.load(write(f"{COMMON}{EXPERTS}  --save-the-day: 1\n  --init-method-std: -1\n"), {})
    words = shrink.shrunk(run, 2, CP, known._option_string_actions)
    args, unknown = known.parse_known_args(words)
    # what Megatron does not have is left for the run to refuse
    assert unknown == ["--save-the-day", "1"]
    assert (args.num_layers, args.hidden_size, args.num_experts, args.moe_router_topk) == (2, 64, 4, 2)
    assert (args.group_query_attention, args.moe_router_score_function, args.bf16) == (True, "sigmoid", True)
    assert (args.context_parallel_size, args.tensor_model_parallel_size, args.sequence_parallel) == (2, 1, False)
    assert (args.save, args.data_path, args.train_samples, args.mock_data) == (None, None, None, True)
    assert (args.ckpt_format, args.init_method_std) == ("torch", -1.0)
    assert args.moe_layer_freq == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "layers", "parallelism"), [(DENSE, 4, V), (EXPERTS, 2, CP)], ids=["dense", "experts"]
)
def test_a_large_runs_flags_train_on_a_cpu(
    write: Write,
    shrink: ModuleType,
    known: argparse.ArgumentParser,
    flags: str,
    layers: int,
    parallelism: dict[str, str],
) -> None:
    run = recipe.load(write(COMMON + flags), {})
    words = shrink.shrunk(run, layers, parallelism, known._option_string_actions)
    losses = [step["loss"] for step in run_ranks(2, script_losses, words)[0]]
    assert len(losses) == 3
    assert all(map(isfinite, losses))
