# shellcheck shell=bash
# Sourced by the other scripts: $python is the Python of .venv, made once and refreshed when what it needs changes.
#
# MEGATRON_CP_CONSTRAINTS says which versions it gets: default (what the tests are run with), oldest or newest, files of
# constraints/; a file of your own; or own, which keeps the torch of the Python that makes .venv and pins nothing.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
pins=${MEGATRON_CP_CONSTRAINTS:-default}
extras=dev,docs,parquet,report,tokenizers
make_venv=(-m venv --clear) pip=(-m pip install) constraint=() made_for=$root
# a terminal sees what is downloaded
if [ ! -t 1 ]; then pip+=(--quiet); fi
pip+=(--disable-pip-version-check)
if [ "$pins" = own ]; then
    make_venv+=(--system-site-packages) made_for="$root own" pins=/dev/null
else
    if [ -f "$root/constraints/$pins.txt" ]; then pins=$root/constraints/$pins.txt; fi
    constraint=(--constraint "$pins")
fi

# The first Python that is new enough and can make virtual environments.
find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "megatron-cp needs Python 3.12 or newer with its venv module and found none: install one" \
        "(apt install python3.12-venv, dnf install python3.12, brew install python@3.12 or pyenv install 3.12)" >&2
    return 1
}

# What the environment was made for: a moved checkout or a change between own and pinned versions makes another one,
# changed requirements are installed into it.
wanted() {
    echo "$made_for"
    cat "$root/setup.py" "$root/pyproject.toml" "$pins" | cksum
}

ready_venv() {
    if [ ! -r "$pins" ]; then
        echo "MEGATRON_CP_CONSTRAINTS is default, oldest, newest, own or a file; got '$pins'" >&2
        return 1
    fi
    if [ "$(cat "$venv/made-for" 2>/dev/null)" = "$(wanted)" ] && "$python" -c '' 2>/dev/null; then
        return
    fi
    local base
    if [ "$(head -n 1 "$venv/made-for" 2>/dev/null)" != "$made_for" ] || ! "$python" -c '' 2>/dev/null; then
        base=$(find_python)
        echo "making .venv with $base"
        "$base" "${make_venv[@]}" "$venv"
    fi
    echo "installing megatron-cp and what it needs into .venv; the first time this takes some minutes and gigabytes"
    if ! "$python" "${pip[@]}" "${constraint[@]}" -e "${root}[$extras]"; then
        # an index of another day may lack one of the exact versions; those that were asked for by name stay required
        [ -z "${MEGATRON_CP_CONSTRAINTS:-}" ] || return 1
        echo "the versions of constraints/default.txt cannot be had here: installing the newest that setup.py allows" >&2
        "$python" "${pip[@]}" -e "${root}[$extras]"
    fi
    wanted >"$venv/made-for"
}

ready_venv

# with it each process compiles all that it imports
unset PYTHONDONTWRITEBYTECODE
