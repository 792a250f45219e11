"""The custom operators tell the truth about themselves, and torch.compile swallows the public ones whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, head
from torch import Tensor

import fastdiv
from fastdiv import library
from fastdiv.ops.call import prepare
from fastdiv.testing import assert_bitwise_equal

OUTPUTS = (*MODEL_OUTPUTS, "argmax", "is_top1", "rank")


def arguments(
    student: Any, labels: Tensor | None, teacher: Any, outputs: tuple[str, ...], backend: str
) -> tuple[Any, ...]:
    """What the public operators hand to `fastdiv::stats`."""
    call = prepare(
        "test",
        student,
        labels,
        teacher,
        outputs,
        parameters={"beta": None},
        temperature=0.9,
        mask=None,
        ignore_index=-100,
        backend=backend,
        workspace=None,
    )
    own, other = list(call.tensors[: call.students]), list(call.tensors[call.students :])
    return (own, other, call.labels, call.mask, call.temperature, *library.arguments(call.request))


def cases(rows: int, backend: str) -> dict[str, tuple[Any, ...]]:
    hidden, weight, bias = (t.detach() for t in head(rows, 11, 4))
    x, y = torch.randn(rows, 11), torch.randn(rows, 11, dtype=torch.bfloat16)
    labels = torch.arange(rows)
    own = fastdiv.LinearLogits(hidden, weight, bias)
    return {
        "logits": arguments(x, labels, None, OUTPUTS, backend),
        "several labels": arguments(y, labels[:, None].expand(rows, 3), None, ("rank", "log_prob"), backend),
        "hidden": arguments(own, labels, None, OUTPUTS, backend),
        "two models": arguments(x, None, y, DIVERGENCES, backend),
        "mixed": arguments(own, labels, x, ("log_prob", "js"), backend),
    }


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("case", ["logits", "several labels", "hidden", "two models", "mixed"])
def test_opcheck(backend: str, case: str, rows: int) -> None:
    given = cases(rows, backend)[case]
    torch.library.opcheck(torch.ops.fastdiv.stats.default, given)
    if case != "several labels":  # opcheck adds the others to the first output, integers there
        trained = [t.detach().clone().requires_grad_() for t in given[0]]
        torch.library.opcheck(torch.ops.fastdiv.stats.default, (trained, *given[1:]))
    *outputs, state, compared = torch.ops.fastdiv.stats(*given)
    names = given[5].split(",")
    flowing = [(n, o) for n, o in zip(names, outputs, strict=True) if o.is_floating_point()]
    upstream = [torch.randn_like(o) for _, o in flowing]
    needs = [True] * len(given[0]) + [True] * len(given[1])
    for wanted in (needs, [*needs[1:], False]):
        backward = (upstream, ",".join(n for n, _ in flowing), wanted, state, compared, *given)
        torch.library.opcheck(torch.ops.fastdiv.grad.default, backward)


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def same_as_eager(
    function: Callable[..., Tensor], batches: Sequence[Sequence[Tensor]], backend: str = "aot_eager"
) -> None:
    """Values and gradients of the compiled function are those of the eager one, for every batch."""
    fast = compiled(function, backend)
    for batch in batches:
        results = []
        for f in (function, fast):
            leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in batch]
            out = f(*leaves)
            out.backward()
            results.append([out, *(t.grad for t in leaves if t.is_floating_point())])
        for want, got in zip(*results, strict=True):
            assert_bitwise_equal(got, want)


def logits_and_labels(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 40), torch.arange(n)) for n in sizes]


def test_compile_log_prob(backend: str) -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return (fastdiv.log_prob(x, labels, backend=backend).exp() * 2.0).sum()

    same_as_eager(loss, logits_and_labels(4, 7, 9))


def test_compile_divergence(backend: str) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastdiv.divergence(x, y, "js", beta=0.3, temperature=0.5, backend=backend).square().sum()

    same_as_eager(loss, [(torch.randn(n, 40), torch.randn(n, 40)) for n in (4, 7)])


def test_compile_token_stats_from_hidden(backend: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = fastdiv.LinearLogits(hidden, weight, bias, softcap=20.0)
        labels = torch.arange(hidden.shape[0])
        stats = fastdiv.token_stats(own, labels, outputs=("log_prob", "entropy", "argmax"), backend=backend)
        return (stats.log_prob * stats.entropy).sum() + stats["argmax"].sum()

    same_as_eager(loss, [head(n, 30, 8) for n in (4, 6, 9)])


def test_compile_with_mask_and_temperature(backend: str) -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        mask, temperature = labels > 0, labels.float() + 0.5
        return fastdiv.log_prob(x, labels, mask=mask, temperature=temperature, backend=backend).sum()

    same_as_eager(loss, logits_and_labels(4, 7))


def test_compile_chooses_a_backend() -> None:
    same_as_eager(lambda x, labels: fastdiv.log_prob(x, labels).sum(), logits_and_labels(4))


def test_compile_dynamic_from_the_start(backend: str) -> None:
    def stats(x: Tensor, labels: Tensor) -> Tensor:
        return fastdiv.log_prob(x, labels, backend=backend)

    torch._dynamo.reset()
    fast = torch.compile(stats, fullgraph=True, backend="aot_eager", dynamic=True)
    for x, labels in logits_and_labels(4, 7, 33):
        assert_bitwise_equal(fast(x, labels), stats(x, labels))


def test_compile_by_inductor() -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        stats = fastdiv.token_stats(x * 2.0, labels)
        return (stats.log_prob + 0.1 * stats.entropy).sum()

    fast = compiled(loss, "inductor")
    x, labels = torch.randn(4, 40), torch.arange(4)
    results = []
    for f in (loss, fast):
        leaf = x.clone().requires_grad_()
        out = f(leaf, labels)
        out.backward()
        results.append((out.detach(), leaf.grad))
    for want, got in zip(*results, strict=True):
        assert want is not None and got is not None
        torch.testing.assert_close(got, want)


def test_compile_over_a_functional_gradient(backend: str) -> None:
    """Leaves that go straight into an operator, where dynamo says that they require no gradient."""
    x, y, labels = torch.randn(4, 40), torch.randn(4, 40), torch.arange(4)
    hidden, weight, bias = (t.detach() for t in head(4, 40, 8))

    def loss(x: Tensor) -> Tensor:
        return fastdiv.log_prob(x, labels, backend=backend).sum()

    def divergence(x: Tensor, y: Tensor) -> Tensor:
        return fastdiv.divergence(x, y, "js", backend=backend).sum()

    def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = fastdiv.LinearLogits(hidden, weight, bias)
        return fastdiv.linear_loss(own, labels, lambda s, rows: -s.log_prob, backend=backend)

    for function, given in ((loss, (x,)), (divergence, (x, y)), (from_hidden, (hidden, weight, bias))):
        places = tuple(range(len(given)))
        leaves = [t.clone().requires_grad_() for t in given]
        value = function(*leaves)
        want = (*torch.autograd.grad(value, leaves), value.detach())
        for transform in (torch.func.grad, torch.func.grad_and_value):
            eager = transform(function, places)
            torch._dynamo.reset()
            for got in (eager(*given), torch.compile(eager, backend="aot_eager", fullgraph=True)(*given)):
                flat, _ = torch.utils._pytree.tree_flatten(got)
                for a, b in zip(flat, want, strict=False):
                    torch.testing.assert_close(a, b)


def test_compile_linear_loss(backend: str) -> None:
    numbers = torch.randn(64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        labels = torch.arange(hidden.shape[0]) % 30
        own = fastdiv.LinearLogits(hidden, weight, bias, softcap=20.0)
        options = {"outputs": ("log_prob", "entropy"), "mask": labels != 2, "backend": backend}
        return fastdiv.linear_loss(own, labels, lambda s, r: s.log_prob.exp() * numbers[r] + s.entropy, **options)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 6, 9, 12, 15, 21, 33, 40, 50, 64):
        leaves = [t.detach().requires_grad_() for t in head(n, 30, 8)]
        want, got = loss(*leaves), fast(*leaves)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_compile_value_and_gradient(backend: str, overwrite: bool) -> None:
    def both(x: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stats, gradient = fastdiv.value_and_gradient(
            x, labels, {"log_prob": weights, "entropy": 0.1}, overwrite=overwrite, backend=backend
        )
        return stats.log_prob, stats.entropy, gradient * 2.0

    torch._dynamo.reset()
    fast = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for x, labels in logits_and_labels(4, 7, 9):
        places, weights = (x.clone(), x.clone()), torch.randn(x.shape[0])
        for want, got in zip(*(f(p, labels, weights) for f, p in zip((both, fast), places, strict=True)), strict=True):
            assert_bitwise_equal(got, want)
        assert_bitwise_equal(*places)


@pytest.mark.parametrize("teacher", [False, True])
def test_opcheck_of_value_and_gradient(backend: str, teacher: bool) -> None:
    x, y, labels = torch.randn(3, 11), torch.randn(3, 11), torch.arange(3)
    names = ("log_prob", "js") if teacher else ("log_prob", "entropy")
    _, _, *rest = arguments(x, labels, y if teacher else None, names, backend)
    given = [y] if teacher else [], [torch.randn(3), torch.randn(3)], *rest
    torch.library.opcheck(torch.ops.fastdiv.value_and_gradient.default, (x, *given))


class Head(torch.nn.Module):
    """An output layer: logits of its own, or straight from hidden states."""

    def __init__(self, form: str, backend: str) -> None:
        super().__init__()
        self.form, self.backend = form, backend
        self.weight = torch.nn.Parameter(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        own = fastdiv.LinearLogits(hidden, self.weight)
        if self.form == "loss":
            return fastdiv.linear_loss(own, labels, lambda s, rows: -s.log_prob, backend=self.backend)
        source = hidden @ self.weight.T if self.form == "logits" else own
        return fastdiv.log_prob(source, labels, backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["logits", "hidden", "loss"])
def test_an_exported_program_trains(backend: str, form: str, strict: bool) -> None:
    module, hidden, labels = Head(form, backend), torch.randn(6, 8), torch.arange(6)
    program = torch.export.export(module, (hidden, labels), strict=strict).module()
    want, got = module(hidden, labels).sum(), program(hidden, labels).sum()
    (expected,) = torch.autograd.grad(want, module.weight)
    (found,) = torch.autograd.grad(got, program.weight)
    torch.testing.assert_close(found, expected)


def test_fake_tensors_have_the_shapes_of_real_ones(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, labels = torch.randn(2, 3, 20), torch.zeros(2, 3, 5, dtype=torch.int64)
    real = fastdiv.token_stats(x, labels, outputs=OUTPUTS, backend=backend)
    with FakeTensorMode() as mode:
        fake = fastdiv.token_stats(mode.from_tensor(x), mode.from_tensor(labels), outputs=OUTPUTS, backend=backend)
    for name in OUTPUTS:
        assert (fake[name].shape, fake[name].dtype) == (real[name].shape, real[name].dtype), name
