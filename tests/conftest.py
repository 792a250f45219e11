"""What all tests share: every numeric test runs on each backend present, and the report names the absent ones."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, is_hypothesis_test, settings

# Without a GPU the Triton kernels run in Triton's interpreter, which decides so as it meets the first kernel, and the
# CUDA kernels in lock-step, on an x86-64.
if not torch.cuda.is_available():
    if importlib.util.find_spec("triton"):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if platform.machine() == "x86_64":
        os.environ.setdefault("FASTDIV_LOCKSTEP", "1")

import elsewhere

import fastdiv
from fastdiv import backends

# Processes that tests start import the package that the tests import, from any folder.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(fastdiv.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Most tensors are small: two threads wait for each other twice as long as one works.  Tests of threads say how many.
torch.set_num_threads(1)

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


def _backend_of(item: pytest.Item) -> object:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parameters.get("backend")


def _slow(item: pytest.Item) -> bool:
    """Whether a test runs in Triton's interpreter, at some milliseconds a row and block."""
    return _backend_of(item) == "triton" and not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests make CPU tensors; where there is a GPU, its backends get them there."""
    backend = _backend_of(request.node)
    if not (backend in ("cuda", "triton") and torch.cuda.is_available()):
        yield
        return
    if reason := elsewhere.NOT_THERE.get(request.node.originalname):
        pytest.skip(reason)
    with elsewhere.elsewhere(str(backend), torch.device("cuda"), request.module):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fewer examples where each is slow."""
    function = getattr(item, "function", None)
    if not (_slow(item) and is_hypothesis_test(function)):
        yield
        return
    usual = function._hypothesis_internal_use_settings
    function._hypothesis_internal_use_settings = settings(usual, max_examples=max(usual.max_examples // 10, 3))
    yield
    function._hypothesis_internal_use_settings = usual


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
