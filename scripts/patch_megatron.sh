#!/usr/bin/env bash
# Put our call sites into a Megatron-LM checkout or a copy of the installed package, and take them out again.
# Usage: scripts/patch_megatron.sh --check|--apply|--revert DIR    DIR: the folder that holds megatron/core and megatron/training
set -euo pipefail
patches=$(cd "$(dirname "${BASH_SOURCE[0]}")/../patches/core_v0.19" && pwd)

usage() {
    echo "usage: patch_megatron.sh --check|--apply|--revert DIR" >&2
    exit 2
}

[ $# -eq 2 ] || usage
if [ ! -d "$2/megatron/core" ] || [ ! -d "$2/megatron/training" ]; then
    echo "patch_megatron: $2 holds no megatron/core and megatron/training; name the root of a Megatron-LM tree" >&2
    exit 1
fi
tree=$(cd "$2" && pwd)
# inside somebody else's repository git would take the paths for that repository's, and skip them without a word
export GIT_CEILING_DIRECTORIES=${tree%/*}
mapfile -t series < <(sed "s|^|$patches/|" "$patches/series")

fits() { git -C "$tree" apply --check "$@" "${series[@]}" 2>/dev/null; }

if fits --reverse; then state=applied; elif fits; then state=clean; else state=other; fi
if [ "$state" = other ]; then
    echo "patch_megatron: the series does not fit $tree; it is made for Megatron-LM core_v0.19" >&2
    git -C "$tree" apply --check "${series[@]}" || exit 1
fi

case $1 in
--check) ;;
--apply)
    if [ "$state" = clean ]; then git -C "$tree" apply "${series[@]}"; fi
    state=applied
    ;;
--revert)
    if [ "$state" = applied ]; then git -C "$tree" apply --reverse "${series[@]}"; fi
    state=clean
    ;;
*) usage ;;
esac
case $state in
applied) echo "applied: ${#series[@]} patches are in $tree" ;;
clean) echo "clean: none of the ${#series[@]} patches is in $tree, and all fit" ;;
esac
