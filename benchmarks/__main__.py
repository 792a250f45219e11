"""`fastdiv bench`: every work against eager torch, torch.compile and its floor, on this machine."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import from_hidden, from_logits, import_time, memory, report
from .common import FASTDIV, PLACES, Case, Disagreement, Place, Settings
from .import_time import ImportCase

WORKS = {"from_logits": from_logits, "from_hidden": from_hidden, "import_time": import_time}
RESULTS = Path(__file__).parent / "results"
_EPILOG = """\
The times of one case are taken in interleaved rounds.  "x floor" is the median of the ratios within a
round, with its quartiles.  "fastdiv / it" below 1 says that fastdiv is faster than that line.  "peak MiB" is
beyond the inputs, on a CPU in a fresh process; "less results" leaves out the outputs and gradients too.  A case in
which results differ is void, and the status is then 1.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks that the arguments choose and prints a table.

    Arguments:
        argv: the options of `fastdiv bench`; None: those of the process.

    Returns:
        0, or 1 if a case is void, because a contestant computed something else than the others or fastdiv did not run,
        or if the run was interrupted; stderr says which.  What was measured before is printed and written all the same.
    """
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(options.scale, options.rounds, options.compile, options.memory)
    place = PLACES[options.device]
    machine = report.machine(place.device)
    works: dict[str, dict[str, Any]] = {}
    void: dict[str, str] = {}
    try:
        _run(_chosen(options.only, settings.scale, place), settings, options.seconds, works, void)
    except KeyboardInterrupt:
        void["the run"] = "interrupted, what follows was not measured"
    for name, reason in void.items():
        print(f"fastdiv bench: {name}: void: {reason}", file=sys.stderr)
    document = {"machine": machine, "scale": settings.scale, "works": works, "void": void}
    table = report.table(works, void)
    print(table)
    for path in _paths(options, machine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".txt").write_text(table + "\n")
        print(f"written: {path}, {path.with_suffix('.txt').name}")
    return 1 if void else 0


def _run(
    chosen: list[tuple[str, Case | ImportCase]],
    settings: Settings,
    seconds: float | None,
    works: dict[str, dict[str, Any]],
    void: dict[str, str],
) -> None:
    """Fills `works` and `void`, case by case, so that they hold what is known whenever this ends."""
    begin = time.monotonic()
    for work, case in chosen:
        name = f"{work}/{case.name}"
        if seconds is not None and time.monotonic() - begin > seconds:
            void[name] = f"not begun within {seconds:g} s"
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            result = case.run(settings)
            if settings.memory and isinstance(case, Case):
                present = [contestant for contestant in case.contestants if contestant in result.times]
                result.memory = {c: memory.measure(work, case, c, settings.scale) for c in present}
        except Exception as error:  # whatever it is, the other cases may still be measured
            if not isinstance(error, Disagreement):
                traceback.print_exc()
            void[name] = str(error)
            continue
        works.setdefault(work, {})[case.name] = report.as_json(result)
        if FASTDIV in result.absent:
            void[name] = f"fastdiv: {result.absent[FASTDIV]}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastdiv bench",
        description="Times every operator against eager torch, torch.compile and the least it could cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    everything = [pair for place in PLACES.values() for pair in _chosen([], "full", place)]
    names = [name for work, case in everything for name in (work, f"{work}/{case.name}")]
    names = list(dict.fromkeys(names))
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=names,
        metavar="NAME",
        help=f"{', '.join(names)}; repeatable",
    )
    parser.add_argument(
        "--scale", choices=["full", "small"], default="full", help="small: seconds, to see that it works"
    )
    parser.add_argument(
        "--rounds", type=_positive, help="how often each contestant is timed (default: by work, 5 to 15)"
    )
    parser.add_argument("--threads", type=_positive, help="torch's threads (default: torch's choice)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="no peak memory, so no extra processes"
    )
    parser.add_argument(
        "--device", choices=list(PLACES), default="cpu", help="cuda: torch's current GPU, in bfloat16 (default: cpu)"
    )
    parser.add_argument("--seconds", type=float, help="begin no case after so many seconds")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write times, ratios and machine facts there, the table beside"
    )
    parser.add_argument("--save", action="store_true", help=f"the same, under a name of its own in {RESULTS}")
    options = parser.parse_args(argv)
    if PLACES[options.device].device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def _chosen(only: list[str], scale: str, place: Place) -> list[tuple[str, Case | ImportCase]]:
    every = [(work, case) for work, module in WORKS.items() for case in module.cases(scale, place)]
    return [(w, case) for w, case in every if not only or w in only or f"{w}/{case.name}" in only]


def _paths(options: argparse.Namespace, machine: dict[str, Any]) -> list[Path]:
    gpu = machine["device"]
    what = f"{machine['cpu']} {machine['threads']} threads" if isinstance(gpu, str) else gpu["name"]
    name = re.sub(r"[^a-z0-9-]+", "_", f"{machine['date'][:10]} {what} {options.scale}".lower())
    saved = RESULTS / f"{name}.json"
    return [path for path, wanted in ((options.json, options.json), (saved, options.save)) if wanted]


if __name__ == "__main__":
    sys.exit(main())
