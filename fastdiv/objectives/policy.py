"""Policy-gradient losses: the clipped ratio, and two that hold entropy up through the covariance of tokens.

All take (log_prob, old_log_prob, advantages, mask), return (loss, metrics), and are to be minimised.
r = e^(log_prob - old) is the ratio, A the advantage, C = `fastdiv.masked_covariance(A, log_prob).per_token`.
Gradient flows through `log_prob` alone. How token losses become one number is said by `aggregation`,
`normalizer` and `length`: see `aggregate`.

Clip-Cov and KL-Cov select tokens by their rank in a *scope* before anything is differentiated. Without
`selected` the scope is the tokens of the call. For a scope that does not depend on how the batch is cut,
work in two phases:

    selected = kl_cov_select(window_log_prob, window_advantages, window_mask, **KL_COV_7B.select)
    for part, chosen in zip(micro_batches, split(selected)):
        loss, metrics = kl_cov(*part, selected=chosen, normalizer=window_tokens, **KL_COV_7B.loss)

The window's log-probabilities are those of the current policy, from a pass without gradient (in the first
update on fresh samples the old ones are the same); a process group extends the window over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiv import accept, select
from fastdiv.objectives import aggregate
from fastdiv.objectives._ratio import (
    check_clip,
    check_selected,
    clip_fractions,
    fraction,
    ratio_metrics,
    ratio_tokens,
    rounded,
    surrogates,
)
from fastdiv.objectives._registry import objective
from fastdiv.ops.covariance import check_tokens, masked_covariance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ENTROPY_MECHANISM = "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models"


@dataclass(frozen=True)
class Preset:
    """Keyword arguments of a paper's experiment, for the selection and for the loss."""

    select: Mapping[str, float]
    loss: Mapping[str, float]


def _preset(select: dict[str, float], loss: dict[str, float]) -> Preset:
    return Preset(MappingProxyType(select), MappingProxyType(loss))


PPO = _preset({}, {"clip_low": 0.2, "clip_high": 0.2})
DAPO = _preset({}, {"clip_low": 0.2, "clip_high": 0.28})
# The published runs widen the clip to [0, 2], so that the covariance does the work.
CLIP_COV = _preset(
    {"ratio": 2e-4, "covariance_low": 1.0, "covariance_high": 5.0, "clip_low": 1.0, "clip_high": 1.0},
    {"clip_low": 1.0, "clip_high": 1.0},
)
KL_COV_7B = _preset({"ratio": 2e-3}, {"beta": 1.0})
KL_COV_32B = _preset({"ratio": 2e-4}, {"beta": 1.0})


