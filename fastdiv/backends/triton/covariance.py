"""Masked moments of tokens.  `fastdiv.ops.covariance` says in plain torch what they are; here it takes two launches,
and none waits for the device.

Bytes: x, y and mask are read twice, the result is written once.
"""

# Kernels have no types to check; what calls them has.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiv.backends.tokens import READ, about, as_bytes, of_all_ranks, plain
from fastdiv.backends.triton import launch
from fastdiv.backends.triton.blocks import Shape
from fastdiv.backends.triton.language import INTERPRETED, function
from fastdiv.backends.triton.tokens import spread, taking_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Tokens a block, then: how many programs' sums are merged at once.  Interpreted, small batches have many blocks.
MOMENTS = Shape(16, 4, 4) if INTERPRETED else Shape(2048, 512, 8)
"""8 tokens a thread: four float64 arrays of them are 64 registers.  512 programs fill the largest GPU."""

VARYING = ("rows", "parts", "loops")
"""Numbers that no kernel is compiled for: another batch is not to compile again."""

_about = function(about)


@triton.jit(do_not_specialize=VARYING)
def moments(x, y, mask, sums, rows, loops, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Float64 sums of a program's share of the tokens, into a column of [8, BLOCK]: how many, sum x, sum y; then, for
    digits, the mean of its first valid block as a shift, the sums of what is left, and of its products."""
    program = tl.program_id(0)
    n = tl.zeros([], tl.float64)
    x_sum = tl.zeros([], tl.float64)
    y_sum = tl.zeros([], tl.float64)
    x_shift = tl.zeros([], tl.float64)
    y_shift = tl.zeros([], tl.float64)
    x_rest = tl.zeros([], tl.float64)
    y_rest = tl.zeros([], tl.float64)
    products = tl.zeros([], tl.float64)
    for i in range(loops):
        at = (program.to(tl.int64) * loops + i) * ROWS + tl.arange(0, ROWS)
        valid = taking_part(mask, at, rows)
        t = tl.load(x + at, mask=valid, other=0.0).to(tl.float64)
        u = tl.load(y + at, mask=valid, other=0.0).to(tl.float64)
        own = tl.sum(valid.to(tl.float64), 0)
        own_x = tl.sum(t, 0)
        own_y = tl.sum(u, 0)
        x_shift = tl.where(n == 0.0, own_x / tl.maximum(own, 1.0), x_shift)
        y_shift = tl.where(n == 0.0, own_y / tl.maximum(own, 1.0), y_shift)
        t = tl.where(valid, t - x_shift, 0.0)
        u = tl.where(valid, u - y_shift, 0.0)
        n += own
        x_sum += own_x
        y_sum += own_y
        x_rest += tl.sum(t, 0)
        y_rest += tl.sum(u, 0)
        products += tl.sum(t * u, 0)
    sums += program
    tl.store(sums, n)
    tl.store(sums + BLOCK, x_sum)
    tl.store(sums + 2 * BLOCK, y_sum)
    tl.store(sums + 3 * BLOCK, x_shift)
    tl.store(sums + 4 * BLOCK, y_shift)
    tl.store(sums + 5 * BLOCK, x_rest)
    tl.store(sums + 6 * BLOCK, y_rest)
    tl.store(sums + 7 * BLOCK, products)


@triton.jit(do_not_specialize=VARYING)
def centre(x, y, mask, sums, per_token, scalars, count, rows, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(x - mean x)(y - mean y) of a block of tokens; every program merges all `sums`, the first writes the scalars:
    covariance, both means, and the count."""
    part = tl.arange(0, BLOCK)
    here = part < parts
    sums += part
    n = tl.load(sums, mask=here, other=0.0)
    total = tl.sum(n, 0)
    divisor = tl.maximum(total, 1.0)
    x_mean = tl.sum(tl.load(sums + BLOCK, mask=here, other=0.0), 0) / divisor
    y_mean = tl.sum(tl.load(sums + 2 * BLOCK, mask=here, other=0.0), 0) / divisor
    if tl.program_id(0) == 0:
        x_shift = tl.load(sums + 3 * BLOCK, mask=here, other=0.0)
        y_shift = tl.load(sums + 4 * BLOCK, mask=here, other=0.0)
        x_rest = tl.load(sums + 5 * BLOCK, mask=here, other=0.0)
        y_rest = tl.load(sums + 6 * BLOCK, mask=here, other=0.0)
        products = tl.load(sums + 7 * BLOCK, mask=here, other=0.0)
        products = tl.sum(_about(n, x_shift, y_shift, x_rest, y_rest, products, x_mean, y_mean), 0)
        dtype = scalars.dtype.element_ty
        tl.store(scalars, (products / divisor).to(dtype))
        tl.store(scalars + 1, x_mean.to(dtype))
        tl.store(scalars + 2, y_mean.to(dtype))
        tl.store(count, total.to(tl.int64))
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = taking_part(mask, at, rows)
    t = tl.load(x + at, mask=valid, other=0.0).to(tl.float64)
    u = tl.load(y + at, mask=valid, other=0.0).to(tl.float64)
    product = tl.where(valid, (t - x_mean) * (u - y_mean), 0.0)
    tl.store(per_token + at, product.to(per_token.dtype.element_ty), mask=at < rows)


def covariance(
    x: Tensor, y: Tensor, mask: Tensor | None, dtype: torch.dtype, process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `MaskedCovariance`, in two launches without a process group."""
    shape, count = x.shape, x.numel()
    x, y, mask = plain(x), plain(y), as_bytes(mask)
    parts, loops = spread(count, MOMENTS, MOMENTS.block)
    sums = torch.empty(8, MOMENTS.block, dtype=torch.float64, device=x.device)
    launch.run(moments, parts * MOMENTS.rows, MOMENTS, x, y, mask, sums, count, loops)
    if process_group is not None:
        sums[:, 0] = of_all_ranks(sums[:, :parts], process_group)
        parts = 1
    per_token = torch.empty(shape, dtype=dtype, device=x.device)
    scalars = torch.empty(3, dtype=dtype, device=x.device)
    total = torch.empty((), dtype=torch.int64, device=x.device)
    launch.run(centre, max(count, 1), MOMENTS, x, y, mask, sums, per_token, scalars, total, count, parts)
    return per_token, scalars[0], scalars[1], scalars[2], total


def aot_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(title, call) for every kernel of this file in the forms that differ in code."""
    like = torch.zeros(100003, dtype=torch.bool)
    for dtype in READ:
        values, name = torch.zeros(100003, dtype=dtype), str(dtype).removeprefix("torch.")
        result = torch.float64 if dtype == torch.float64 else torch.float32
        yield f"{name} covariance", partial(covariance, values, values, None, result, None)
        yield f"{name} covariance, masked", partial(covariance, values, values, like, result, None)
