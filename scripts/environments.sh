#!/usr/bin/env bash
# Run the smoke tests with other versions of what megatron-cp needs: scripts/environments.sh oldest
# Each is made from constraints/NAME.txt beside .venv, tested and removed; ten gigabytes have to be free for each. While
# one is tested the next is made. What the tests print comes at the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
folders=() running=() tried=()
# timeout sends its signal twice, and the second one would end what cleans up
trap 'trap "" INT TERM; kill "${running[@]}" 2>/dev/null || true; rm -rf "${folders[@]}"' EXIT
trap 'exit 1' INT TERM

# True if .venv has what this file pins.
is_ours() {
    local freeze
    freeze=$("$python" -m pip freeze --all --exclude-editable | tr '[:upper:]_' '[:lower:]-')
    ! grep -v '^#' "$1" | tr '[:upper:]_' '[:lower:]-' | grep -vxF -f <(echo "$freeze") >/dev/null
}

for name in "$@"; do
    file=$root/constraints/$name.txt
    torch=$(grep '^torch==' "$file")
    if is_ours "$file"; then
        echo "$name: skipped, .venv has the same versions ($torch)"
        continue
    fi
    limits=$("$python" -m pip config list | grep '[.]constraint=' || true)
    try=("$python" -m pip install --dry-run --quiet --no-deps --ignore-installed "$torch")
    if [ -n "$limits" ] && ! "${try[@]}" >/dev/null 2>&1; then
        echo "$name: skipped, pip's own settings rule out $torch: $limits"
        continue
    fi
    made=$(mktemp -d)
    folders+=("$made")
    if [ "$(df --output=avail --block-size=1G "$made" | tail -n 1)" -lt 10 ]; then
        echo "$name: skipped, $made has less than 10 GB of room; set TMPDIR to a folder that has"
        continue
    fi
    if ! "$python" -m pip download --quiet --no-deps --dest "$made/reachable" "$(grep '^einops==' "$file")"; then
        echo "$name: skipped, no index of packages can be reached"
        continue
    fi
    echo "$name: installing $torch"
    "$python" -m venv "$made/venv"
    # what is imported is compiled then, which is less than all
    "$made/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \
        --constraint "$file" --editable "${root}[$extras]"
    "$made/venv/bin/python" -m pytest --quiet -m "smoke and not slow" >"$made/log" 2>&1 &
    running+=("$!") tried+=("$name $made")
done

failed=0
for at in "${!tried[@]}"; do
    wait "${running[at]}" || failed=1
    echo "${tried[at]%% *}: tested"
    cat "${tried[at]#* }/log"
done
exit "$failed"
