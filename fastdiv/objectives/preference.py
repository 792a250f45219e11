"""Losses on pairs of responses, from per-token quantities of the policy and a frozen reference.

Every loss is -log sigmoid(z) averaged over pairs, to be minimised; they differ in z alone. At token t,
Delta_t = log_prob - ref_log_prob and K_t = KL(reference || policy), which is
`fastdiv.divergence(policy, reference, "forward_kl")`. Sums run over the response tokens, without length
normalisation; w is the chosen response, l the rejected one; u and v are weights of tokens:

    dpo        z = beta [ (sum Delta_w - sum Delta_l) ]
    tdpo1      z = beta [ (sum Delta_w - sum Delta_l) - (sum K_l - sum K_w) ]
    tdpo2      z = beta [ (sum Delta_w - sum Delta_l) - alpha (sum K_l - stop_gradient(sum K_w)) ]
    sparse_po  z = beta [ (sum u_w Delta_w - sum u_l Delta_l) - (sum v_l K_l - sum v_w K_w) ]

A pair whose two masks are both empty is padding: it contributes 0 and is not counted. `normalizer` is the
number of pairs to divide by, that of the whole optimiser step under gradient accumulation; None: the pairs
of this call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastdiv import accept
from fastdiv.objectives import aggregate
from fastdiv.objectives._registry import objective
from fastdiv.objectives.token_weights import TokenWeights
from fastdiv.ops.covariance import check_tokens


class Responses(NamedTuple):
    """One side of the pairs; chosen and rejected may be padded to different lengths."""

    log_prob: Tensor
    """[pairs, T], float32 or float64, nats; carries gradient."""
    ref_log_prob: Tensor
    """[pairs, T]; a constant."""
    mask: Tensor
    """[pairs, T], bool, True at response tokens; nothing else is read."""
    forward_kl: Tensor | None = None
    """[pairs, T], KL(reference || policy) per token; carries gradient."""


_WITHOUT_KL = ("log_prob", "ref_log_prob", "mask")
_WITH_KL = (*_WITHOUT_KL, "forward_kl")
_SPARSE_PO = "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks"


@objective("preference", paper="Direct Preference Optimization", arxiv="2305.18290", inputs=_WITHOUT_KL)
def dpo(
    chosen: Responses, rejected: Responses, *, beta: float | Tensor = 0.1, normalizer: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO: -log sigmoid(beta (sum Delta_w - sum Delta_l)).

    Arguments:
        chosen, rejected: `Responses`; forward_kl is not used.
        beta: > 0.
        normalizer: pairs to divide by.

    Returns:
        loss, and metrics: `accuracy` (z > 0), `margin` (mean z), `chosen_reward` and `rejected_reward`
        (mean of beta * sum Delta), `chosen_kl` and `rejected_kl` (mean of sum K; 0 in `dpo`), `pairs`.

    Raises:
        TypeError, ValueError: wrong dtype, shape or range.

    Source: arXiv 2305.18290, Eq. 7.
    """
    c, r = _sides("dpo", beta, chosen, rejected, with_kl=False)
    return _logistic(c, r, c.reward - r.reward, beta, normalizer)


