#!/usr/bin/env bash
# Format, lint, types, shell scripts, and the layering test.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
"$venv/bin/shellcheck" --external-sources --source-path SCRIPTDIR scripts/*.sh scripts/slurm/*.sbatch .ci/run
"$venv/bin/shellcheck" --shell bash --exclude SC2154 megatron_cp/slurm/job.sh
"$python" -m pytest -q tests/test_layers.py
