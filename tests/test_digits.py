"""Where numbers cancel: results that keep their digits at inputs which leave other formulas none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import check, token_stats
from torch import Tensor

import fastdiv
from fastdiv.testing import compare, reference

INF, NAN = torch.inf, torch.nan


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, x: Tensor, y: Tensor, kind: str, temperature: float = 1.0) -> None:
    """Under the tolerance rule; float64 against itself."""
    work = got.dtype
    plain, exact = (
        reference(x, teacher=y, outputs=(kind,), temperature=temperature, dtype=d)[kind] for d in (work, torch.float64)
    )
    found = compare(got, plain, exact, ulps=2.0**18 if work == torch.float64 else 4.0)
    assert found, found.text


# Jensen-Shannon with little weight on one model


def _js(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """In float64 without cancellation, as far as 1 - beta has digits."""
    lp, lq = x.double().log_softmax(-1), y.double().log_softmax(-1)
    u, w = (1.0 - beta) * torch.expm1(lp - lq), beta * torch.expm1(lq - lp)
    return (beta * lq.exp() * (u - torch.log1p(u)) + (1.0 - beta) * lp.exp() * (w - torch.log1p(w))).sum(-1)


@pytest.mark.parametrize("beta", [1e-2, 1e-4, 1e-6, 1e-8, 1 - 1e-4, 1 - 1e-6])
@pytest.mark.parametrize("v", [5, 3000])
def test_js_with_a_weight_near_0(backend: str, beta: float, v: int) -> None:
    x, y = random(8, v).requires_grad_(), random(8, v, seed=1).requires_grad_()
    got = fastdiv.divergence(x, y, "js", beta=beta, backend=backend)
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    want = _js(a, b, beta)
    assert (got > 0).all()
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=0.0)
    for g, w in zip(torch.autograd.grad(got.sum(), (x, y)), torch.autograd.grad(want.sum(), (a, b)), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0.0, atol=1e-5 * w.abs().max().item())


# Rows without a distribution in both models

_BROKEN = {"NaN": [NAN, 0.0, 1.0], "all -inf": [-INF] * 3, "+inf": [INF, 0.0, 1.0]}


@pytest.mark.parametrize("student", _BROKEN)
@pytest.mark.parametrize("teacher", _BROKEN)
def test_a_row_that_is_broken_in_both_models(backend: str, student: str, teacher: str) -> None:
    x = torch.tensor([_BROKEN[student], [0.0, 1.0, 2.0]])
    y = torch.tensor([_BROKEN[teacher], [0.0, 2.0, 1.0]])
    for kind in ("js", "tv", "forward_kl", "reverse_kl", "jeffreys"):
        got = fastdiv.divergence(x, y, kind, backend=backend)
        assert got.isnan().tolist() == [True, False], kind


@pytest.mark.parametrize("kind", ["js", "tv", "jeffreys"])
def test_a_teacher_row_of_all_minus_infinity(backend: str, kind: str) -> None:
    """NaN as value and as gradient: whoever trains on it is to see it."""
    x, y = random(2, 1500).requires_grad_(), random(2, 1500, seed=1)
    y[0] = -INF
    got = fastdiv.divergence(x, y, kind, backend=backend)
    assert got.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient[0].isnan().all() and torch.isfinite(gradient[1]).all()


# One flat model and one peaked one


@pytest.mark.parametrize("swapped", [False, True], ids=["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("teacher", ["peaked", "one-hot", "one-hot near the end", "masked at first", "top of a few"])
def test_kl_of_a_flat_and_a_peaked_model(backend: str, teacher: str, swapped: bool) -> None:
    """The textbook's terms are small; sums of exponentials are as large as the vocabulary and must cancel exactly."""
    v = 8000 if backend == "triton" and not torch.cuda.is_available() else 60000
    x, y = random(2, v) * 0.3, random(2, v, seed=1) * 0.3
    if teacher == "peaked":
        y[:, 5] = 20.0
    elif teacher == "masked at first":
        y[:, : v // 2] = -INF
        y[:, -5] = 20.0
    elif teacher == "top of a few":
        y[:, torch.arange(v) % 700 != 699] = -INF
    else:
        y[:, torch.arange(v) != (5 if teacher == "one-hot" else v - 100)] = -INF
    kind = "reverse_kl" if swapped else "forward_kl"
    a, b = (y, x) if swapped else (x, y)
    close(fastdiv.divergence(a, b, kind, backend=backend), a, b, kind)


def test_kl_of_a_masked_teacher_far_from_zero(backend: str) -> None:
    v = 6000
    x = (random(2, v) + 1000).half()
    y = torch.full((2, v), -INF)
    y[:, v - 70] = 3.0
    close(fastdiv.divergence(x, y, "forward_kl", backend=backend), x.float(), y, "forward_kl")


# tests that a kernel's mutations need


def test_probability_where_the_student_has_none_far_below_the_maxima(backend: str) -> None:
    """An infinite term of the first chunk fades when both maxima rise beyond everything."""
    x, y = torch.zeros(1, 3000), torch.zeros(1, 3000)
    x[0, 5] = -INF
    x[0, 2500] = y[0, 2500] = 900.0
    for kind in ("forward_kl", "reverse_kl", "jeffreys"):
        assert fastdiv.divergence(x, y, kind, backend=backend).item() == 0.0, kind


def test_a_teacher_gradient_that_nothing_asks_for(backend: str) -> None:
    """Exactly 0, whatever lay in the memory before."""
    x, y = random(4, 5000).requires_grad_(), random(4, 5000, seed=1).requires_grad_()
    labels = torch.arange(4)
    junk = torch.full_like(y, 7e7)
    stats = fastdiv.token_stats(x, labels, teacher=y, outputs=("log_prob", "tv"), backend=backend)
    del junk
    got = torch.autograd.grad(stats.log_prob.sum(), (x, y), allow_unused=True)
    assert got[1] is None or (got[1] == 0).all()
    check(*token_stats(lambda a: (a,), backend=backend, outputs=("log_prob",), labels=labels), x)


# Both models sure of the same token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
def test_kl_gradient_where_both_models_are_sure(backend: str, kind: str, temperature: float) -> None:
    """About 0: no unit in the last place of the logits' offset is left."""
    x, y = torch.tensor([[27.3, -1.2, 0.4], [4.4, -INF, -INF]]), torch.tensor([[31.9, 0.3, -2.2], [-0.33, -INF, -INF]])
    x.requires_grad_()
    got = fastdiv.divergence(x, y, kind, temperature=temperature, backend=backend)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    want = x.detach().double().requires_grad_()
    exact = reference(want, teacher=y, outputs=(kind,), temperature=temperature)[kind]
    (want,) = torch.autograd.grad(exact.sum(), want)
    assert (gradient.double() - want).abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
def test_kl_gradient_is_0_where_one_id_has_all_the_mass(backend: str, kind: str, temperature: float) -> None:
    """Whatever the two logits are, near each other or not, and however they round."""
    top = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)) * 6.0
    x, y = (torch.full((100, 3), -INF).index_fill(1, torch.tensor(1), 0.0) + t[:, None] for t in top)
    x.requires_grad_(), y.requires_grad_()
    got = fastdiv.divergence(x, y, kind, temperature=temperature, backend=backend)
    assert (got == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(got.sum(), (x, y)))


