"""Masked covariance of two per-token quantities, the same on every rank and for every way to cut the
batch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastdiv import accept, backends, checks, plain
from fastdiv.accept import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MaskedCovariance(NamedTuple):
    """What `masked_covariance` returns: one tensor like the input, four scalars about the whole scope."""

    per_token: Tensor
    """[*], (x - mean_x)(y - mean_y); 0 where the mask is False."""
    covariance: Tensor
    """[], mean of `per_token` over the valid tokens of the scope (divisor: count, not count - 1)."""
    mean_x: Tensor
    mean_y: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """[], int64, valid tokens in the scope."""


@torch.no_grad()
def masked_covariance(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> MaskedCovariance:
    """Covariance of x and y over the valid tokens, with each token's own contribution.

    c_t = (x_t - mean x)(y_t - mean y),  covariance = sum_t c_t / n,  both means over the n valid tokens of
    the scope.

    Sums are accumulated in float64 and the products are formed after exact centring, so a
    large common offset of x or y costs no digits. Nothing here carries a gradient. What stands where the
    mask is False (NaN and infinity included) is never read into any sum; a NaN at a valid token makes the
    result NaN.

    Arguments:
        x, y: [*], any floating dtype, equal shapes; for Clip-Cov and KL-Cov: advantages and
            log-probabilities.
        mask: [*], bool, True where a token counts, or 1 and 0; None: all count.
        process_group: the scope is the union of the tokens of all its ranks (two all-reduces of at most 3
            numbers); None: the tokens of this call.
        backend: "cuda" and "triton" have kernels of their own (two launches); the others are the same plain torch.
            None: theirs for CUDA tensors where one is present, unless torch.compile traces the call; else plain torch.

    Returns:
        MaskedCovariance, float32 (float64 if x or y is); all zeros when no token is valid.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; a backend that is unknown or does not run on the device.
        RuntimeError: a backend that is absent.

    Memory beside the result: 32 KiB (plain torch: about 40 bytes a token), and copies of what is not contiguous.

    Source: the per-token summand is Eq. 10 of Cui et al., "The Entropy Mechanism of Reinforcement Learning
    for Reasoning Language Models", arXiv 2505.22617.
    """
    mask = check_alike("masked_covariance", mask, {"x": x, "y": y}, precise=False)
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    if kernels := token_kernels("masked_covariance", x.device, backend):
        plain.check("masked_covariance", {"x": x, "y": y, "mask": mask})
        return MaskedCovariance(*kernels.covariance(x, y, mask, dtype, process_group))
    valid = everyone(x) if mask is None else mask
    x, y = torch.where(valid, x, 0).double(), torch.where(valid, y, 0).double()

    moments = all_reduce_sum(torch.stack([valid.sum().double(), x.sum(), y.sum()]), process_group)
    count = moments[0]
    divisor = count.clamp(min=1)
    mean_x, mean_y = moments[1] / divisor, moments[2] / divisor

    per_token = torch.where(valid, (x - mean_x) * (y - mean_y), 0)
    covariance = all_reduce_sum(per_token.sum(), process_group) / divisor
    return MaskedCovariance(
        per_token.to(dtype), covariance.to(dtype), mean_x.to(dtype), mean_y.to(dtype), count.to(torch.int64)
    )


def token_kernels(operator: str, device: torch.device, backend: str | None) -> backends.TokenKernels | None:
    """The kernels that serve tokens on `device`; None: plain torch, which is what backends without any mean by them.

    Raises ValueError, RuntimeError: as `fastdiv.backends.select`.
    """
    asked = backend or os.environ.get("FASTDIV_BACKEND")
    if not asked and (device.type == "cpu" or torch.compiler.is_compiling()):
        return None
    with checks.named(operator):
        return backends.get(backends.select([torch.float32], device, asked)).token_kernels()


def everyone(like: Tensor) -> Tensor:
    """The mask of all tokens."""
    return torch.ones_like(like, dtype=torch.bool)


def all_reduce_sum(value: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Sum of `value` over the ranks of a group, in place; without a group the value as it is."""
    if process_group is not None:
        torch.distributed.all_reduce(value, group=process_group)
    return value


def check_tokens(operator: str, mask: Tensor | None, tensors: Mapping[str, Tensor], *, precise: bool = True) -> Tensor:
    """The mask as bool (all True for None) after `check_alike`."""
    valid = check_alike(operator, mask, tensors, precise=precise)
    return everyone(next(iter(tensors.values()))) if valid is None else valid


def check_alike(
    operator: str, mask: Tensor | None, tensors: Mapping[str, Tensor], *, precise: bool = True
) -> Tensor | None:
    """The mask as bool; raise unless every tensor, and a mask, matches the first in shape and device.

    `precise` asks for float32 or float64, the same for all tensors; otherwise any floating dtype will do.
    """
    first, anchor = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {describe(tensor)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must have a floating dtype, got {describe(tensor)}")
        if precise and tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{operator}: {name} must be float32 or float64, got {describe(tensor)}; "
                "16-bit log-probabilities are too coarse for ratios and rankings"
            )
        if precise and tensor.dtype != anchor.dtype:
            raise TypeError(f"{operator}: {name} must have the dtype of {first}, {anchor.dtype}, got {tensor.dtype}")
        _check_like(operator, name, tensor, first, anchor)
    if mask is None:
        return None
    mask = accept.mask(operator, "mask", mask)
    _check_like(operator, "mask", mask, first, anchor)
    return mask


def _check_like(operator: str, name: str, tensor: Tensor, first: str, anchor: Tensor) -> None:
    if tensor.shape != anchor.shape:
        raise ValueError(
            f"{operator}: {name} must have the shape of {first}, {list(anchor.shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != anchor.device:
        raise ValueError(f"{operator}: {name} must be on the device of {first}, {anchor.device}, got {tensor.device}")
