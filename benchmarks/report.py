"""What a run found: the machine, a JSON document, and a table to read."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastdiv

from .common import FASTDIV, FLOOR, Result
from .timing import paired_ratio

_HEADER = [
    "work",
    "contestant",
    "median ms",
    "min ms",
    "x floor (quartiles)",
    "fastdiv / it",
    "rate",
    "peak MiB",
    "less results",
]
_RATES = {"flop": "GFLOP/s", "byte": "GB/s"}


def machine() -> dict[str, Any]:
    """What the numbers depend on.  A load well above the threads in use says that others took part of the machine."""
    info = fastdiv.info()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instruction_set": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "fastdiv": info["native_instruction_set"],
        },
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "fastdiv": fastdiv.__version__,
        "backends": info["backends"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_json(result: Result) -> dict[str, Any]:
    """One case as plain data: seconds, bytes, and ratios taken within rounds."""
    contestants = {}
    for name, times in result.times.items():
        entry: dict[str, Any] = {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "times_s": times,
            "to_floor": paired_ratio(times, result.times[FLOOR]),
            "fastdiv_to_it": paired_ratio(result.times[FASTDIV], times),
        }
        if name in result.memory:
            entry["memory_bytes"] = result.memory[name]
        contestants[name] = entry
    return {
        "shape": result.shape,
        "timed": result.timed,
        "floor": {
            "name": result.floor,
            "chosen": result.choices,
            "amount": result.amount,
            "unit": result.unit,
        },
        "contestants": contestants,
        "absent": result.absent,
    }


def table(works: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The cases of all works, as `as_json` gives them, one contestant a line."""
    rows, notes = [], []
    for work, cases in works.items():
        for case, data in cases.items():
            rows += [[f"{work}/{case}" if name == FLOOR else "", *_row(name, data)] for name in data["contestants"]]
            notes += [f"{work}/{case}: no {name}: {reason}" for name, reason in data["absent"].items()]
    return "\n".join([_format(_HEADER, rows), *notes])


def _row(name: str, data: Mapping[str, Any]) -> list[str]:
    entry, floor = data["contestants"][name], data["floor"]
    ratio, memory = entry["to_floor"], entry.get("memory_bytes")
    chosen = f" ({', '.join(floor['chosen'])})" if floor["chosen"] else ""
    return [
        f"floor: {floor['name']}{chosen}" if name == FLOOR else name,
        f"{entry['median_s'] * 1e3:.2f}",
        f"{entry['min_s'] * 1e3:.2f}",
        "1" if name == FLOOR else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        "" if name == FASTDIV else f"{entry['fastdiv_to_it']['median']:.3f}",
        f"{floor['amount'] / entry['median_s'] / 1e9:.1f} {_RATES[floor['unit']]}" if floor["amount"] else "",
        str(round(memory["peak"] / 2**20)) if memory else "",
        str(round((memory["peak"] - memory["results"]) / 2**20)) if memory else "",
    ]


def _format(header: list[str], rows: list[list[str]]) -> str:
    try:
        from tabulate import tabulate  # type: ignore[import-untyped]
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in [header, *rows])
        return "\n".join(line.rstrip() for line in lines)
    text: str = tabulate(rows, headers=header, disable_numparse=True)
    return text
