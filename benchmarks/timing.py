"""Measuring one call, and comparing several in interleaved rounds."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

_FLUSH = 256 << 20  # bytes, several times any last-level cache of a GPU
# About a millisecond in which the host gets ahead of the device, so that what is timed is the device's work.
_HEAD_START = 2_000_000  # cycles


class Meter(Protocol):
    """Runs `work` once and says what it cost.

    The one place that knows how a device is measured: flushing its caches, recording events around the call and waiting
    for them belong into the meter of that device.
    """

    def __call__(self, work: Callable[[], T]) -> tuple[float, T]: ...


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def wall_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """The `Meter` of a CPU's time: the wall clock, with Python's garbage collector kept out of it."""
    with _without_collector():
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result


class DeviceSeconds:
    """The `Meter` of a GPU's time: events around the call, which finds its caches without the inputs.

    Launches are hidden where the call leaves the host free to run ahead; a call that waits for the device shows it.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], T]) -> tuple[float, T]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with _without_collector():
            torch.cuda.synchronize()
            self._flush.zero_()
            torch.cuda._sleep(_HEAD_START)
            start.record()
            result = work()
            stop.record()
            torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3, result


@functools.cache
def meter(device: str) -> Meter:
    """How time is taken on "cpu" or "cuda"."""
    return wall_seconds if device == "cpu" else DeviceSeconds()


def interleave(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every measure once per round, each round starting with another one, so that a slow minute is shared by all."""
    names = list(measures)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        gc.collect()
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(measures[name]())
    return times


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of times / base, each ratio taken within one round."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    if len(ratios) == 1:
        ratios *= 2
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
