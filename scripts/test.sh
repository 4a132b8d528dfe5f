#!/usr/bin/env bash
# Run the tests: bash scripts/test.sh [pytest arguments]. The slow set: bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
# two tests at a time; with arguments that name more than a marker, exactly what they say
if [ $# -eq 0 ] || { [ $# -eq 2 ] && [ "$1" = -m ]; }; then
    set -- --numprocesses 2 --dist loadgroup --quiet "$@"
fi
exec "$python" -m pytest "$@"
