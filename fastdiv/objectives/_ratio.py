"""What the policy losses share: checked tokens with their ratio, the clipped pair of losses, the metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv import accept
from fastdiv.objectives import aggregate
from fastdiv.ops.covariance import check_tokens

LOG_RATIO_BOUND = 20.0

_LARGEST_EXPONENT = 700.0  # e^700 is finite in float64, and far from finite in float32


class RatioTokens(NamedTuple):
    """Float64 whatever the inputs: beyond a log-ratio of 88 a loss may be finite where a float32 ratio is not."""

    valid: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    extreme: Tensor


def wide(valid: Tensor, values: Tensor) -> Tensor:
    """In float64, 0 at other than valid tokens.  Once per tensor, so that its gradients add up before they are rounded:
    in float32 two that cancel could both be infinite."""
    return torch.where(valid, values, 0).double()


def finite_exp(x: Tensor, source: Tensor) -> Tensor:
    """e^x, but e^700 above: what multiplies it by 0, a derivative among them, gets 0 and not NaN.

    `source` is what x has its gradient from, with a derivative of 1; so has the exponent above 700.
    """
    above = _LARGEST_EXPONENT + (source - source.detach())
    return torch.where(x > _LARGEST_EXPONENT, above, x).exp()


def ratio_tokens(
    operator: str,
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clamped: bool = False,
) -> RatioTokens:
    """Checked inputs; masked tokens get neutral values before any exp, so that garbage cannot spread."""
    tensors = {"log_prob": log_prob, "old_log_prob": old, "advantages": advantages}
    valid = check_tokens(operator, mask, tensors)
    log_prob = wide(valid, log_prob)
    log_ratio = log_prob - wide(valid, old.detach())
    extreme = log_ratio.abs() > LOG_RATIO_BOUND
    if clamped:
        log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = finite_exp(log_ratio, log_prob)
    return RatioTokens(valid, log_ratio, ratio, wide(valid, advantages.detach()), extreme)


def surrogates(tokens: RatioTokens, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    clipped_ratio = tokens.ratio.clamp(1 - clip_low, 1 + clip_high)
    return -tokens.advantages * tokens.ratio, -tokens.advantages * clipped_ratio


def check_clip(operator: str, clip_low: float, clip_high: float) -> None:
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        accept.bounded(operator, name, bound, 0.0, "not be negative")


def check_selected(operator: str, selected: Tensor, tokens: RatioTokens) -> Tensor:
    selected = accept.mask(operator, "selected", selected)
    if selected.shape != tokens.valid.shape:
        raise ValueError(
            f"{operator}: selected must have the shape of log_prob, {list(tokens.valid.shape)}, "
            f"got {list(selected.shape)}"
        )
    return selected & tokens.valid


def fraction(where: Tensor, tokens: RatioTokens) -> Tensor:
    return aggregate.token_mean(where.to(tokens.ratio.dtype), tokens.valid)


def clip_fractions(tokens: RatioTokens, plain: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    decides = clipped > plain
    return {
        "clip_fraction_low": fraction(decides & (tokens.ratio < 1), tokens),
        "clip_fraction_high": fraction(decides & (tokens.ratio > 1), tokens),
    }


def rounded(like: Tensor, loss: Tensor, metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics in the dtype of `like`; counts stay."""
    return loss.to(like.dtype), {k: v.to(like.dtype) if v.is_floating_point() else v for k, v in metrics.items()}


def ratio_metrics(tokens: RatioTokens) -> dict[str, Tensor]:
    return {
        "ratio": aggregate.token_mean(tokens.ratio.detach(), tokens.valid),
        "kl": aggregate.token_mean(-tokens.log_ratio.detach(), tokens.valid),
        "tokens": tokens.valid.sum(),
    }
