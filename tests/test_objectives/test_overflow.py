"""Log-ratios whose exponential overflows float32: losses and gradients are float64's, or the largest finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv.objectives import clip_cov, kl_cov, ppo_clip, sampled_kl

Loss = Callable[..., tuple[Tensor, Any]]
LOSSES: dict[str, Loss] = {
    "ppo_clip": ppo_clip,
    "dual_clip": partial(ppo_clip, dual_clip=3.0),
}


def outcome(loss: Loss, log_prob: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    leaf = log_prob.clone().requires_grad_()
    value, _ = loss(leaf, *rest, None)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_an_infinite_ratio(name: str, advantage: float) -> None:
    log_prob, old = torch.tensor([[-0.5, -1.0]]), torch.tensor([[-100.0, -1.1]])
    advantages = torch.tensor([[advantage, 1.0]])
    value, gradient = outcome(LOSSES[name], log_prob, old, advantages)
    exact = outcome(LOSSES[name], *(t.double() for t in (log_prob, old, advantages)))
    most = torch.finfo(torch.float32).max
    for got, want in zip((value, gradient), exact, strict=True):
        assert got.isfinite().all()
        within = want.abs() < most
        torch.testing.assert_close(got[within].double(), want[within], rtol=1e-5, atol=1e-7)
        assert (got[~within].abs() > most / 100).all() and (got[~within].sign() == want[~within].sign()).all()


@pytest.mark.parametrize("loss", [partial(clip_cov, ratio=0.5, seed=0, step=0), partial(kl_cov, ratio=0.5)])
def test_an_infinite_ratio_where_tokens_are_selected(loss: Loss) -> None:
    log_prob, old = torch.tensor([[-0.5, -1.0, -2.0]]), torch.tensor([[-100.0, -1.1, -2.0]])
    value, gradient = outcome(loss, log_prob, old, torch.tensor([[0.0, 1.0, 0.5]]))
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("gradient", ["forward_kl", "reverse_kl", "own"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_an_estimate_of_a_kl_far_below_the_reference(estimator: str, gradient: str) -> None:
    log_prob = torch.tensor([-100.5, -1.0], requires_grad=True)
    loss, _ = sampled_kl(log_prob, torch.tensor([-0.5, -1.1]), estimator=estimator, gradient=gradient)
    (slope,) = torch.autograd.grad(loss, log_prob)
    assert not loss.isnan() and not slope.isnan().any()
