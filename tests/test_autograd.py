"""The autograd contract: true derivatives, nothing beyond what is asked for, and honest errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, head
from torch import Tensor

import fastdiv


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MODEL_OUTPUTS)
@pytest.mark.parametrize("form", ["logits", "transformed", "hidden"])
def test_gradcheck_of_one_model(name: str, form: str) -> None:
    labels = torch.tensor([[0, 3], [2, 2], [-100, 4]])
    temperature = torch.tensor([0.7, 1.0, 2.0], dtype=torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        source: Any = tensors[0]
        if form == "transformed":
            source = fastdiv.Logits(tensors[0], softcap=3.0, scale=1.5)
        if form == "hidden":
            source = fastdiv.LinearLogits(*tensors, softcap=3.0, scale=0.7)
        options: dict[str, Any] = {"outputs": (name,), "temperature": temperature, "workspace": 8 * 5 * 2}
        return fastdiv.token_stats(source, labels, **options)[name]

    inputs = (random(3, 4), random(5, 4, seed=1), random(5, seed=2)) if form == "hidden" else (random(3, 5),)
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", ["logits", "hidden", "mixed"])
def test_gradcheck_of_two_models(kind: str, form: str) -> None:
    def run(*tensors: Tensor) -> Tensor:
        student: Any = tensors[0] if form != "hidden" else fastdiv.LinearLogits(*tensors[:2], softcap=4.0)
        teacher: Any = tensors[-1] if form == "logits" else fastdiv.LinearLogits(*tensors[-2:])
        beta = {"beta": 0.3} if kind == "js" else {}
        return fastdiv.divergence(student, teacher, kind, temperature=0.8, workspace=8 * 5 * 4, **beta)

    student = (random(3, 4), random(5, 4, seed=1)) if form == "hidden" else (random(3, 5),)
    teacher = (random(3, 4, seed=2), random(5, 4, seed=3)) if form != "logits" else (random(3, 5, seed=2),)
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (*student, *teacher)])


def test_gradcheck_of_linear_loss() -> None:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        return fastdiv.linear_loss(
            fastdiv.LinearLogits(hidden, weight, bias),
            torch.arange(3),
            lambda stats, rows: stats.log_prob.exp() * (1.0 + rows) + stats.reverse_kl**2,
            teacher=other,
            outputs=("log_prob", "reverse_kl"),
            workspace=8 * 5 * 2,
        )

    inputs = (random(3, 4), random(5, 4, seed=1), random(5, seed=2), random(3, 5, seed=3))
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def calls(backend: str, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    own = fastdiv.LinearLogits(x, torch.randn(7, x.shape[1]))
    labels = torch.zeros(x.shape[0], dtype=torch.int64)
    return {
        "log_prob": lambda: fastdiv.log_prob(x, labels, backend=backend).sum(),
        "entropy": lambda: fastdiv.entropy(x, backend=backend).square().sum(),
        "divergence": lambda: fastdiv.divergence(x, torch.zeros_like(x), "js", backend=backend).sum(),
        "hidden": lambda: fastdiv.entropy(own, backend=backend).sum(),
        "linear_loss": lambda: fastdiv.linear_loss(own, labels, lambda s, rows: s.log_prob.exp(), backend=backend),
    }


@pytest.mark.parametrize("name", ["log_prob", "entropy", "divergence", "hidden", "linear_loss"])
def test_second_derivatives_raise(backend: str, name: str) -> None:
    x = torch.randn(3, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(calls(backend, x)[name](), x, create_graph=True)
    # With a term of its own graph: a gradient that passed for a constant would make this silently wrong.
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        (gradient.square().sum() + x.sum()).backward()


def test_second_derivatives_of_functional_transforms_raise(backend: str) -> None:
    inner = torch.func.grad(lambda x: fastdiv.entropy(x, backend=backend))
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.func.grad(lambda x: inner(x).square().sum() + x.sum())(torch.randn(7))


def test_forward_mode_raises(backend: str) -> None:
    x = torch.randn(3, 7)
    with pytest.raises(RuntimeError, match=r"(?i)forward.mode|jvp"):
        torch.func.jvp(lambda x: fastdiv.entropy(x, backend=backend), (x,), (torch.ones_like(x),))


def test_func_grad(backend: str) -> None:
    x = torch.randn(4, 9)
    labels = torch.tensor([1, 2, -100, 8])
    got = torch.func.grad(lambda x: fastdiv.log_prob(x, labels, backend=backend).sum())(x)
    leaf = x.clone().requires_grad_()
    fastdiv.log_prob(leaf, labels, backend=backend).sum().backward()
    assert leaf.grad is not None and torch.equal(got, leaf.grad)


def test_retain_graph_gives_the_same_again(backend: str) -> None:
    for tensors in ((torch.randn(4, 300).requires_grad_(),), head(4, 300, 8)):
        source = tensors[0] if len(tensors) == 1 else fastdiv.LinearLogits(*tensors)
        out = fastdiv.entropy(source, backend=backend).sum()
        first = torch.autograd.grad(out, tensors, retain_graph=True)
        second = torch.autograd.grad(out, tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_some_outputs_used(backend: str) -> None:
    """An output that nothing flows into contributes nothing, not zeros times infinity."""
    x = torch.randn(4, 30)
    x[0] = -torch.inf
    x[0, 3] = 0.0
    x.requires_grad_()
    y = torch.zeros(4, 30)
    stats = fastdiv.token_stats(x, teacher=y, outputs=("entropy", "forward_kl"), backend=backend)
    assert stats.forward_kl[0] == torch.inf
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), x)
    assert torch.isfinite(gradient).all()
    (alone,) = torch.autograd.grad(fastdiv.entropy(x, backend=backend).sum(), x)
    assert torch.equal(gradient, alone)


def test_integer_outputs_carry_no_gradient(backend: str) -> None:
    x = torch.randn(4, 30).requires_grad_()
    stats = fastdiv.token_stats(x, torch.arange(4), outputs=("argmax", "is_top1", "rank", "entropy"), backend=backend)
    assert [stats[name].requires_grad for name in ("argmax", "is_top1", "rank", "entropy")] == [False] * 3 + [True]


@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 3)])
def test_outputs_may_be_written_in_place(backend: str, shape: tuple[int, ...]) -> None:
    lead = (2, 2) if shape == (2, 2) else (4,)
    labels = torch.arange(12)[: torch.Size(shape).numel()].view(shape)
    for tensors in ((torch.randn(*lead, 30).requires_grad_(),), head(4, 30, 8)):
        own = tensors[0] if len(tensors) == 1 else fastdiv.LinearLogits(tensors[0].view(*lead, 8), *tensors[1:])
        stats = fastdiv.token_stats(own, labels, backend=backend)
        keep = torch.zeros(shape, dtype=torch.bool)
        keep[0] = True
        want = torch.autograd.grad((stats.log_prob * keep).sum() + stats.entropy[0].sum(), tensors, retain_graph=True)
        stats.log_prob[~keep] = 0.0
        stats.entropy[1:] = 0.0
        got = torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), tensors)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


class Products:
    """Counts the matrix products that run inside the block."""

    def __enter__(self) -> Products:
        self._profile = torch.autograd.profiler.profile()
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        names = [event.name for event in self._profile.function_events]
        self.count = sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)


@pytest.mark.parametrize(
    ("trained", "backward"),
    [
        ((True, True, True), 3),  # the logits again, hidden's gradient, weight's gradient
        ((True, False, False), 2),
        ((False, True, False), 2),
        ((False, False, True), 1),  # the bias needs no product of its own
    ],
)
def test_products_of_frozen_tensors_are_not_formed(backend: str, trained: tuple[bool, ...], backward: int) -> None:
    tensors = head(6, 50, 8)
    for t, wanted in zip(tensors, trained, strict=True):
        t.requires_grad_(wanted)
    with Products() as forward:
        out = fastdiv.entropy(fastdiv.LinearLogits(*tensors), backend=backend).sum()
    assert forward.count == 1
    with Products() as products:
        out.backward()
    assert products.count == backward
    assert [t.grad is not None for t in tensors] == list(trained)


def test_products_of_linear_loss(backend: str) -> None:
    tensors, teacher = head(6, 50, 8), [t.detach() for t in head(6, 50, 8, seed=1)]
    labels = torch.arange(6)
    with Products() as products:
        fastdiv.linear_loss(fastdiv.LinearLogits(*tensors), labels, lambda s, r: s.log_prob, backend=backend).backward()
    assert products.count == 3
    with Products() as products:
        fastdiv.linear_loss(
            fastdiv.LinearLogits(*tensors),
            None,
            lambda s, r: s.js,
            teacher=fastdiv.LinearLogits(*teacher),
            outputs=("js",),
            backend=backend,
        ).backward()
    assert products.count == 4


def test_frozen_sides_of_a_divergence(backend: str) -> None:
    x, y = torch.randn(3, 40).requires_grad_(), torch.randn(3, 40)
    fastdiv.divergence(x, y, "js", backend=backend).sum().backward()
    assert x.grad is not None and y.grad is None
    fastdiv.divergence(y, x.detach().requires_grad_(), "js", backend=backend).sum().backward()
    assert y.grad is None


def test_no_grad_saves_nothing(backend: str) -> None:
    x = torch.randn(3, 40).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            out = fastdiv.entropy(x, backend=backend)
        assert not out.requires_grad and saved == []
        assert not fastdiv.entropy(x.detach(), backend=backend).requires_grad and saved == []
        assert fastdiv.entropy(x, backend=backend).requires_grad and saved != []


def test_saved_tensors_are_small(backend: str) -> None:
    """Beside the inputs themselves, what waits for the backward is O(tokens)."""
    x = torch.randn(64, 5000).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastdiv.token_stats(x, torch.zeros(64, dtype=torch.int64), outputs=MODEL_OUTPUTS, backend=backend)
    own = [t for t in saved if t.data_ptr() != x.data_ptr()]
    assert len(own) < len(saved)
    assert sum(t.numel() for t in own) <= 64 * 32


def test_checkpointing(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    hidden, weight, bias = head(6, 50, 8)

    def loss(hidden: Tensor) -> Tensor:
        return fastdiv.entropy(fastdiv.LinearLogits(hidden, weight, bias), backend=backend).sum()

    want = torch.autograd.grad(loss(hidden), (hidden, weight))
    got = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_inputs_are_not_changed(backend: str) -> None:
    x, y = torch.randn(3, 40), torch.randn(3, 40)
    copies = x.clone(), y.clone()
    leaves = x.requires_grad_(), y.requires_grad_()
    fastdiv.divergence(*leaves, "tv", backend=backend).sum().backward()
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])
