"""The fixed cost of a call: a batch so small that nothing but calling is timed, in times torch's own operators.

    python -m benchmarks.per_call [--json PATH]

[1, 4, 16] float32 on one thread, without a graph, with one, and with the backward.  Each call is timed alone, in
interleaved rounds; of its times the lowest twentieth counts, which a busy machine leaves alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastdiv

_ROUNDS, _CALLS, _WARM = 100, 20, 200
_KEPT = 0.05

MOST = {"no graph": 18.0, "graph": 22.0, "backward": 11.0}
"""What each form may cost, in times torch's log_softmax and gather."""


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def _forms(function: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[[], object]]:
    logits, labels = torch.randn(1, 4, 16), torch.randint(16, (1, 4))
    leaf = logits.clone().requires_grad_()
    return {
        "no graph": lambda: function(logits, labels),
        "graph": lambda: function(leaf, labels),
        "backward": lambda: torch.autograd.grad(function(leaf, labels).sum(), leaf),
    }


def measure(rounds: int = _ROUNDS) -> dict[str, dict[str, float]]:
    """Form -> microseconds of torch and of fastdiv, and their ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = {who: _forms(function) for who, function in (("torch", _plain), ("fastdiv", fastdiv.log_prob))}
    times: dict[str, dict[str, list[float]]] = {who: {form: [] for form in forms} for who, forms in calls.items()}
    try:
        for turn in range(rounds + 1):
            for who, forms in calls.items():
                for form, call in forms.items():
                    for _ in range(_CALLS if turn else _WARM):
                        start = time.perf_counter()
                        call()
                        if turn:
                            times[who][form].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    result = {}
    for form in MOST:
        own, other = (
            sorted(times[who][form])[int(len(times[who][form]) * _KEPT)] * 1e6 for who in ("fastdiv", "torch")
        )
        result[form] = {"torch": other, "fastdiv": own, "ratio": own / other, "most": MOST[form]}
    return result


def main(argv: list[str] | None = None) -> int:
    """Prints a table; 1 if a form costs more than it may."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.per_call", description="The fixed cost of a call.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")
    options = parser.parse_args(argv)
    found = measure()
    print(f"{'':10}{'torch us':>10}{'fastdiv us':>12}{'times':>8}{'at most':>9}")
    for form, row in found.items():
        print(f"{form:10}{row['torch']:10.1f}{row['fastdiv']:12.1f}{row['ratio']:8.1f}{row['most']:9.0f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["ratio"] > row["most"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
