"""What a run found: the machine, a JSON document, and a table to read."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastdiv
from fastdiv import backends

from .common import FASTDIV, FLOOR, Result
from .timing import paired_ratio

_HEADER = [
    "work",
    "contestant",
    "median ms",
    "min ms",
    "x floor (quartiles)",
    "of floor",
    "fastdiv / it",
    "rate",
    "peak MiB",
    "less results",
]
_RATES = {"flop": "FLOP/s", "byte": "B/s"}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on.  A load well above the threads in use says that others took part of the machine."""
    info = fastdiv.info()
    return {
        "device": _gpu() if device == "cuda" else device,
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


def _gpu() -> dict[str, Any]:
    """The GPU in use, and the versions between it and torch."""
    it = torch.cuda.get_device_properties(torch.cuda.current_device())
    triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
    return {
        "name": it.name,
        "capability": f"{it.major}.{it.minor}",
        "multiprocessors": it.multi_processor_count,
        "memory_bytes": it.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if triton else None,
        "fastdiv_backend": backends.select([torch.bfloat16], torch.device("cuda"), None),
    }


def _driver() -> str | None:
    """The driver's version, where the tool that knows it is there."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


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
            "to_floor": (ratio := paired_ratio(times, result.times[FLOOR])),
            "of_floor": 1.0 / ratio["median"],
        }
        if FASTDIV in result.times:
            entry["fastdiv_to_it"] = paired_ratio(result.times[FASTDIV], times)
        if name in result.backends:
            entry["backend"] = result.backends[name]
        if name in result.moved:
            entry["moved_bytes"] = result.moved[name]
        if name in result.memory:
            entry["memory_bytes"] = result.memory[name]
        contestants[name] = entry
    return {
        "shape": result.shape,
        "dtype": result.dtype,
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


def table(works: Mapping[str, Mapping[str, Mapping[str, Any]]], void: Mapping[str, str] | None = None) -> str:
    """The cases of all works, as `as_json` gives them, one contestant a line; then what they come to beside the floor's
    bytes per second, who is absent, and what is void."""
    rows, shares, notes = [], [], []
    for work, cases in works.items():
        for case, data in cases.items():
            rows += [[f"{work}/{case}" if name == FLOOR else "", *_row(name, data)] for name in data["contestants"]]
            notes += [f"{work}/{case}: no {name}: {reason}" for name, reason in data["absent"].items()]
            shares += [f"{work}/{case}: {share}" for share in _shares(data)]
            notes += [f"{work}/{case}: {note}" for note in _traffic(data)]
    notes += [f"{name}: void: {reason}" for name, reason in (void or {}).items()]
    return "\n".join([_format(_HEADER, rows), *shares, *notes])


def _shares(data: Mapping[str, Any]) -> list[str]:
    """How near fastdiv's backends come to a floor that moves the bytes that must be moved."""
    ours = {name: entry for name, entry in data["contestants"].items() if "backend" in entry}
    if data["floor"]["unit"] != "byte" or not ours:
        return []
    shares = ", ".join(f"{_label(n, entry)} {100.0 * entry['of_floor']:.1f} %" for n, entry in ours.items())
    size = " x ".join(str(n) for n in data["shape"].values())
    chosen = ", ".join(data["floor"]["chosen"])
    return [f"{size} {data['dtype']}, of the floor's bytes per second ({chosen}): {shares}"]


def _traffic(data: Mapping[str, Any]) -> list[str]:
    """What fastdiv's kernels move where it is not what the floor moves."""
    notes = []
    for entry in data["contestants"].values():
        if (moved := entry.get("moved_bytes")) and moved != data["floor"]["amount"]:
            whose = f"fastdiv's {entry['backend']} kernels" if "backend" in entry else "fastdiv's kernels"
            notes.append(f"{whose} move {moved / 1e9:.3g} GB, at {_rate(moved, 'byte', entry['median_s'])}")
    return notes


def _label(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name} ({entry['backend']})" if name == FASTDIV and "backend" in entry else name


def _rate(amount: float, unit: str, seconds: float) -> str:
    prefix, size = ("T", 1e12) if unit == "flop" and amount / seconds >= 1e12 else ("G", 1e9)
    return f"{amount / seconds / size:.1f} {prefix}{_RATES[unit]}"


def _row(name: str, data: Mapping[str, Any]) -> list[str]:
    entry, floor = data["contestants"][name], data["floor"]
    ratio, memory = entry["to_floor"], entry.get("memory_bytes")
    chosen = f" ({', '.join(floor['chosen'])})" if floor["chosen"] else ""
    to_it = entry.get("fastdiv_to_it")
    return [
        f"floor: {floor['name']}{chosen}" if name == FLOOR else _label(name, entry),
        f"{entry['median_s'] * 1e3:.2f}",
        f"{entry['min_s'] * 1e3:.2f}",
        "1" if name == FLOOR else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        f"{100.0 / ratio['median']:.0f} %",
        "" if name == FASTDIV or not to_it else f"{to_it['median']:.3f}",
        _rate(floor["amount"], floor["unit"], entry["median_s"]) if floor["amount"] else "",
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
