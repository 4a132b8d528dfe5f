#!/usr/bin/env bash
# Check the documentation and build it as a site in docs/_build: bash scripts/docs.sh [--write]
# Fails on a generated table that is not current (--write brings it up to date), on a broken link inside the site and on
# a public name without a docstring. Needs no network once .venv is made.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
check=--check
if [ "${1:-}" = --write ]; then check=; fi
"$python" docs/generate.py $check
"$python" -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs docs/_build
echo "the site is in docs/_build/index.html"
