#!/usr/bin/env bash
# Run the tests: bash scripts/test.sh [pytest arguments].
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
# two files at a time; with arguments of your own, exactly what they say
if [ $# -eq 0 ]; then
    set -- --numprocesses 2 --dist loadfile --quiet
fi
exec "$python" -m pytest "$@"
