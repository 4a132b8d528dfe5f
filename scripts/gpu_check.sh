#!/usr/bin/env bash
# Check and measure megatron-cp on one GPU in at most ten minutes: kernels against the reference, the plans of eight
# ranks one after another, merges, TFLOP/s, all backends, pipelines, training. Results are in the folder that --out
# names, gpu_check by default, as a table in Markdown and JSON, written as they come. Needs no network; steps whose
# packages are missing are left out by name. On a machine without a GPU small sizes run on the CPU.
# Usage: scripts/gpu_check.sh [PYTHON] [STEP…] [--device cpu] [--out FOLDER] [--minutes 9.5]
#        PYTHON: an interpreter that has torch, python3 when not given
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
if [ $# -gt 0 ] && [[ $(basename "$1") == python* ]]; then
    python=$1
    shift
fi
PYTHONPATH=$root/scripts:$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m gpu_check "$@"
