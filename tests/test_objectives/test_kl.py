"""Sampled KL: golden numbers, what each gradient is (by enumeration), clamps, small and large ratios."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from fastdiv.objectives import sampled_kl


def gradient_of(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at)[0]


def tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("clamp", [None, "verl"])
def test_golden(estimator: str, clamp: str | None, golden: dict[str, Any], fixture_a: dict[str, Tensor]) -> None:
    log_prob, ref, mask = (fixture_a[name] for name in ("logp", "ref", "mask"))
    loss, metrics = sampled_kl(log_prob, ref, mask, estimator=estimator, clamp=clamp)
    assert loss.item() == pytest.approx(golden[f"kl/{estimator}/token_mean"], rel=1e-8)
    assert metrics["kl"].item() == loss.item() and metrics["tokens"].item() == 7
    gradient = gradient_of(loss, log_prob)
    if estimator == "abs":
        expected = torch.where(mask, (log_prob - ref).sign(), 0) / 7
    else:
        expected = tensor(golden[f"kl/{estimator}/grad_logp"])
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=0)


def test_golden_tokens(golden: dict[str, Any], fixture_a: dict[str, Tensor]) -> None:
    values, _ = sampled_kl(fixture_a["logp"], fixture_a["ref"], fixture_a["mask"], aggregation="none")
    torch.testing.assert_close(values.detach(), tensor(golden["kl/k3/tokens"]), rtol=1e-8, atol=0)


def test_golden_straight_through(golden: dict[str, Any], fixture_a: dict[str, Tensor]) -> None:
    """The value of one estimator with the gradient of another."""
    log_prob, ref, mask = (fixture_a[name] for name in ("logp", "ref", "mask"))
    for gradient, key in (("reverse_kl", "kl/k3+/grad_logp"), ("forward_kl", "kl/k3/grad_logp")):
        for estimator in ("k1", "k2", "k3", "abs"):
            loss, _ = sampled_kl(log_prob, ref, mask, estimator=estimator, gradient=gradient)
            assert loss.item() == pytest.approx(golden[f"kl/{estimator}/token_mean"], rel=1e-8)
            torch.testing.assert_close(gradient_of(loss, log_prob), tensor(golden[key]), rtol=1e-8, atol=0)


def test_golden_off_policy(golden: dict[str, Any], fixture_a: dict[str, Tensor]) -> None:
    log_prob, ref, mask, old = (fixture_a[name] for name in ("logp", "ref", "mask", "old"))
    loss, _ = sampled_kl(log_prob, ref, mask, old_log_prob=old)
    assert loss.item() == pytest.approx(golden["kl/k3_times_ratio/value"], rel=1e-8)
    expected = tensor(golden["kl/k3_times_ratio/grad_logp"])
    torch.testing.assert_close(gradient_of(loss, log_prob), expected, rtol=1e-8, atol=0)


@pytest.fixture
def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, log-probabilities of a reference and of an older policy, over seven tokens."""
    logits, ref, old = torch.randn(3, 7, dtype=torch.float64).unbind()
    return logits.requires_grad_(), ref.log_softmax(0), old.log_softmax(0)


def true_gradient(which: str, logits: Tensor, ref: Tensor) -> Tensor:
    lp = logits.log_softmax(0)
    if which == "zero":
        return torch.zeros_like(logits)
    kl = (lp.exp() * (lp - ref)).sum() if which == "reverse_kl" else (ref.exp() * (ref - lp)).sum()
    return gradient_of(kl, logits)


