# Sourced by the other scripts: $python is the Python of .venv, made once and refreshed when setup.py or pyproject.toml change.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

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

# What the environment was made for: a moved checkout or changed requirements make another one.
wanted() {
    echo "$root"
    cat "$root/setup.py" "$root/pyproject.toml" | cksum
}

ready_venv() {
    if [ "$(cat "$venv/made-for" 2>/dev/null)" = "$(wanted)" ] && "$python" -c '' 2>/dev/null; then
        return
    fi
    local base
    if [ "$(head -n 1 "$venv/made-for" 2>/dev/null)" != "$root" ] || ! "$python" -c '' 2>/dev/null; then
        base=$(find_python)
        echo "making .venv with $base"
        "$base" -m venv --clear "$venv"
    fi
    echo "installing megatron-cp and what it needs into .venv; the first time this takes some minutes and gigabytes"
    "$python" -m pip install --quiet --disable-pip-version-check -e "$root[dev,docs,parquet,report,tokenizers]"
    wanted >"$venv/made-for"
}

ready_venv
