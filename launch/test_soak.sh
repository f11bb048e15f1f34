#!/usr/bin/env bash
# Runs the tests that launch/test.sh leaves out: runs are killed at random moments, parsers read
# thousands of damaged files, and some tests repeat for further configurations. They take about an
# hour and print their figures.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

# setup.py says why PyTorch comes first and by exactly this spelling.
install test,dev torch==2.13.0

.venv/bin/pytest -s -m soak "$@"
FUZZ_INPUTS=${FUZZ_INPUTS:-1000} .venv/bin/pytest -q tests/fuzz --hypothesis-profile=soak
