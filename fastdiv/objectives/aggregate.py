"""From token losses to one number, in such a way that micro-batches and ranks add up exactly.

Every mode is a sum divided by a normaliser. Without `normalizer` it is the count of this call. With
gradient accumulation or several ranks, compute the count of the whole optimiser step once
(`normalizer(mask, mode, process_group=...)` over all its micro-batches) and give that number to every call:
the micro-batch losses then sum to the loss of the whole batch, and so do their gradients. A wrapper that
averages gradients over ranks (as DDP does) wants the number divided by the number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiv import accept
from fastdiv.ops.covariance import all_reduce_sum, check_tokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def token_mean(values: Tensor, mask: Tensor | None = None, *, normalizer: float | Tensor | None = None) -> Tensor:
    """sum_t x_t / tokens: every token weighs the same (DAPO, arXiv 2503.14476).

    Arguments:
        values: [*], float32 or float64; what stands at masked tokens is not read.
        mask: [*], bool; None: all valid.
        normalizer: number of valid tokens of the optimiser step; None: of this call.

    Returns:
        [], the dtype of values; 0 when nothing is valid.
    """
    return reduce(values, mask, "token_mean", normalizer=normalizer)


def seq_mean_token_mean(
    values: Tensor, mask: Tensor | None = None, *, normalizer: float | Tensor | None = None
) -> Tensor:
    """sum_i (mean of x over the valid tokens of sequence i) / sequences (GRPO, arXiv 2402.03300).

    Arguments:
        values, mask: [sequences, T].
        normalizer: number of sequences with a valid token in the optimiser step; None: in this call.
    """
    return reduce(values, mask, "seq_mean_token_mean", normalizer=normalizer)


def seq_mean_token_sum(
    values: Tensor, mask: Tensor | None = None, *, normalizer: float | Tensor | None = None
) -> Tensor:
    """sum_i sum_t x_it / sequences; arguments as `seq_mean_token_mean`."""
    return reduce(values, mask, "seq_mean_token_sum", normalizer=normalizer)


def seq_mean_token_sum_norm(
    values: Tensor, mask: Tensor | None = None, *, length: float, normalizer: float | Tensor | None = None
) -> Tensor:
    """sum_i sum_t x_it / (length * sequences), `length` a constant such as the longest allowed response.

    Dr. GRPO (arXiv 2503.20783). The constant has no default: the padded width would change with the batch.
    Other arguments as `seq_mean_token_mean`.
    """
    return reduce(values, mask, "seq_mean_token_sum_norm", normalizer=normalizer, length=length)


def reduce(
    values: Tensor,
    mask: Tensor | None,
    mode: str = "token_mean",
    *,
    normalizer: float | Tensor | None = None,
    length: float | None = None,
) -> Tensor:
    """The aggregation named `mode`; "none" returns the token values themselves, 0 where masked.

    Raises:
        TypeError, ValueError: unknown mode; sequence modes on values that are not [sequences, T]; `length`
            missing or given where it has no meaning; a number that is not positive.
    """
    valid = check_tokens("aggregate", mask, {"values": values})
    values = torch.where(valid, values, 0)
    accept.name("aggregate", "mode", mode, (*MODES, "none"))
    if mode != "none":
        _check_mode("aggregate", mode, valid)
    if (length is not None) != (mode == "seq_mean_token_sum_norm"):
        raise ValueError(
            f"aggregate: length goes with seq_mean_token_sum_norm only, got mode={mode!r}, length={length}"
        )
    for name, number in (("normalizer", normalizer), ("length", length)):
        if number is None or isinstance(number, Tensor):
            continue
        if not accept.number("aggregate", name, number) > 0:
            raise ValueError(f"aggregate: {name} must be positive, got {number}")
    if mode == "none":
        if normalizer is not None:
            raise ValueError("aggregate: mode 'none' takes no normalizer")
        return values
    if mode == "seq_mean_token_mean":
        values = values / valid.sum(-1, keepdim=True).clamp(min=1)
    total = values.sum() if length is None else values.sum() / length
    divisor = _count(valid, mode) if normalizer is None else normalizer
    if not isinstance(divisor, Tensor):
        return total / divisor
    if divisor.dim() != 0:
        raise ValueError(f"aggregate: normalizer must be a number or 0-dim, got {list(divisor.shape)}")
    # a step without any valid token has normaliser 0 and loss 0
    return total / torch.where(divisor == 0, 1, divisor).to(values.dtype)


@torch.no_grad()
def normalizer(mask: Tensor, mode: str = "token_mean", *, process_group: ProcessGroup | None = None) -> Tensor:
    """What `mode` divides by: valid tokens, or sequences with at least one; counts of masks may be added.

    Arguments:
        mask: bool [*] for token_mean, [sequences, T] otherwise.
        process_group: count over all its ranks.

    Returns:
        int64 [].
    """
    mask = accept.mask("normalizer", "mask", mask)
    _check_mode("normalizer", mode, mask)
    return all_reduce_sum(_count(mask, mode), process_group)


def _check_mode(operator: str, mode: str, valid: Tensor) -> None:
    accept.name(operator, "mode", mode, MODES)
    if mode != "token_mean" and valid.dim() != 2:
        raise ValueError(f"{operator}: {mode} needs [sequences, T], got {list(valid.shape)}")


def _count(valid: Tensor, mode: str) -> Tensor:
    return valid.sum() if mode == "token_mean" else valid.any(-1).sum()
