"""What the kernels over tokens of any backend share: how they are given tokens, and what stands between launches.

Plain torch says in `fastdiv.ops.covariance` and `fastdiv.select` what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiv.ops.covariance import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

READ = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that kernels read; others come as float32."""

DIGIT_BITS = 11
"""As in `fastdiv.select`."""


def plain(values: Tensor) -> Tensor:
    return (values if values.dtype in READ else values.float()).detach().contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


# No types: Triton compiles it, and takes annotations for values.
def about(n, shift_x, shift_y, rest_x, rest_y, products, mean_x, mean_y):  # type: ignore[no-untyped-def]
    """sum (x - mean_x)(y - mean_y) from the sums of x - shift_x, of y - shift_y and of their products."""
    a, b = shift_x - mean_x, shift_y - mean_y
    return products + rest_x * b + rest_y * a + n * a * b


def of_all_ranks(parts: Tensor, process_group: ProcessGroup) -> Tensor:
    """[8], sums over the tokens of all ranks, shifted by their means, from this rank's [8, parts].

    Both, in float64: how many, sum x, sum y; two shifts, the sums of what is left of x and of y, and of its products.
    """
    n, *totals = all_reduce_sum(parts[:3].sum(1), process_group).unbind()
    means = [total / n.clamp(min=1) for total in totals]
    own: Tensor = about(parts[0], *parts[3:], *means).sum()  # type: ignore[no-untyped-call]
    products = all_reduce_sum(own, process_group)
    return torch.stack([n, *totals, *means, products * 0, products * 0, products])


def shifts(bits: int) -> Sequence[int]:
    """Where the digits of a number begin, the most significant first."""
    return range(0, bits, DIGIT_BITS)[::-1]


def digits(count: int, scores: Tensor | None, index: Tensor | None, offset: Tensor | None) -> list[tuple[int, int]]:
    """(whether it is one of the token's number, shift) of each digit to be counted: 3 of a score, 6 of float64 or a
    random number; then for ties 6 of a number that is given, else what `count` positions need."""
    if scores is None:
        return [(0, shift) for shift in shifts(64)]
    known = index is None and offset is None
    key = shifts(64 if scores.dtype == torch.float64 else 32)
    number = shifts(max(count - 1, 0).bit_length() if known else 64)
    return [(0, shift) for shift in key] + [(1, shift) for shift in number]
