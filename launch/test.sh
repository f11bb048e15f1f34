#!/usr/bin/env bash
# Checks format, lint, types and tests, as CI does. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

# setup.py says why PyTorch comes first and by exactly this spelling.
install test,dev torch==2.13.0

.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# Each process takes whole files while it can, so the fixtures of a file are made once.
.venv/bin/pytest -n 2 --dist worksteal "$@"
