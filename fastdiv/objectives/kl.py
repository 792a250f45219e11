"""Estimates of the divergence to a reference from the sampled token alone (no pass over the vocabulary)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiv import accept
from fastdiv.objectives import aggregate
from fastdiv.objectives._ratio import LOG_RATIO_BOUND, finite_exp, rounded, wide
from fastdiv.objectives._registry import objective
from fastdiv.ops.covariance import check_tokens

ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("own", "reverse_kl", "forward_kl")

_K3_BOUND = 10.0


@objective("kl", paper="Approximating KL Divergence (Schulman, 2020)", arxiv=None)
def sampled_kl(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str = "k3",
    gradient: str = "own",
    old_log_prob: Tensor | None = None,
    clamp: str | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    length: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(policy || reference) estimated at sampled tokens; its value and its gradient are chosen apart.

    With d = log_prob - ref_log_prob at the sampled token:

    | estimator | value | its own expected gradient, tokens sampled from the policy |
    | --- | --- | --- |
    | k1 | d | zero: as a loss it does nothing |
    | k2 | d^2 / 2 | that of the reverse KL(policy || reference); the value is biased |
    | k3 | e^-d + d - 1 | that of the FORWARD KL(reference || policy); the value is unbiased |
    | abs | abs(d) | E[sign(d) * grad log_prob]: that of no KL |

    `gradient` can keep the value and take another gradient (straight-through):

    - "reverse_kl": d * grad log_prob, that of k2, unbiased for the gradient of KL(policy || reference);
    - "forward_kl": (1 - e^-d) * grad log_prob, that of k3, unbiased for that of KL(reference || policy).

    For tokens sampled from an older policy give `old_log_prob`: values are multiplied by the ratio
    e^(log_prob - old). With "own" the ratio carries gradient, and k1 and k3 both become unbiased for the
    gradient of KL(policy || reference). With the other two it is a constant, and what they say still holds.

    Arguments:
        log_prob: [*], float32 or float64, nats; carries the gradient.
        ref_log_prob, old_log_prob: [*], same dtype; constants.
        mask: [*], bool; None: all valid.
        estimator: k1, k2, k3 or abs.
        gradient: own, reverse_kl or forward_kl.
        clamp: None, or "verl": in k3 only, d to [-20, 20] and the value to at most 10. Its own gradient is
            then exactly 0 for d < -2.61 and d > 11, where the pull to the reference is needed most; a
            straight-through gradient is not cut, but computed from the clamped d.
        aggregation, normalizer, length: see `aggregate.reduce`; "none" returns the values [*].

    Returns:
        loss, and metrics: `kl` (mean value over the valid tokens), `clamped_fraction`, `tokens`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or name.

    Source: Schulman, "Approximating KL Divergence", 2020 (k1, k2, k3); "own" k3 as a loss is Eq. 4 of
    DeepSeekMath, arXiv 2402.03300.
    """
    tensors = {"log_prob": log_prob, "ref_log_prob": ref_log_prob}
    if old_log_prob is not None:
        tensors["old_log_prob"] = old_log_prob
    valid = check_tokens("sampled_kl", mask, tensors)
    for name, choice, choices in (("estimator", estimator, ESTIMATORS), ("gradient", gradient, GRADIENTS)):
        accept.name("sampled_kl", name, choice, choices)
    if clamp not in (None, "verl"):
        raise ValueError(f"sampled_kl: clamp must be 'verl' or None, got {clamp!r}")

    # float64: a slope or a ratio that float32 does not hold would turn what it multiplies into NaN
    current = wide(valid, log_prob)
    d = current - wide(valid, ref_log_prob.detach())
    if clamp == "verl":
        bounded = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        raw_k3 = _exp_minus_tangent(-bounded)
        k3, clamped = raw_k3.clamp(max=_K3_BOUND), (d.abs() > LOG_RATIO_BOUND) | (raw_k3 > _K3_BOUND)
    else:
        bounded, k3, clamped = d, _exp_minus_tangent(-d), torch.zeros_like(valid)
    value = {"k1": d, "k2": d.square() / 2, "k3": k3, "abs": d.abs()}[estimator]

    if gradient != "own":
        slope = d if gradient == "reverse_kl" else -torch.expm1(-bounded)
        limit = torch.finfo(slope.dtype).max
        value = value.detach() + slope.detach().clamp(-limit, limit) * (current - current.detach())
    if old_log_prob is not None:
        ratio = finite_exp(current - wide(valid, old_log_prob.detach()), current)
        value = value * (ratio if gradient == "own" else ratio.detach())

    loss = aggregate.reduce(value, valid, aggregation, normalizer=normalizer, length=length)
    if estimator != "k3":
        clamped = torch.zeros_like(valid)
    metrics = {
        "kl": aggregate.token_mean(value.detach(), valid),
        "clamped_fraction": aggregate.token_mean(clamped.to(value.dtype), valid),
        "tokens": valid.sum(),
    }
    return rounded(log_prob, loss, metrics)


def _exp_minus_tangent(x: Tensor) -> Tensor:
    """e^x - 1 - x >= 0; near 0, where that difference would cancel, by its series."""
    small = x.abs() < 0.1
    # the series must not overflow where it is not used: its gradient would be 0 * inf there
    near = torch.where(small, x, 0)
    series = torch.zeros_like(x)
    for n in range(12, 1, -1):  # Horner: x^2/2 (1 + x/3 (1 + x/4 (...))); 11 terms reach float64 at 0.1
        series = (1 + series) * near / n if n > 2 else (1 + series) * near.square() / 2
    return torch.where(small, series, torch.expm1(x) - x)
