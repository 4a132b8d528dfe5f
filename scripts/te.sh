#!/usr/bin/env bash
# Run the tests of TransformerEngine's layers, without a GPU: scripts/te.sh [VERSION …], by default constraints/te.txt's.
# Its wheel and what that imports lie in build/te on top of .venv; the tests stand in for its compiled module.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
file=$root/constraints/te.txt
if [ $# -eq 0 ]; then
    set -- "$(sed -n 's/^transformer_engine==//p' "$file")"
fi
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

for version in "$@"; do
    folder=$root/build/te/$version-$(cksum <"$file" | tr ' ' -)
    if [ ! -f "$folder/made-for" ]; then
        if ! "$python" -m pip download --quiet --no-deps --dest "$made" "$(grep '^onnx-ir==' "$file")"; then
            echo "transformer-engine $version: skipped, no index of packages can be reached"
            continue
        fi
        sed "s/^transformer_engine==.*/transformer_engine==$version/" "$file" >"$made/versions.txt"
        "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --upgrade \
            --target "$folder" --requirement "$made/versions.txt"
        cp "$made/versions.txt" "$folder/made-for"
    fi
    echo "transformer-engine $version"
    PYTHONPATH=$folder "$python" -m pytest --quiet tests/te
done