@objective("policy", paper="Proximal Policy Optimization Algorithms", arxiv="1707.06347")
def ppo_clip(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | Tensor | None = None,
    clamp: str | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    length: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO: token loss max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    Its gradient with respect to log_prob is -A r, and 0 where the clip decides. With `dual_clip` c the loss
    of a token of negative advantage is at most -A c, with gradient 0 there.

    Arguments:
        log_prob: [*], float32 or float64, nats; carries the gradient.
        old_log_prob, advantages: [*], same dtype; constants.
        mask: [*], bool; None: all valid. What stands at masked tokens changes neither loss nor gradient.
        clip_low, clip_high: >= 0; 0.2 and 0.2 in PPO, 0.2 and 0.28 in DAPO (presets PPO, DAPO).
        dual_clip: > 1, or None.
        clamp: None, or "verl": log r is clamped to [-20, 20]; beyond, the gradient is 0. Without it the loss of
            a token whose log r is above 88 is infinite in float32 where no clip bounds it; where one does, or
            where A is 0, loss and gradient are what they should be.
        aggregation, normalizer, length: see `aggregate.reduce`; "none" returns token losses [*].

    Returns:
        loss, and metrics: `ratio` (mean), `kl` (mean of old - current), `clip_fraction_low`,
        `clip_fraction_high`, `dual_clip_fraction`, `clamped_fraction` (log r beyond [-20, 20], clamped or
        not), `tokens`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.

    Source: arXiv 1707.06347, Eq. 7; arXiv 2503.14476 (two bounds); arXiv 1912.09729 (dual clip).
    """
    check_clip("ppo_clip", clip_low, clip_high)
    if dual_clip is not None:
        dual_clip = accept.bounded("ppo_clip", "dual_clip", dual_clip, 1.0, "be greater than 1", strictly=True)
    if clamp not in (None, "verl"):
        raise ValueError(f"ppo_clip: clamp must be 'verl' or None, got {clamp!r}")
    tokens = ratio_tokens("ppo_clip", log_prob, old_log_prob, advantages, mask, clamped=clamp == "verl")
    plain, clipped = surrogates(tokens, clip_low, clip_high)
    losses = torch.maximum(plain, clipped)
    bounded = torch.zeros_like(tokens.valid)
    if dual_clip is not None:
        ceiling = -tokens.advantages * dual_clip
        bounded = (tokens.advantages < 0) & (losses > ceiling)
        losses = torch.where(bounded, ceiling, losses)
    metrics = ratio_metrics(tokens) | clip_fractions(tokens, plain, clipped)
    metrics["dual_clip_fraction"] = fraction(bounded, tokens)
    metrics["clamped_fraction"] = fraction(tokens.extreme, tokens)
    loss = aggregate.reduce(losses, tokens.valid, aggregation, normalizer=normalizer, length=length)
    return rounded(log_prob, loss, metrics)


def clip_cov_select(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    seed: int,
    step: int,
    index: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The tokens Clip-Cov takes out of the update: a random few among those of high covariance.

    Eligible are valid tokens with covariance_low < C < covariance_high whose loss the clip does not already
    decide. Of them `select.k_from_ratio(ratio, valid tokens of the scope)` are drawn, or all if there are
    fewer.

    Arguments:
        log_prob, old_log_prob, advantages, mask: [*], as in `clip_cov`, for the whole scope or this rank's
            share of it.
        ratio: in (0, 1], relative to the number of valid tokens.
        covariance_low, covariance_high: open interval; infinities allowed.
        clip_low, clip_high: those of the loss.
        seed, step, index, process_group: see `select.random_subset`.

    Returns:
        bool [*].

    Source: arXiv 2505.22617, Eq. 11. The paper draws floor(ratio * N); its code, followed here, at least one.
    """
    check_clip("clip_cov_select", clip_low, clip_high)
    if not covariance_low < covariance_high:
        raise ValueError(
            f"clip_cov_select: covariance_low must be below covariance_high, got {covariance_low} and {covariance_high}"
        )
    with torch.no_grad():
        tokens = ratio_tokens("clip_cov_select", log_prob, old_log_prob, advantages, mask)
        plain, clipped = surrogates(tokens, clip_low, clip_high)
        scope = masked_covariance(advantages, log_prob, tokens.valid, process_group=process_group)
        inside = (scope.per_token > covariance_low) & (scope.per_token < covariance_high)
        eligible = tokens.valid & inside & (clipped <= plain)
        k = select.k_from_ratio(ratio, scope.count)
    return select.random_subset(eligible, k=k, seed=seed, step=step, index=index, process_group=process_group)


@objective("policy", paper=_ENTROPY_MECHANISM, arxiv="2505.22617")
def clip_cov(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    selected: Tensor | None = None,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    ratio: float | None = None,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
    seed: int | None = None,
    step: int | None = None,
    index: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    length: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip-Cov: the loss of `ppo_clip`, but 0 at the selected tokens, which stay in the normaliser.

    Arguments:
        log_prob, old_log_prob, advantages, mask, clip_low, clip_high: as in `ppo_clip`.
        selected: [*], bool, from `clip_cov_select`; None: select among the tokens of this call, with
            `ratio`, `seed` and `step` (then required), `covariance_low`, `covariance_high` and `index`,
            which are not used otherwise.
        aggregation, normalizer, length: see `aggregate.reduce`.

    Returns:
        loss, and metrics: `ratio`, `kl`, `clip_fraction_low`, `clip_fraction_high`, `selected` (count),
        `tokens`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; `selected` together with `ratio`, `seed`
            or `step`.

    Source: arXiv 2505.22617, Eqs. 10-12; preset CLIP_COV.
    """
    check_clip("clip_cov", clip_low, clip_high)
    tokens = ratio_tokens("clip_cov", log_prob, old_log_prob, advantages, mask)
    if selected is None:
        if ratio is None or seed is None or step is None:
            raise ValueError("clip_cov: give selected, or ratio, seed and step to select among the tokens of this call")
        selected = clip_cov_select(
            log_prob,
            old_log_prob,
            advantages,
            mask,
            ratio=ratio,
            covariance_low=covariance_low,
            covariance_high=covariance_high,
            clip_low=clip_low,
            clip_high=clip_high,
            seed=seed,
            step=step,
            index=index,
        )
    elif not (ratio is None and seed is None and step is None):
        raise ValueError("clip_cov: selected excludes ratio, seed and step")
    selected = check_selected("clip_cov", selected, tokens)
    plain, clipped = surrogates(tokens, clip_low, clip_high)
    losses = torch.where(selected, 0, torch.maximum(plain, clipped))
    metrics = ratio_metrics(tokens) | clip_fractions(tokens, plain, clipped) | {"selected": selected.sum()}
    loss = aggregate.reduce(losses, tokens.valid, aggregation, normalizer=normalizer, length=length)
    return rounded(log_prob, loss, metrics)


def kl_cov_select(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float,
    index: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The tokens KL-Cov holds back: those of largest covariance.

    They are `select.k_from_ratio(ratio, valid tokens of the scope)` many.

    Arguments:
        log_prob, advantages, mask: [*], as in `kl_cov`, for the whole scope or this rank's share of it.
        ratio: in (0, 1], a fraction and not a percentage.
        index, process_group: see `select.top_k`.

    Returns:
        bool [*].

    Source: arXiv 2505.22617, Eq. 13.
    """
    valid = check_tokens("kl_cov_select", mask, {"log_prob": log_prob, "advantages": advantages})
    scope = masked_covariance(advantages, log_prob, valid, process_group=process_group)
    return select.top_k(scope.per_token, valid, ratio=ratio, index=index, process_group=process_group)


@objective("policy", paper=_ENTROPY_MECHANISM, arxiv="2505.22617")
def kl_cov(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float | Tensor = 1.0,
    selected: Tensor | None = None,
    ratio: float | None = None,
    index: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    length: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL-Cov: token loss -A r, without a clip, plus beta * abs(log_prob - old_log_prob) at selected tokens.

    The gradient is -A r, and beta * sign(log_prob - old_log_prob) more at selected tokens. That is 0 where
    the two are equal: in the first update on fresh samples the penalty does nothing.

    Arguments:
        log_prob, old_log_prob, advantages, mask: as in `ppo_clip`.
        beta: >= 0; 1 in the paper.
        selected: [*], bool, from `kl_cov_select`; None: select among the tokens of this call with `ratio`
            (then required) and `index`, which are not used otherwise.
        aggregation, normalizer, length: see `aggregate.reduce`.

    Returns:
        loss, and metrics: `ratio`, `kl`, `penalty` (mean over valid tokens, without beta), `selected`
        (count), `tokens`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; `selected` together with `ratio`.

    Source: arXiv 2505.22617, Eqs. 10, 13, 14, with the penalty of its Listing 1; presets KL_COV_7B,
    KL_COV_32B.
    """
    beta = accept.bounded("kl_cov", "beta", beta, 0.0, "not be negative")
    tokens = ratio_tokens("kl_cov", log_prob, old_log_prob, advantages, mask)
    if selected is None:
        if ratio is None:
            raise ValueError("kl_cov: give selected, or ratio to select among the tokens of this call")
        selected = kl_cov_select(log_prob, advantages, mask, ratio=ratio, index=index)
    elif ratio is not None:
        raise ValueError("kl_cov: selected excludes ratio")
    selected = check_selected("kl_cov", selected, tokens)
    penalty = torch.where(selected, tokens.log_ratio.abs(), 0)
    losses = -tokens.advantages * tokens.ratio + beta * penalty
    metrics = ratio_metrics(tokens) | {
        "penalty": aggregate.token_mean(penalty.detach(), tokens.valid),
        "selected": selected.sum(),
    }
    loss = aggregate.reduce(losses, tokens.valid, aggregation, normalizer=normalizer, length=length)
    return rounded(log_prob, loss, metrics)
