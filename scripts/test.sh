#!/usr/bin/env bash
# Run the tests: bash scripts/test.sh [pytest arguments].
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
exec "$python" -m pytest "$@"
