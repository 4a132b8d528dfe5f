#!/usr/bin/env bash
# Format, lint, types, and the layering test.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
"$python" -m pytest -q tests/test_layers.py
