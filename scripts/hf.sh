#!/usr/bin/env bash
# Run the tests of the examples with transformers: scripts/hf.sh. Its wheels, the versions of constraints/hf.txt, lie in
# build/hf on top of .venv, so that Megatron does not import it elsewhere.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
file=$root/constraints/hf.txt
folder=$root/build/hf/$(cksum <"$file" | tr ' ' -)
if [ ! -f "$folder/made-for" ]; then
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    if ! "$python" -m pip download --quiet --no-deps --dest "$made" "$(grep '^safetensors==' "$file")"; then
        echo "transformers: skipped, no index of packages can be reached"
        exit 0
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --upgrade \
        --target "$folder" --requirement "$file"
    cp "$file" "$folder/made-for"
fi
PYTHONPATH=$folder "$python" -m pytest --quiet tests/hf