# Sums and slopes


def test_mean_logit_of_many_equal_logits(backend: str) -> None:
    x = torch.full((1, 151936), 30.1)  # all are rounded the same way
    got = fastdiv.token_stats(x, outputs=("mean_logit",), backend=backend).mean_logit
    plain, exact = (
        reference(x, outputs=("mean_logit",), dtype=d)["mean_logit"] for d in (torch.float32, torch.float64)
    )
    found = compare(got, plain, exact)
    assert found, found.text


def test_a_broken_teacher_row_and_an_upstream_gradient_of_the_student_alone(backend: str) -> None:
    x, y = random(2, 40).requires_grad_(), random(2, 40, seed=1)
    y[0, 3] = NAN
    y.requires_grad_()
    stats = fastdiv.token_stats(x, teacher=y, outputs=("entropy", "forward_kl", "js"), backend=backend)
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), y, allow_unused=True)
    assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("workspace", [0, None])
def test_hidden_states_without_features(backend: str, workspace: int | None) -> None:
    """The bias alone makes the logits."""
    hidden, weight = torch.zeros(2, 3, 0).requires_grad_(), torch.zeros(50, 0).requires_grad_()
    bias = random(50).requires_grad_()
    student = fastdiv.LinearLogits(hidden, weight, bias)
    got = fastdiv.entropy(student, backend=backend, workspace=workspace)
    torch.testing.assert_close(got, reference(student, outputs=("entropy",))["entropy"].float())
    gradients = torch.autograd.grad(got.sum(), (hidden, weight, bias))
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape, bias.shape]


def test_many_labels_of_a_token_cost_no_more_than_their_number() -> None:
    """`reference` once compared each with each: 256 MB here."""
    k = 4000
    x, labels = random(4, 50, seed=1).requires_grad_(), torch.arange(4 * k).reshape(4, k) % 50
    with torch.profiler.profile(profile_memory=True) as seen:
        fastdiv.log_prob(x, labels, backend="reference").sum().backward()
    assert max(abs(event.cpu_memory_usage) for event in seen.events()) < 4 << 20
    a = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(a.log_softmax(-1).gather(-1, labels).sum(), a)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-5, atol=1e-3)


def test_slope_of_a_saturated_softcap(backend: str) -> None:
    """Every gradient has its digits, where it is a millionth of what it would be without the cap."""
    capped = torch.linspace(5.0, 9.0, 400)[None] * torch.tensor([[30.0], [-30.0]])

    def gradients(student: Tensor, teacher: Tensor, run: Callable[..., Any], **options: Any) -> tuple[Tensor, ...]:
        own, other = student.requires_grad_(), teacher.requires_grad_()
        caps = fastdiv.Logits(own, softcap=30.0), fastdiv.Logits(other, softcap=30.0)
        plain = fastdiv.Logits(random(2, 400).to(student.dtype))
        value = run(caps[0], outputs=("logsumexp",), **options)["logsumexp"].sum()
        value = value + run(plain, teacher=caps[1], outputs=("reverse_kl",), **options)["reverse_kl"].sum()
        return torch.autograd.grad(value, (own, other))

    got = gradients(capped.clone(), capped.clone(), fastdiv.token_stats, backend=backend)
    want = gradients(capped.double(), capped.double(), reference)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-12)  # the smallest is 2e-10
