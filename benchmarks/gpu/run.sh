#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command, on a machine that has a GPU, torch and transformers for a few minutes.
#
# 1. Where the repository lies, with a network: `python -m benchmarks.gpu.collect` puts the wheels that the machine lacks and
#    the authors' checkpoint into build/gpu, and checks that everything to be carried is at most 64 MiB.
# 2. On the machine with the GPU, in the root of a copy of the repository and of build/gpu, with a limit of 540 s:
#
#        bash benchmarks/gpu/run.sh --output "$OUT"
#
#    It takes up to 7 minutes and writes eight files: run.json, six of the parts, and gpu.log.
# 3. Here again: `cp "$OUT"/*.json benchmarks/gpu/runs/<day>-<gpu>/` and `python -m benchmarks.gpu.page`, which writes
#    docs/gpu.md.
#
# `bash benchmarks/gpu/run.sh --dry-run` rehearses all of it on a CPU. PYTHON names another interpreter.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
PACKAGES=$ROOT/kernels:$ROOT/server:$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1

# The packages that the server needs, from the carried wheels if one of them is not installed.
NEEDED='import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in
("alembic", "fastapi", "h11", "httpx", "httpx2", "pydantic", "pydantic_settings", "sqlalchemy", "starlette", "typer", "uvicorn")))'
if ! "$PYTHON" -c "$NEEDED"; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$SITE" "$ROOT"/build/gpu/wheels/*.whl
    PACKAGES=$SITE:$PACKAGES
fi
cd "$ROOT"
PYTHONPATH=$PACKAGES "$PYTHON" -m benchmarks.gpu "$@"