@pytest.mark.parametrize(
    ("estimator", "gradient", "is_gradient_of"),
    [
        ("k1", "own", "zero"),
        ("k2", "own", "reverse_kl"),
        ("k3", "own", "forward_kl"),
        ("k1", "reverse_kl", "reverse_kl"),
        ("k3", "reverse_kl", "reverse_kl"),
        ("abs", "forward_kl", "forward_kl"),
    ],
)
def test_expected_gradient_on_policy(
    estimator: str, gradient: str, is_gradient_of: str, policies: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The expectation over the policy's tokens, exactly: every token once, weighted by its probability."""
    logits, ref, _ = policies
    lp = logits.log_softmax(0)
    values, _ = sampled_kl(lp, ref, estimator=estimator, gradient=gradient, aggregation="none")
    expected = true_gradient(is_gradient_of, logits, ref)
    got = gradient_of((lp.detach().exp() * values).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("estimator", "gradient", "is_gradient_of"),
    [
        ("k1", "own", "reverse_kl"),
        ("k3", "own", "reverse_kl"),
        ("k2", "reverse_kl", "reverse_kl"),
        ("k3", "reverse_kl", "reverse_kl"),
        ("k3", "forward_kl", "forward_kl"),
    ],
)
def test_expected_gradient_off_policy(
    estimator: str, gradient: str, is_gradient_of: str, policies: tuple[Tensor, Tensor, Tensor]
) -> None:
    logits, ref, old = policies
    values, _ = sampled_kl(
        logits.log_softmax(0),
        ref,
        estimator=estimator,
        gradient=gradient,
        old_log_prob=old,
        aggregation="none",
    )
    expected = true_gradient(is_gradient_of, logits, ref)
    got = gradient_of((old.exp() * values).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_unbiased_values(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ref, old = policies
    lp = logits.detach().log_softmax(0)
    kl = (lp.exp() * (lp - ref)).sum()
    for estimator in ("k1", "k3"):
        on, _ = sampled_kl(lp, ref, estimator=estimator, aggregation="none")
        off, _ = sampled_kl(lp, ref, estimator=estimator, old_log_prob=old, aggregation="none")
        torch.testing.assert_close((lp.exp() * on).sum(), kl)
        torch.testing.assert_close((old.exp() * off).sum(), kl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_keeps_its_digits(dtype: torch.dtype) -> None:
    """e^-d + d - 1 loses everything for small d when written so; both sides of 0.1 are covered."""
    d = torch.tensor([1e-12, -1e-7, 1e-5, -3e-4, 0.01, -0.0999, 0.0999, 0.1001, -0.1001, 0.7, -5.0], dtype=dtype)
    values, _ = sampled_kl(d, torch.zeros_like(d), aggregation="none")
    mpmath.mp.dps = 60
    exact = [float(mpmath.expm1(-mpmath.mpf(x)) + mpmath.mpf(x)) for x in d.tolist()]
    tolerance = 40 * torch.finfo(dtype).eps  # the far branch keeps 1 / (0.1 / 2) of the digits
    torch.testing.assert_close(values, torch.tensor(exact, dtype=dtype), rtol=tolerance, atol=0)


def test_gradient_is_finite_wherever_the_value_is() -> None:
    log_prob = torch.tensor([-1e-9, -80.0, -1e6, -0.05], requires_grad=True)
    ref = torch.tensor([-1e6, -1e-9, -1e-9, -0.05])
    for clamp in (None, "verl"):
        keep = torch.tensor([True, True, clamp is not None, True])  # e^1000000 is infinite without the clamp
        loss, _ = sampled_kl(log_prob, ref, keep, clamp=clamp)
        assert loss.isfinite() and gradient_of(loss, log_prob).isfinite().all()


def test_clamp_cuts_the_gradient_where_it_says() -> None:
    ref = torch.zeros(5, dtype=torch.float64)
    log_prob = torch.tensor([-2.62, -2.61, 10.9, 11.1, 25.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = sampled_kl(log_prob, ref, clamp="verl", aggregation="none")
    assert (gradient_of(loss.sum(), log_prob) == 0).tolist() == [True, False, False, True, True]
    assert loss.max().item() == 10 and metrics["clamped_fraction"].item() == pytest.approx(0.6)
    straight, _ = sampled_kl(log_prob, ref, clamp="verl", gradient="reverse_kl", aggregation="none")
    assert torch.equal(straight, loss)
    assert torch.equal(gradient_of(straight.sum(), log_prob), log_prob.detach())
    _, metrics = sampled_kl(log_prob, ref, estimator="k1", clamp="verl")
    assert metrics["clamped_fraction"].item() == 0


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("gradient", ["own", "reverse_kl", "forward_kl"])
def test_masked_tokens_are_never_read(garbage: float, gradient: str, fixture_a: dict[str, Tensor]) -> None:
    mask = fixture_a["mask"]
    results = []
    for fill in (0.0, garbage):
        log_prob, ref, old = (fixture_a[name].detach().masked_fill(~mask, fill) for name in ("logp", "ref", "old"))
        log_prob.requires_grad_()
        loss, metrics = sampled_kl(log_prob, ref, mask, gradient=gradient, old_log_prob=old)
        results.append([loss.detach(), gradient_of(loss, log_prob), *metrics.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_references_are_constants(fixture_a: dict[str, Tensor]) -> None:
    ref, old = fixture_a["ref"].requires_grad_(), fixture_a["old"].requires_grad_()
    loss, metrics = sampled_kl(fixture_a["logp"], ref, fixture_a["mask"], old_log_prob=old)
    assert torch.autograd.grad(loss, [ref, old], allow_unused=True) == (None, None)
    assert not any(value.requires_grad or value.dim() for value in metrics.values())


def test_nothing_valid(fixture_a: dict[str, Tensor]) -> None:
    mask = torch.zeros_like(fixture_a["mask"])
    loss, _ = sampled_kl(fixture_a["logp"], fixture_a["ref"], mask)
    assert loss.item() == 0 and not gradient_of(loss, fixture_a["logp"]).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "k4"}, ValueError, "unknown estimator 'k4'.*; known are k1, k2, k3, abs"),
        ({"gradient": "kl"}, ValueError, "unknown gradient 'kl'; known are own, reverse_kl, forward_kl"),
        ({"clamp": "trl"}, ValueError, "clamp must be 'verl' or None, got 'trl'"),
        ({"ref_log_prob": torch.zeros(2, 4)}, TypeError, "ref_log_prob must have the dtype of log_prob"),
        ({"log_prob": torch.zeros(2, 4).bfloat16()}, TypeError, "log_prob must be float32 or float64"),
        (
            {"old_log_prob": torch.zeros(4).double()},
            ValueError,
            "old_log_prob must have the shape of log_prob",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str, fixture_a: dict[str, Tensor]) -> None:
    arguments = {"log_prob": fixture_a["logp"], "ref_log_prob": fixture_a["ref"], "mask": fixture_a["mask"]}
    with pytest.raises(error, match="sampled_kl: " + message):
        sampled_kl(**arguments | change)
