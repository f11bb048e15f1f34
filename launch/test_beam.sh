#!/usr/bin/env bash
# Runs the tests that need Apache Beam in an environment of their own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-beam
source launch/common.sh

install beam pytest

# --noconftest: the configuration of the other tests needs newer packages than Beam allows.
.venv-beam/bin/pytest -q --noconftest -o filterwarnings=default tests/data/preparation/test_beam_runner.py "$@"
