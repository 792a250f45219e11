"""The first look at a GPU, in about a minute: are the kernels right, what are the GPU's ceilings, what does each cost.

    python -m benchmarks.first_gpu [--small] [--save] [section ...]

Every section stands alone: one that fails is named, and the rest goes on.  `--small` uses sizes that a CPU can run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import traceback
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastdiv
from fastdiv import backends

from .floors import bytes_moved
from .timing import meter

RESULTS = Path(__file__).parent / "results"
SIZES = {"full": (8192, 151936), "small": (16, 4096)}
"""Rows and vocabulary of the row kernels."""
HEADS = {"full": (4096, 4096, 128256), "small": (64, 32, 512)}
"""Tokens, hidden size and vocabulary of the products."""
RIGHT = {
    "full": (
        (1, torch.float32),
        (1023, torch.bfloat16),
        (32001, torch.bfloat16),
        (50257, torch.float16),
        (128256, torch.bfloat16),
        (151936, torch.bfloat16),
        (151936, torch.float32),
    ),
    "small": ((1, torch.float32), (1023, torch.bfloat16)),
}
"""Vocabularies for each path of the CUDA kernels: a thread, a block, clusters of 2, 4 and 8, rows that fit none."""
OUTPUTS = (("log_prob", "entropy"), ("log_prob", "entropy", "reverse_kl"), ("forward_kl",), ("js",))
VALUE, GRADIENT = 1e-4, {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Errors beside float64 that are wrong code, not rounding: of a value, of a gradient's largest entry."""


