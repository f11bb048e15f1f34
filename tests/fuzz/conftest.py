"""Sets the number of hostile inputs: 60 fixed inputs of each kind, or many.

    pytest tests/fuzz --hypothesis-profile=soak

gives every parser 20,000 inputs (or FUZZ_INPUTS). These inputs differ between two runs. The summary
says how many inputs were tried.
"""

import collections
import os
import tempfile
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, configuration

from tests.fuzz.hostile import TRIED

configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis."))
_common = {
    "deadline": None,  # a machine may be busy
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("default", max_examples=60, derandomize=True, **_common)
hypothesis.settings.register_profile(
    "soak", max_examples=int(os.environ.get("FUZZ_INPUTS", "20000")), **_common
)
# pytest loads a profile from the command line after this file.
hypothesis.settings.load_profile("default")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        terminalreporter.section("hostile inputs")
    for name, counts in TRIED.items():
        terminalreporter.write_line(
            f"{name:<50} {counts.total():>9,} tried {counts['refused']:>9,} refused"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: tells the one that reports
        session.config.workeroutput["tried"] = {k: dict(c) for k, c in TRIED.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    tried = getattr(node, "workeroutput", {}).get("tried", {})
    TRIED.update({name: collections.Counter(counts) for name, counts in tried.items()})
