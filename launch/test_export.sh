#!/usr/bin/env bash
# Runs the tests that need the device runtimes in an environment of their own. The first start builds
# llama.cpp for some minutes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-export
source launch/common.sh

# setup.py says why PyTorch comes first and by exactly this spelling.
install test,export torch==2.13.0

.venv-export/bin/pytest -n 2 tests/export tests/cli/test_export.py \
  tests/cli/test_benchmark.py "$@"
