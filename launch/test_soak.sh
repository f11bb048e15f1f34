#!/usr/bin/env bash
# Runs the long random tests, which launch/test.sh leaves out: runs are killed at random moments, and
# parsers read thousands of damaged files. They take about an hour and print their figures.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

# setup.py says why PyTorch comes first and by exactly this spelling.
install test,dev torch==2.13.0

.venv/bin/pytest -s -m soak "$@"
FUZZ_INPUTS=${FUZZ_INPUTS:-1000} .venv/bin/pytest -q tests/fuzz --hypothesis-profile=soak
