"""Measuring one call, and comparing several in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Meter(Protocol):
    """Runs `work` once and says what it cost.

    The one place that knows how a device is measured: flushing its caches, recording events around the call and waiting
    for them belong into the meter of that device.
    """

    def __call__(self, work: Callable[[], T]) -> tuple[float, T]: ...


def wall_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """The `Meter` of a CPU's time: the wall clock, with Python's garbage collector kept out of it."""
    gc.disable()
    try:
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result
    finally:
        gc.enable()


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
