#!/usr/bin/env bash
# The tests that need the runtimes for devices, in an environment of their own. The first start
# builds llama.cpp, some minutes long. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-export
source launch/common.sh

# PyTorch first and by exactly this spelling: see setup.py.
install test,export torch==2.13.0

.venv-export/bin/pytest -n 2 tests/export tests/cli/test_export.py \
  tests/cli/test_benchmark.py "$@"
