"""`import fastdiv` against `import torch`, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from .common import FASTDIV, FLOOR, PLACES, Place, Result, Settings
from .timing import interleave

_PROGRAM = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def import_seconds(module: str) -> float:
    """How long the statement `import module` takes in a new interpreter, its start not counted."""
    command = [sys.executable, "-c", _PROGRAM.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"import {module} failed in a fresh process: {done.stderr.strip()}")
    return float(done.stdout)


@dataclass(frozen=True)
class ImportCase:
    """The import, with torch's as its floor: fastdiv cannot be had without it."""

    name: str
    rounds: int

    def run(self, settings: Settings) -> Result:
        modules = {FLOOR: "torch", FASTDIV: "fastdiv"}
        for module in modules.values():
            import_seconds(module)  # files into the page cache, byte code written
        measures = {name: lambda module=module: import_seconds(module) for name, module in modules.items()}
        times = interleave(measures, settings.rounds or self.rounds)
        return Result({}, "import", "import torch", [], times)


def cases(scale: str, place: Place = PLACES["cpu"]) -> list[ImportCase]:
    """The one case, at every scale the same; a GPU has nothing to do with it."""
    return [ImportCase("import", rounds=7)] if place.name == "cpu" else []
