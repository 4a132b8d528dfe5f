#!/usr/bin/env bash
# Show on a machine with a CUDA GPU: the kernels equal the reference, how fast each is, the laws of every backend hold
# there, and the quickstart recipe trains unchanged.
# Usage: scripts/gpu_check.sh [PYTHON]    PYTHON: an interpreter that has torch and megatron-core, python3 when not given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    echo "gpu_check: torch sees no CUDA GPU here" >&2
    exit 1
fi

step() { printf '\n== %s\n' "$*"; }

step "kernels and backends on the GPU equal dense attention"
"$python" -m pytest -q tests/gpu

step "TFLOP/s of each kernel, both directions"
for mask in --causal --no-causal; do
    "$python" -m megatron_cp bench kernels --device cuda --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128 "$mask"
done

step "the quickstart recipe"
save=$(mktemp -d)
trap 'rm -rf "$save"' EXIT
flags=(--save "$save")
if [ "$gpus" -eq 1 ]; then
    # one GPU holds one rank
    flags+=(--nproc-per-node 1 --context-parallel-size 1)
fi
"$python" -m megatron_cp train quickstart "${flags[@]}"
