#!/usr/bin/env bash
# Everything CI checks: format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

# PyTorch first and by exactly this spelling: see setup.py.
install test,dev torch==2.13.0

.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/pytest -n 2 "$@"
