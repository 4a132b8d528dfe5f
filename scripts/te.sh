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

# Install this version and the others of the file into a folder, which then exists as a whole or not at all.
make_folder() {
    local made
    mkdir -p "$root/build/te"
    made=$(mktemp -d "$root/build/te/XXXXXX")
    sed "s/^transformer_engine==.*/transformer_engine==$1/" "$file" >"$made/versions.txt"
    "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --target "$made" \
        --requirement "$made/versions.txt"
    rm -rf "$2"
    mv "$made" "$2"
}

for version in "$@"; do
    folder=$root/build/te/$version-$(cksum <"$file" | tr ' ' -)
    if [ ! -d "$folder" ]; then
        if ! "$python" -m pip download --quiet --no-deps --dest "$(mktemp -d)" "$(grep '^onnx-ir==' "$file")"; then
            echo "transformer-engine $version: skipped, no index of packages can be reached"
            continue
        fi
        make_folder "$version" "$folder"
    fi
    echo "transformer-engine $version"
    PYTHONPATH=$folder "$python" -m pytest --quiet tests/te
done
