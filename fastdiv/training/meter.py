"""Time and peak memory of a section of code, added up over its visits."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

import torch

_PROC = Path("/proc/self")


class Meter:
    """Context manager: seconds in total, and the largest growth of memory above the entry of any one visit.

    On a GPU memory is what torch allocated. On a CPU it is the resident set, whose high-water mark Linux can
    reset; where it cannot, :attr:`peak_mib` stays None. Blocks below the allocator's threshold (32 MiB in
    glibc) may be reused without growth, so on a CPU this counts large blocks surely and small ones only when
    the heap grows.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self.peak_mib: float | None = None
        self._cuda = device if device.type == "cuda" else None
        self._entry = 0.0
        self._start = 0.0

    def __enter__(self) -> Meter:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._entry = torch.cuda.memory_allocated(self._cuda) / 2**20
        else:
            _reset_high_water()
            self._entry = _resident("VmRSS") or 0.0
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        self.seconds += time.perf_counter() - self._start
        top = torch.cuda.max_memory_allocated(self._cuda) / 2**20 if self._cuda is not None else _resident("VmHWM")
        if top is not None:
            self.peak_mib = max(self.peak_mib or 0.0, top - self._entry)


def _reset_high_water() -> None:
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        pass  # _resident("VmHWM") then answers None


def _resident(field: str) -> float | None:
    """A memory field of this process in MiB; None where it is absent or a high-water mark not resettable."""
    if field == "VmHWM" and not _can_reset():
        return None
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), None)


def _can_reset() -> bool:
    try:
        (_PROC / "clear_refs").open("w").close()
    except OSError:
        return False
    return True
