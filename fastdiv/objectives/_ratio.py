"""What the policy losses share: checked tokens with their ratio, the clipped pair of losses, the metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv.objectives import aggregate
from fastdiv.ops.covariance import check_bool, check_tokens

LOG_RATIO_BOUND = 20.0


def saturated(x: Tensor) -> Tensor:
    """x where e^x is finite, else the largest such number, with the gradient of x.

    e^x and its derivative then are the dtype's largest numbers in place of infinity, whose product with 0 (a clipped
    loss, an advantage of 0) would be NaN.
    """
    most = math.log(torch.finfo(x.dtype).max)
    most = math.nextafter(most, 0.0) if x.dtype == torch.float64 else most * (1 - torch.finfo(x.dtype).eps)
    return torch.where(x > most, most + (x - x.detach()), x)


class RatioTokens(NamedTuple):
    valid: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    extreme: Tensor


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
    log_ratio = torch.where(valid, log_prob, 0) - torch.where(valid, old.detach(), 0)
    extreme = log_ratio.abs() > LOG_RATIO_BOUND
    if clamped:
        log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return RatioTokens(
        valid, log_ratio, saturated(log_ratio).exp(), torch.where(valid, advantages.detach(), 0), extreme
    )


def surrogates(tokens: RatioTokens, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    clipped_ratio = tokens.ratio.clamp(1 - clip_low, 1 + clip_high)
    return -tokens.advantages * tokens.ratio, -tokens.advantages * clipped_ratio


def check_clip(operator: str, clip_low: float, clip_high: float) -> None:
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not bound >= 0:
            raise ValueError(f"{operator}: {name} must not be negative, got {bound}")


def check_selected(operator: str, selected: Tensor, tokens: RatioTokens) -> Tensor:
    check_bool(operator, "selected", selected)
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


def ratio_metrics(tokens: RatioTokens) -> dict[str, Tensor]:
    return {
        "ratio": aggregate.token_mean(tokens.ratio.detach(), tokens.valid),
        "kl": aggregate.token_mean(-tokens.log_ratio.detach(), tokens.valid),
        "tokens": tokens.valid.sum(),
    }
