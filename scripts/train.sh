#!/usr/bin/env bash
# Train a recipe on this machine: bash scripts/train.sh [RECIPE] [--flag …]; without RECIPE the quickstart.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

recipe=quickstart
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    recipe=$1
    shift
fi
# a path is meant from where the user is; runs/ always lies in the checkout
if [ -f "$recipe" ]; then
    recipe=$(realpath "$recipe")
fi
cd "$root"
exec "$python" -m megatron_cp train "$recipe" "$@"
