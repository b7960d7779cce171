#!/bin/sh
# Makes .venv from the lock files: an interpreter of version 3.12 or later, uv in a folder of its own, then the packages.
set -eu
cd "$(dirname "$0")/.."
uv_version=0.13.9

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }
python=
for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
    if [ -n "$candidate" ] && usable "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "rlhf-operator needs Python 3.12 or later; none was found: set PYTHON to one" >&2
    exit 1
fi

if [ ! -x .cache/uv/bin/uv ]; then
    "$python" -m venv .cache/uv
    .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
fi
uv() { .cache/uv/bin/uv --quiet "$@"; }
uv venv --allow-existing --python "$(command -v "$python")" .venv
# Byte-compiling takes minutes once and saves six seconds in each of a run's ten processes.
uv pip sync --python .venv/bin/python --compile-bytecode requirements.lock
uv pip install --python .venv/bin/python --no-deps --require-hashes -r requirements-demo.lock
uv pip install --python .venv/bin/python --no-deps -e .
