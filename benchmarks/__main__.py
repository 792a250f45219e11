"""`fastdiv bench`: every work against eager torch, torch.compile and its floor, on this machine."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from . import from_hidden, from_logits, import_time, memory, report
from .common import Case, Disagreement, Settings
from .import_time import ImportCase

WORKS = {"from_hidden": from_hidden, "from_logits": from_logits, "import_time": import_time}
RESULTS = Path(__file__).parent / "results"
_EPILOG = """\
The times of one case are taken in interleaved rounds.  "x floor" is the median of the ratios within a
round, with its quartiles.  "fastdiv / it" below 1 says that fastdiv is faster than that line.  "peak MiB" is
beyond the inputs, in a fresh process; "less results" leaves out the outputs and gradients too.  A contestant
whose results differ ends the run with status 1.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks that the arguments choose and prints a table.

    Arguments:
        argv: the options of `fastdiv bench`; None: those of the process.

    Returns:
        0, or 1 if a contestant computed something else than the others, which is said on stderr.
    """
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(options.scale, options.rounds, options.compile, options.memory)
    works: dict[str, dict[str, Any]] = {}
    machine = report.machine()
    document = {"machine": machine, "scale": settings.scale, "works": works}
    try:
        for work, case in _chosen(options.only, settings.scale):
            print(f"{work}/{case.name} ...", file=sys.stderr, flush=True)
            result = case.run(settings)
            if settings.memory and isinstance(case, Case):
                present = [name for name in case.contestants if name in result.times]
                result.memory = {name: memory.measure(work, case.name, name, settings.scale) for name in present}
            works.setdefault(work, {})[case.name] = report.as_json(result)
    except Disagreement as error:
        print(f"fastdiv bench: void: {error}", file=sys.stderr)
        return 1
    print(report.table(works))
    for path in _paths(options, machine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {path}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastdiv bench",
        description="Times every operator against eager torch, torch.compile and the least it could cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [name for work, case in _chosen([], "full") for name in (work, f"{work}/{case.name}")]
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
    parser.add_argument("--json", type=Path, metavar="PATH", help="write times, ratios and machine facts there")
    parser.add_argument("--save", action="store_true", help=f"the same, under a name of its own in {RESULTS}")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def _chosen(only: list[str], scale: str) -> list[tuple[str, Case | ImportCase]]:
    every = [(work, case) for work, module in WORKS.items() for case in module.cases(scale)]
    return [(w, case) for w, case in every if not only or w in only or f"{w}/{case.name}" in only]


def _paths(options: argparse.Namespace, machine: dict[str, Any]) -> list[Path]:
    name = f"{machine['date'][:10]} {machine['cpu']} {machine['threads']} threads {options.scale}"
    saved = RESULTS / (re.sub(r"[^a-z0-9-]+", "_", name.lower()) + ".json")
    return [path for path, wanted in ((options.json, options.json), (saved, options.save)) if wanted]


if __name__ == "__main__":
    sys.exit(main())
