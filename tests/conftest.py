"""What all tests share: every numeric test runs on each backend present, and the report names the absent ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from fastdiv import backends

FOUND = backends.available()
PRESENT = tuple(name for name, absent in FOUND.items() if absent is None)

# The same examples at every run, on every machine; no database of earlier failures.  No shrinking: a failure is to be
# seen at once, and the examples are few numbers and a seed anyway.
settings.register_profile(
    "fastdiv",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fastdiv")


@pytest.fixture(scope="session", params=PRESENT)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend present, in turn."""
    return str(request.param)


def _lines() -> list[str]:
    return [
        f"fastdiv backend {name}: {'ABSENT, not tested: ' + why if why else 'tested'}" for name, why in FOUND.items()
    ]


def pytest_report_header() -> list[str]:
    return _lines()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _lines():
        if "ABSENT" in line:
            terminalreporter.write_line(line, yellow=True)