class Look:
    """The sections, and what they found."""

    def __init__(self, scale: str) -> None:
        self.scale = scale
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.found: dict[str, object] = {}
        self.wrong: list[str] = []
        present = [name for name in ("cuda", "triton") if backends.available()[name] is None]
        self.backends = present or ["native"]

    def say(self, name: str, value: object) -> None:
        self.found[name] = value
        print(f"{name:60} {value}", flush=True)

    def milliseconds(self, work: Callable[[], object], rounds: int = 7) -> float:
        work()
        seconds = meter(self.device)
        return statistics.median(seconds(work)[0] for _ in range(rounds)) * 1e3

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def machine(self) -> None:
        """The GPU, the versions and the backends."""
        if self.device == "cuda":
            it = torch.cuda.get_device_properties(0)
            self.say("device", f"{it.name}, {it.multi_processor_count} SMs, L2 {it.L2_cache_size >> 20} MiB")
        self.say("torch", torch.__version__)
        self.say("date", date.today().isoformat())
        self.say("backends", {name: absent or "ready" for name, absent in backends.available().items()})

    def right(self) -> None:
        """Values and gradients of each backend beside float64."""
        for name in self.backends:
            for v, dtype in RIGHT[self.scale]:
                error, slope_error = self._errors(name, v, dtype)
                title = f"right: {name}, {v} {str(dtype).removeprefix('torch.')}"
                self.say(title, f"value {error:.1e}, gradient {slope_error:.1e}")
                if not (error < VALUE and slope_error < GRADIENT[dtype]):
                    self.wrong.append(title)

    def _errors(self, name: str, v: int, dtype: torch.dtype) -> tuple[float, float]:
        torch.manual_seed(v)
        # Rows that begin at any multiple of the dtype's size.
        x, y = (self.normal(5, v + 3, dtype=torch.float32).mul_(3.0).to(dtype)[:, :v] for _ in range(2))
        labels = torch.randint(v, (5,), device=self.device)
        x.requires_grad_()
        exact = x.detach().double().requires_grad_()
        want = _statistics(exact, y.double(), labels)
        error = slope_error = 0.0
        for outputs in OUTPUTS:
            of_two = any(output in ("reverse_kl", "forward_kl", "js") for output in outputs)
            given = labels if "log_prob" in outputs else None
            got = fastdiv.token_stats(x, given, teacher=y if of_two else None, outputs=outputs, backend=name)
            for output in outputs:
                apart = (got[output].detach() - want[output].detach()).abs()
                error = max(error, float((apart / (want[output].detach().abs() + 1e-3)).max()))
            (dx,) = torch.autograd.grad(sum(got[output].sum() for output in outputs), x)
            (exact_dx,) = torch.autograd.grad(sum(want[o].sum() for o in outputs), exact, retain_graph=True)
            if v > 1:  # else the gradient is 0
                slope_error = max(slope_error, float((dx.double() - exact_dx).abs().max() / exact_dx.abs().max()))
        weights = {"log_prob": 1.0, "entropy": 0.5}
        stats, _ = fastdiv.value_and_gradient(x.detach().clone(), labels, weights, overwrite=True, backend=name)
        for output in weights:
            apart = (stats[output] - want[output].detach()).abs()
            error = max(error, float((apart / (want[output].detach().abs() + 1e-3)).max()))
        return error, slope_error

    def copy(self) -> None:
        """The bytes per second of a device copy, read and written."""
        count = 1 << (31 if self.scale == "full" else 19)
        source = torch.ones(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        time = self.milliseconds(lambda: target.copy_(source))
        self.say("copy", f"{2 * count / time / 1e9:.3f} TB/s")

    def rows(self) -> None:
        """Each row kernel of each backend, from logits."""
        m, v = SIZES[self.scale]
        x, y = (self.normal(m, v).mul_(3.0) for _ in range(2))
        x.requires_grad_()
        labels = torch.randint(v, (m,), device=self.device)

        def say(title: str, passes: int, work: Callable[[], object]) -> None:
            time = self.milliseconds(work)
            rate = bytes_moved(m, v, 2, passes, 0) / time / 1e9
            self.say(title, f"{time:.3f} ms {rate:.2f} TB/s")

        for name in self.backends:
            for outputs in (("log_prob", "entropy"), ("reverse_kl",), ("js",)):
                one = len(outputs) > 1
                given, teacher = (labels, None) if one else (None, y)
                models = 1 if one else 2

                def call(
                    given: Tensor | None = given,
                    teacher: Tensor | None = teacher,
                    outputs: tuple[str, ...] = outputs,
                    name: str = name,
                ) -> fastdiv.TokenStats:
                    return fastdiv.token_stats(x, given, teacher=teacher, outputs=outputs, backend=name)

                title = f"{name} {'+'.join(outputs)}"
                with torch.no_grad():
                    say(f"{title} forward", models, call)
                total = sum(output.sum() for output in call().values())
                say(
                    f"{title} backward",
                    models + 1,
                    lambda total=total: torch.autograd.grad(total, x, retain_graph=True),  # type: ignore[misc]
                )
                del total
            z = x.detach().clone()
            say(f"{name} value_and_gradient over the logits", 2, partial(self._both, z, labels, name))
            del z

    @staticmethod
    def _both(logits: Tensor, labels: Tensor, name: str) -> None:
        weights = {"log_prob": 1e-6, "entropy": 1e-7}
        fastdiv.value_and_gradient(logits, labels, weights, overwrite=True, backend=name)

    def products(self) -> None:
        """Losses from hidden states beside their bare products, which are timed one after another like them."""
        m, h, v = HEADS[self.scale]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        hidden = self.normal(m, h, dtype=dtype).requires_grad_()
        weight = self.normal(v, h, dtype=dtype).mul_(3.0 / h**0.5).requires_grad_()
        labels = torch.randint(v, (m,), device=self.device)
        x, w = hidden.detach(), weight.detach()
        logits, d_hidden, d_weight = x.new_empty(m, v), torch.empty_like(x), torch.empty_like(w)

        def three() -> None:
            torch.mm(x, w.T, out=logits)
            torch.mm(logits, w, out=d_hidden)
            torch.mm(logits.T, x, out=d_weight)

        with torch.no_grad():
            bare = self.milliseconds(three, 5)
        self.say("3 bare products", f"{bare:.2f} ms {6 * m * h * v / bare / 1e9:.0f} TFLOP/s")
        head = fastdiv.LinearLogits(hidden, weight)

        def say(title: str, products: int, work: Callable[[], object]) -> None:
            peak = ""
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                work()
                peak = f", peak {(torch.cuda.max_memory_allocated() - before) >> 20} MiB"
            time = self.milliseconds(work, 5)
            self.say(title, f"{time:.2f} ms, x {products} bare products {time / bare * 3 / products:.3f}{peak}")

        def two_outputs() -> None:
            stats = fastdiv.token_stats(head, labels, outputs=("log_prob", "entropy"))
            torch.autograd.grad(stats.log_prob.sum() + 0.1 * stats.entropy.sum(), (hidden, weight))

        def loss(workspace: int | None) -> None:
            total = fastdiv.linear_loss(head, labels, lambda stats, rows: -stats.log_prob, workspace=workspace)
            torch.autograd.grad(total, (hidden, weight))

        say("from hidden: log_prob+entropy", 4, two_outputs)
        say("from hidden: linear_loss", 3, lambda: loss(None))
        for mib in (256, 1024, 2100):
            say(f"from hidden: linear_loss, workspace {mib} MiB", 3, lambda mib=mib: loss(mib << 20))  # type: ignore[misc]


SECTIONS = ("machine", "right", "copy", "rows", "products")


def _statistics(x: Tensor, y: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All outputs that are compared, by plain torch."""
    lp, lq = x.log_softmax(-1), y.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    mixture = ((p + q) / 2).log()
    return {
        "log_prob": lp.gather(1, labels[:, None])[:, 0],
        "entropy": -(p * lp).sum(-1),
        "reverse_kl": (p * (lp - lq)).sum(-1),
        "forward_kl": (q * (lq - lp)).sum(-1),
        "js": ((p * (lp - mixture)).sum(-1) + (q * (lq - mixture)).sum(-1)) / 2,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the sections that `argv` names, or all; 1 if one fails or finds a wrong number."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can run")
    parser.add_argument("--save", action="store_true", help=f"write what was found into {RESULTS.name}/")
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: expected {', '.join(SECTIONS)}")
    look = Look("small" if options.small else "full")
    for name in options.sections or SECTIONS:
        try:
            getattr(look, name)()
        except Exception as error:  # the other sections may still say something
            traceback.print_exc()
            look.wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    for wrong in look.wrong:
        print(f"first look: wrong: {wrong}", file=sys.stderr)
    if options.save:
        gpu = torch.cuda.get_device_name() if look.device == "cuda" else "cpu"
        path = RESULTS / f"{date.today().isoformat()}_{re.sub('[^a-z0-9]+', '_', gpu.lower())}_first_look.json"
        path.write_text(json.dumps(look.found | {"wrong": look.wrong}, indent=1) + "\n")
        print(f"written: {path}")
    return 1 if look.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
