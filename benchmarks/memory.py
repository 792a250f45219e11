"""Peak memory of one contestant: on a CPU measured in a process of its own, on a GPU told by torch's allocator.

On a CPU: the high-water mark of resident memory during one call (Linux sets it back on request), minus what was
resident before: so everything beyond the inputs counts, outputs and gradients included.  Code and thread pools
are loaded before, by a call at the small scale; a compiled function is compiled by a call at its own scale.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from .common import COMPILE, Case, Tensors
from .timing import wall_seconds

T = TypeVar("T")


def peak_bytes(work: Callable[[], T]) -> tuple[float, T]:
    """The `Meter` of a CPU's memory: the largest growth of resident memory during `work`, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that are free but kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    return _status("VmHWM") - before, result


def device_peak_bytes(work: Callable[[], T]) -> tuple[float, T]:
    """The `Meter` of a GPU's memory: the most that torch had allocated during `work`, beyond what it had before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(value) << 10


def held_bytes(tensors: Tensors) -> int:
    """What the tensors' storages take together."""
    storages = (tensor.untyped_storage() for tensor in tensors.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(work: str, case: Case, contestant: str, scale: str) -> dict[str, int]:
    """One contestant of a case that was run before, so that everything is compiled.

    Returns:
        bytes: "peak" beyond the inputs, "results" held by outputs and gradients at the end.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    if case.device == "cpu":
        return _in_a_fresh_process(work, case.name, contestant, scale)
    whole = _with_forward(case)
    peak, results = whole.execute(case.contestants[contestant], whole.inputs(), device_peak_bytes)
    return {"peak": int(peak), "results": held_bytes(results)}


def _with_forward(case: Case) -> Case:
    """A backward needs what its forward kept, so both count."""
    return replace(case, timed="forward + backward") if case.timed == "backward" else case


def _in_a_fresh_process(work: str, case: str, contestant: str, scale: str) -> dict[str, int]:
    """Runs this module there.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    options = [work, case, contestant, scale, str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-m", __name__, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {contestant} in {work}/{case}: {done.stderr.strip()[-1000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(work: str, name: str, contestant: str, scale: str, threads: str) -> None:
    torch.set_num_threads(int(threads))

    def find(size: str) -> Case:
        module = importlib.import_module(f".{work}", __package__)
        cases: list[Case] = module.cases(size)
        (case,) = (case for case in cases if case.name == name)
        return _with_forward(case)

    case = find(scale)
    function = case.contestants[contestant]
    inputs = case.inputs()
    warm = case if contestant == COMPILE else find("small")
    warm.execute(function, inputs if warm is case else warm.inputs(), wall_seconds)
    peak, results = case.execute(function, inputs, peak_bytes)
    print(json.dumps({"peak": int(peak), "results": held_bytes(results)}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