@objective(
    "preference",
    paper="Token-level Direct Preference Optimization",
    arxiv="2404.11999",
    inputs=_WITH_KL,
    full_vocabulary=True,
)
def tdpo1(
    chosen: Responses, rejected: Responses, *, beta: float | Tensor = 0.1, normalizer: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """TDPO1: DPO with the difference of the responses' divergences in the margin.

    The gradient makes the divergence grow on the chosen side and shrink on the rejected one.

    Arguments and results as `dpo`, with `forward_kl` required.

    Source: arXiv 2404.11999.
    """
    c, r = _sides("tdpo1", beta, chosen, rejected)
    return _logistic(c, r, (c.reward - r.reward) - (r.kl - c.kl), beta, normalizer)


@objective(
    "preference",
    paper="Token-level Direct Preference Optimization",
    arxiv="2404.11999",
    inputs=_WITH_KL,
    full_vocabulary=True,
)
def tdpo2(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float | Tensor = 0.1,
    alpha: float | Tensor = 0.5,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TDPO2: the divergence term scaled by alpha, without gradient on the chosen side.

    Arguments and results as `tdpo1`; alpha >= 0.

    Source: arXiv 2404.11999.
    """
    alpha = accept.bounded("tdpo2", "alpha", alpha, 0.0, "not be negative")
    c, r = _sides("tdpo2", beta, chosen, rejected)
    return _logistic(c, r, (c.reward - r.reward) - alpha * (r.kl - c.kl.detach()), beta, normalizer)


@objective("preference", paper=_SPARSE_PO, arxiv="2410.05102", inputs=(*_WITH_KL, "weights"), full_vocabulary=True)
def sparse_po(
    chosen: Responses,
    rejected: Responses,
    chosen_weights: TokenWeights,
    rejected_weights: TokenWeights,
    *,
    beta: float | Tensor = 0.1,
    l1_reward: float | Tensor = 0.0,
    l1_kl: float | Tensor = 0.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SparsePO: TDPO1 with a weight on every token's Delta and K, plus an L1 price on the weights.

    L = -log sigmoid(z) + l1_reward (norm1(u_w) + norm1(u_l)) + l1_kl (norm1(v_w) + norm1(v_l)), norms over
    response tokens, per pair. Gradient flows to the policy and to the weights.

    Arguments:
        chosen, rejected, beta, normalizer: as in `tdpo1`.
        chosen_weights, rejected_weights: `TokenWeights`, usually from `SparseMask`.
        l1_reward, l1_kl: >= 0, taken as they are. The published common-mask runs state lambda = 1e-3 and
            halve it for each of the two terms: give 5e-4 and 5e-4 for them.

    Returns:
        loss, and the metrics of `tdpo1` with `reward_density` and `kl_density` (share of response tokens
        with weight > 0).

    Source: arXiv 2410.05102.
    """
    l1_reward = accept.bounded("sparse_po", "l1_reward", l1_reward, 0.0, "not be negative")
    l1_kl = accept.bounded("sparse_po", "l1_kl", l1_kl, 0.0, "not be negative")
    c, r = _sides("sparse_po", beta, chosen, rejected, chosen_weights, rejected_weights)
    price = l1_reward * (c.reward_l1 + r.reward_l1) + l1_kl * (c.kl_l1 + r.kl_l1)
    loss, metrics = _logistic(c, r, (c.reward - r.reward) - (r.kl - c.kl), beta, normalizer, price)
    tokens = (c.tokens + r.tokens).sum().clamp(min=1)
    metrics["reward_density"] = (c.reward_active + r.reward_active).sum() / tokens
    metrics["kl_density"] = (c.kl_active + r.kl_active).sum() / tokens
    return loss, metrics


@objective("preference", paper=_SPARSE_PO, arxiv="2410.05102", inputs=(*_WITH_KL, "weights"), full_vocabulary=True)
def mapo(
    chosen: Responses,
    rejected: Responses,
    chosen_weights: Tensor,
    rejected_weights: Tensor,
    *,
    beta: float | Tensor = 0.1,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """MaPO: SparsePO with one constant weight per token, read off the reference by `mapo_masks`.

    Arguments:
        chosen, rejected, beta, normalizer: as in `tdpo1`.
        chosen_weights, rejected_weights: [pairs, T]; no gradient flows to them.

    Returns:
        loss and metrics as `sparse_po`.

    Source: arXiv 2410.05102.
    """
    c, r = chosen_weights.detach(), rejected_weights.detach()
    return sparse_po(chosen, rejected, TokenWeights(c, c), TokenWeights(r, r), beta=beta, normalizer=normalizer)


class _Side(NamedTuple):
    """Sums over the tokens of each response, [pairs]."""

    reward: Tensor
    kl: Tensor
    tokens: Tensor
    reward_l1: Tensor
    kl_l1: Tensor
    reward_active: Tensor
    kl_active: Tensor


def _sides(
    operator: str,
    beta: float | Tensor,
    chosen: Responses,
    rejected: Responses,
    chosen_weights: TokenWeights | None = None,
    rejected_weights: TokenWeights | None = None,
    *,
    with_kl: bool = True,
) -> tuple[_Side, _Side]:
    accept.bounded(operator, "beta", beta, 0.0, "be positive", strictly=True)
    c = _side(operator, "chosen", Responses(*chosen), chosen_weights, with_kl)
    r = _side(operator, "rejected", Responses(*rejected), rejected_weights, with_kl)
    if c.reward.shape != r.reward.shape:
        raise ValueError(
            f"{operator}: chosen and rejected must hold the same number of pairs, "
            f"got {c.reward.shape[0]} and {r.reward.shape[0]}"
        )
    return c, r


def _side(operator: str, name: str, side: Responses, weights: TokenWeights | None, with_kl: bool) -> _Side:
    tensors = {f"{name}.log_prob": side.log_prob, f"{name}.ref_log_prob": side.ref_log_prob}
    if with_kl:
        if side.forward_kl is None:
            raise ValueError(f"{operator}: {name}.forward_kl is required, got None")
        tensors[f"{name}.forward_kl"] = side.forward_kl
    if weights is not None:
        tensors |= {f"{name}_weights.reward": weights[0], f"{name}_weights.kl": weights[1]}
    valid = check_tokens(operator, accept.mask(operator, f"{name}.mask", side.mask), tensors)
    if valid.dim() != 2:
        raise ValueError(f"{operator}: {name}.log_prob must be [pairs, T], got {list(valid.shape)}")

    def clean(tensor: Tensor) -> Tensor:
        return torch.where(valid, tensor, 0)

    delta = clean(side.log_prob) - clean(side.ref_log_prob.detach())
    kl = clean(side.forward_kl) if with_kl and side.forward_kl is not None else torch.zeros_like(delta)
    one = valid.to(delta.dtype)
    u, v = (one, one) if weights is None else (clean(weights[0]), clean(weights[1]))
    summed = (u * delta, v * kl, one, u.abs(), v.abs(), (u > 0).to(delta.dtype), (v > 0).to(delta.dtype))
    return _Side(*(term.sum(-1) for term in summed))


def _logistic(
    c: _Side,
    r: _Side,
    margin: Tensor,
    beta: float | Tensor,
    normalizer: float | Tensor | None,
    price: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    counted = (c.tokens + r.tokens) > 0
    beta = beta if isinstance(beta, Tensor) else float(beta)
    z = beta * margin
    loss = aggregate.token_mean(price - functional.logsigmoid(z), counted, normalizer=normalizer)
    means = {
        "accuracy": (z > 0).to(z.dtype),
        "margin": z,
        "chosen_reward": beta * c.reward,
        "rejected_reward": beta * r.reward,
        "chosen_kl": c.kl,
        "rejected_kl": r.kl,
    }
    metrics = {name: aggregate.token_mean(value.detach(), counted) for name, value in means.items()}
    return loss, metrics | {"pairs": counted.sum()}
