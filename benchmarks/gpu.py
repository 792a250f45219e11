"""`make gpu`: on a machine with a GPU a first look, the tests, the benchmarks and the sanitizer, in that order.

All of it takes less than ten minutes, and a step that fails does not keep the next from running.
Results are written under benchmarks/results, and also to the folder that the environment variable OUT names.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

# What needs a GPU first; the longest next.
FILES = (
    "test_gpu.py",
    "test_backends",
    "test_ops",
    "test_library.py",
    "test_edges.py",
    "test_autograd.py",
    "test_invariance.py",
    "test_select.py",
    "test_covariance.py",
    "test_golden.py",
)
NEEDED = ("hypothesis", "mpmath", "numpy")
"""Packages that some tests import."""
BACKENDS = ("cuda", "triton")
"""What a GPU should have; the tests of one alone are in files called after it."""
SECONDS, FIRST_SECONDS, TEST_SECONDS, LAST_CASE, SANITIZER_SECONDS = 570.0, 120.0, 210.0, 60.0, 150.0
"""For all of it; for the first look, the tests, the benchmark that was begun last and the sanitizer at most."""
_PATIENCE = 15.0  # seconds between the request to end and the end


def main() -> int:
    """Runs all of it.

    Returns:
        0; 1 if a test fails, does not end or cannot run, or a benchmark is void; 2 without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    begin, clock = time.time(), time.monotonic()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "tests.txt"

        def left() -> float:
            return SECONDS - (time.monotonic() - clock)

        outcomes = {"first look": first_look()}
        outcomes["tests"] = tests(log)
        outcomes["benchmarks"] = benchmarks(left() - SANITIZER_SECONDS)
        outcomes["sanitizer"] = sanitizer(left())
        fresh = sorted(path for path in RESULTS.glob("*") if path.stat().st_mtime >= begin)
        if out := os.environ.get("OUT"):
            Path(out).mkdir(parents=True, exist_ok=True)
            for path in (log, *fresh):
                if path.exists():
                    shutil.copy(path, out)
    for name, outcome in outcomes.items():
        print(f"gpu: {name}: {outcome or 'passed'}")
    print(f"gpu: {time.monotonic() - clock:.0f} s, results: {', '.join(path.name for path in fresh) or 'none'}")
    return 1 if any(outcomes.values()) else 0


def first_look() -> str | None:
    """Values of each kernel beside float64, the GPU's ceilings and one time of each kernel; None, or what is wrong."""
    status = run([sys.executable, "-m", f"{__package__}.first_gpu", "--save"], FIRST_SECONDS, dict(os.environ))
    return _ending(status, FIRST_SECONDS) if status != 0 else None


def sanitizer(seconds: float) -> str | None:
    """compute-sanitizer on each backend; None, or what is wrong."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is needed"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:benchmark", "-p", "no:xdist"]
    status = run([*command, "tests/test_sanitizer.py"], seconds, dict(os.environ))
    return _ending(status, seconds) if status != 0 else None


def tests(log: Path) -> str | None:
    """Runs the tests, their output into `log`, and prints its end; None, or what is wrong."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return "not run: pytest and hypothesis are needed"
    from fastdiv import backends

    missing = [name for name in BACKENDS if backends.available()[name] is not None]
    chosen, left_out = choose([ROOT / "tests" / name for name in FILES], missing)
    for name, packages in left_out.items():
        print(f"gpu: tests/{name} is left out: no {', '.join(packages)}")
    # Configuration-time warnings of foreign plugins would be errors here.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=40", "-p", "no:benchmark", *chosen]
    if importlib.util.find_spec("xdist") is None:
        print("gpu: no pytest-xdist: tests run one after the other")
    else:
        command += ["-n", str(max(len(os.sched_getaffinity(0)) - 2, 1)), "--dist", "worksteal"]
    # Each worker has one core.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("w") as output:
        status = run(command, TEST_SECONDS, environment, output)
    print("\n".join(log.read_text(errors="replace").splitlines()[-80:]), flush=True)
    wrong = [f"left out: {', '.join(left_out)}"] if left_out else []
    wrong += [_ending(status, TEST_SECONDS)] if status != 0 else []
    return "; ".join(wrong) or None


def _ending(status: int | None, seconds: float) -> str:
    return f"not finished in {seconds:.0f} s" if status is None else f"ended with status {status}"


def choose(paths: list[Path], backends: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The test files below `paths` that can run without `backends`, and by name what the others lack."""
    files = [file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    chosen, left_out = [], {}
    for file in files:
        text = file.read_text()
        missing = [name for name in absent if re.search(rf"^(from|import) {name}\b", text, re.MULTILINE)]
        missing += [f"{name} backend" for name in backends if re.match(rf"test_{name}[_.]", file.name)]
        if missing:
            left_out[file.name] = missing
        else:
            chosen.append(str(file))
    return chosen, left_out


def benchmarks(seconds: float) -> str | None:
    """Runs the benchmarks, which write their own results; None, or what is wrong."""
    begun = max(seconds - LAST_CASE, 0.0)
    status = run(
        [sys.executable, "-m", __package__, "--device", "cuda", "--save", "--seconds", f"{begun:.0f}"],
        max(seconds, 0.0),
        dict(os.environ),
    )
    return _ending(status, seconds) if status != 0 else None


def run(command: list[str], seconds: float, environment: dict[str, str], output: TextIO | None = None) -> int | None:
    """The status of `command`; None if it had to be interrupted, which leaves it some seconds to say what it knows."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        return None
    finally:
        # What is left of its process group: workers that outlived it.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
