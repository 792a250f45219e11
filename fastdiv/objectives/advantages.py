"""Advantages from the rewards of a group of responses to one prompt: one number each, without gradient.

Statistics are taken in float64: a group of equal rewards then gives 0 and not rounding noise divided by a
tiny standard deviation. A group of one has no baseline: its advantage is its reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiv import accept
from fastdiv.objectives._registry import objective


@objective("advantage", prefix="advantages.", paper="DeepSeekMath (GRPO)", arxiv="2402.03300")
@torch.no_grad()
def grpo(rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean of the group) / (standard deviation of the group + eps).

    The standard deviation has the divisor n - 1.

    Arguments:
        rewards: [responses], float32 or float64.
        group_ids: [responses], integers, equal for responses to the same prompt; groups may differ in size.
        eps: added to the standard deviation.

    Returns:
        [responses], dtype of rewards. A group of one gives R / (1 + eps).

    Raises:
        TypeError, ValueError: wrong dtype or shape, eps negative.

    Source: arXiv 2402.03300.
    """
    if accept.number("grpo", "eps", eps) < 0:
        raise ValueError(f"grpo: eps must not be negative, got {eps}")
    centred, members, size = _centred("grpo", rewards, group_ids)
    squares = torch.zeros_like(size, dtype=torch.float64).index_add_(0, members, centred.square())
    deviation = torch.where(size > 1, (squares / (size - 1).clamp(min=1)).sqrt(), 1.0)[members]
    return (centred / (deviation + eps)).to(rewards.dtype)


@objective(
    "advantage",
    prefix="advantages.",
    paper="Understanding R1-Zero-Like Training (Dr. GRPO)",
    arxiv="2503.20783",
)
@torch.no_grad()
def dr_grpo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = R_i - mean of the group.

    Arguments and result as `grpo`; a group of one gives R.

    Source: arXiv 2503.20783.
    """
    return _centred("dr_grpo", rewards, group_ids)[0].to(rewards.dtype)


@objective(
    "advantage",
    prefix="advantages.",
    paper="Back to Basics: REINFORCE Style Optimization (RLOO)",
    arxiv="2402.14740",
)
@torch.no_grad()
def rloo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = R_i - mean of the other responses of the group.

    Arguments and result as `grpo`; a group of one gives R.

    Source: arXiv 2402.14740.
    """
    centred, members, size = _centred("rloo", rewards, group_ids)
    size = size.double()  # a quotient of integers would be float32
    return (centred * (size / (size - 1).clamp(min=1))[members]).to(rewards.dtype)


def _centred(operator: str, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards minus the baseline of their group in float64, group number of each response, size of each
    group."""
    if rewards.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operator}: rewards must be float32 or float64, got {rewards.dtype}")
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"{operator}: group_ids must be integers, got {group_ids.dtype}")
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"{operator}: rewards and group_ids must be [responses], "
            f"got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    _, members, size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    totals = torch.zeros_like(size, dtype=torch.float64).index_add_(0, members, rewards.double())
    baseline = torch.where(size > 1, totals / size, 0.0)[members]
    return rewards.double() - baseline, members, size
