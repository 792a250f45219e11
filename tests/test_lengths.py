"""One compiled graph, or one exported program, serves every length."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_bitwise_equal

# torch.compile itself does what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LENGTHS = (6, 7, 9, 12, 15, 21, 33, 40, 50, 64)
WEIGHT = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))

Case = Callable[[Tensor, Tensor], Tensor]

CASES: dict[str, tuple[Case, Callable[[int], tuple[int, ...]]]] = {
    "log_prob": (lambda x, y: fastdiv.log_prob(x, y).sum(), lambda n: (n, 40)),
    "log_prob of a batch": (lambda x, y: fastdiv.log_prob(x, y).sum(), lambda n: (2, n, 40)),
    "hidden": (lambda x, y: fastdiv.entropy(fastdiv.LinearLogits(x, WEIGHT)).sum(), lambda n: (2, n, 8)),
    "js": (lambda x, y: fastdiv.divergence(x, x.detach() * 0.5, "js").sum(), lambda n: (n, 40)),
    "token_stats": (
        lambda x, y: fastdiv.token_stats(x, y, temperature=y.float() + 1.0, mask=y > 0).log_prob.sum(),
        lambda n: (2, n, 40),
    ),
}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[-2])
    return torch.randn(*shape, generator=generator), torch.randint(40, shape[:-1], generator=generator)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_length(name: str, dynamic: bool | None, gradient: bool) -> None:
    function, shape = CASES[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(function, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for n in LENGTHS:
        x, y = inputs(shape(n))
        results = []
        for f in (function, fast):
            leaf = x.clone().requires_grad_(gradient)
            out = f(leaf, y)
            results.append([out.detach(), *(torch.autograd.grad(out, leaf) if gradient else ())])
        for want, got in zip(*results, strict=True):
            assert_bitwise_equal(got, want)
    # Where nothing is said, the first length is compiled as it is and the second for all.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


class Head(torch.nn.Module):
    """An output layer that gives the log-probabilities of labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return fastdiv.log_prob(fastdiv.LinearLogits(hidden, self.weight), labels)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_any_length(strict: bool) -> None:
    head, n = Head(), torch.export.Dim("n")
    with torch.no_grad():
        program = torch.export.export(
            head, inputs((2, 6, 8)), dynamic_shapes={"hidden": {1: n}, "labels": {1: n}}, strict=strict
        )
        for length in (2, 4, 30):
            given = inputs((2, length, 8))
            assert_bitwise_equal(program.module()(*given), head(*given))


def test_a_backend_that_a_trace_loads_is_no_reason_for_a_second_one() -> None:
    program = """
import torch, fastdiv
fast = torch.compile(fastdiv.log_prob, backend="aot_eager", dynamic=True, fullgraph=True)
for n in (6, 7, 9):
    fast(torch.randn(n, 40), torch.arange(n))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
