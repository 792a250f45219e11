"""Log-ratios whose exponential float32, or even float64, cannot hold: values and gradients are the true ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv.objectives import clip_cov, kl_cov, ppo_clip, sampled_kl

INF = math.inf
NOBODY = torch.zeros(1, 2, dtype=torch.bool)
LOSSES: dict[str, Callable[..., Any]] = {
    "ppo_clip": ppo_clip,
    "verl": lambda *t: ppo_clip(*t, clamp="verl"),
    "dual_clip": lambda *t: ppo_clip(*t, dual_clip=3.0),
    "clip_cov": lambda *t: clip_cov(*t, selected=NOBODY),
    "clip_cov, selected": lambda *t: clip_cov(*t, selected=~NOBODY),
    "kl_cov": lambda *t: kl_cov(*t, selected=NOBODY),
    "kl_cov, selected": lambda *t: kl_cov(*t, selected=~NOBODY),
}


def run(loss_of: Callable[..., Any], tensors: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = tensors[0].clone().requires_grad_()
    loss, metrics = loss_of(x, *tensors[1:])
    assert loss.dtype == x.dtype and all(m.dtype in (x.dtype, torch.int64) for m in metrics.values())
    return loss.detach(), torch.autograd.grad(loss, x)[0], metrics


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0, 1e-8, -1e-8])
@pytest.mark.parametrize("old", [-60.0, -89.1, -100.0, -500.0])
def test_float32_gives_what_float64_gives(name: str, advantage: float, old: float) -> None:
    tensors = [torch.tensor(t) for t in ([[-0.5, -1.0]], [[old, -1.1]], [[advantage, 1.0]])]
    got = run(LOSSES[name], tensors)
    want = run(LOSSES[name], [t.double() for t in tensors])
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=0)
    for key, value in want[2].items():
        torch.testing.assert_close(got[2][key].double(), value.float().double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("old", [-1000.0, -INF])
def test_what_float64_cannot_hold(dtype: torch.dtype, old: float) -> None:
    """Above 709 the clip and an advantage of 0 still decide; what nothing bounds is infinite."""

    def at(loss_of: Callable[..., Any], advantage: float) -> tuple[float, float]:
        tensors = [torch.tensor([[v]], dtype=dtype) for v in (-0.5, old, advantage)]
        loss, gradient, _ = run(loss_of, tensors)
        return loss.item(), gradient.item()

    assert at(ppo_clip, 1.0) == (pytest.approx(-1.2), 0.0)
    assert at(ppo_clip, 0.0) == (0.0, 0.0)
    assert at(LOSSES["dual_clip"], -1.0) == (3.0, 0.0)
    nobody = NOBODY[:, :1]
    assert at(lambda *t: clip_cov(*t, selected=~nobody), -1.0) == (0.0, 0.0)
    assert at(lambda *t: kl_cov(*t, selected=nobody), 0.0) == (0.0, 0.0)
    assert at(lambda *t: kl_cov(*t, selected=~nobody), 0.0) == (-0.5 - old, 1.0)
    loss, gradient = at(ppo_clip, -1.0)
    assert loss > 1e300 and gradient > 1e300


@pytest.mark.parametrize("old", [-1.0, -100.0, None])
@pytest.mark.parametrize("gradient", ["own", "reverse_kl", "forward_kl"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("d", [-100.0, -89.0, 100.0])
def test_sampled_kl_far_from_the_reference(d: float, estimator: str, gradient: str, old: float | None) -> None:
    x = torch.tensor([[-1.0 + min(d, 0.0), -1.0]])
    ref = torch.tensor([[-1.0 - max(d, 0.0), -1.5]])

    def loss_of(x: Tensor, ref: Tensor) -> Any:
        before = None if old is None else torch.full_like(x, old)
        return sampled_kl(x, ref, estimator=estimator, gradient=gradient, old_log_prob=before)

    got, want = run(loss_of, [x, ref]), run(loss_of, [x.double(), ref.double()])
    for a, b in zip(got[:2], want[:2], strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ref", [0.0, -INF])
@pytest.mark.parametrize("estimator", ["k1", "k2", "abs"])
def test_a_straight_through_gradient_changes_no_value(dtype: torch.dtype, ref: float, estimator: str) -> None:
    """Not even where the slope is infinite: it stands before a difference that is 0."""
    tensors = [torch.tensor([[v]], dtype=dtype) for v in (-1000.0, ref)]
    own, _, _ = run(lambda *t: sampled_kl(*t, estimator=estimator), tensors)
    for gradient, sign in (("forward_kl", 1.0 if ref else -INF), ("reverse_kl", INF if ref else -1000.0)):
        value, slope, _ = run(lambda *t, g=gradient: sampled_kl(*t, estimator=estimator, gradient=g), tensors)
        assert value == own
        assert slope.item() == sign or (abs(slope.item()) > 1e300 and slope.sign().item() == math.copysign(1.0, sign))
