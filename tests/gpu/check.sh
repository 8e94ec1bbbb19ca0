#!/usr/bin/env bash
# Checks actserve on one NVIDIA GPU, and measures it: at most 8 minutes. Needs this tree, a Python with torch, and a C++
# compiler. Nothing is installed into that Python.
#
#   tests/gpu/check.sh                        # --device cuda
#   tests/gpu/check.sh --device cpu --sizes 1,8 --seconds 0.05
#   tests/gpu/check.sh --json build/gpu.json  # the figures, written after each part
#
# PYTHON: the Python to use; default: the first of .venv/bin/python and python3 that imports torch.
# WHEELS: a folder with wheels (default .whl) of packages that this Python lacks: tests/gpu/packages.txt names them.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=
for candidate in ${PYTHON:-.venv/bin/python python3}; do
    if "$candidate" -c 'import torch' 2> /dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "found no Python that imports torch; set PYTHON" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
wheels=${WHEELS:-.whl}
if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$folder/site" "$wheels"/*.whl
fi
export PYTHONPATH=app:exporters:.:$folder/site
export XDG_CACHE_HOME=$folder/cache TMPDIR=$folder OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL=${AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL:-O0}
missing=$("$python" -c '
from importlib.util import find_spec
print(*(name for name in ("elftools", "numpy", "pydantic", "safetensors") if find_spec(name) is None))')
[ -z "$missing" ] || { echo "$python lacks $missing: carry the wheels of tests/gpu/packages.txt" >&2; exit 2; }
status=0
timeout --kill-after=10 480 "$python" -m tests.gpu.check "$@" || status=$?
[ "$status" != 124 ] || echo "not done within 480 s: the parts above are complete" >&2
exit "$status"
