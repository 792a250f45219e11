"""What the row kernels share: which rows take part, reading logits, the numbers that rows are walked with.

A program takes ROWS rows and walks their columns in steps of BLOCK.  Sums are kept lane by lane, so that a lane adds
columns / BLOCK terms and the lanes are added once, as a tree: the order depends on the number of columns alone.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton.language as tl

from fastdiv.backends.triton.language import function, tanh
from fastdiv.statistics import STATE

PLAIN, SCALED, CAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a logits transform has to do: nothing, x * scale, softcap * tanh(x * scale / softcap)."""

FIELDS = tl.constexpr(len(STATE))
"""Columns of the state, in the order of `fastdiv.statistics.STATE`."""

FRAME = tl.constexpr(11)
"""Columns of what `scalars.frames` makes of the state."""

COUNTS = ("rows", "first_column", "compared_stride", "labels_per_row", "ignore_index")
"""Numbers that no kernel is compiled for: another batch is not to compile again."""

FLOOR = tl.constexpr(-1e4)
"""Instead of -inf where 0 * -inf should be 0."""


@function
def first_of(tensor, offsets, stride, row, here):
    """Pointers to the first elements of rows."""
    if offsets is None:
        return tensor + row * stride
    else:
        return tensor + tl.load(offsets + row, mask=here, other=0)


@function
def taking_part(mask, labels, ignore_index, row, here, LABELS: tl.constexpr, LABEL_BLOCK: tl.constexpr):
    """`here` without rows that are masked or whose labels are all ignored."""
    if mask is not None:
        here = here & (tl.load(mask + row, mask=here, other=0) != 0)
    if LABELS > 0:
        slot = tl.arange(0, LABEL_BLOCK)[None, :]
        known = here[:, None] & (slot < LABELS)
        label = tl.load(labels + row[:, None] * LABELS + slot, mask=known, other=0)
        counted = known & (label != ignore_index)
        here = tl.max(counted.to(tl.int32), 1) > 0
    return here


@function
def last_column(columns, here):
    """How far a program walks: rows that do not take part cost nothing."""
    return tl.where(any_of(here), columns, 0)


@function
def transformed(x, scale, softcap, KIND: tl.constexpr):
    x = x.to(tl.float32)
    if KIND == CAPPED:
        return softcap * tanh(tl.div_rn(x * scale, softcap + tl.zeros_like(x)))
    elif KIND == SCALED:
        return x * scale
    else:
        return x


@function
def read(first, column, inside, scale, softcap, KIND: tl.constexpr):
    """Logits [ROWS, BLOCK]; -inf beyond the last column."""
    x = tl.load(first[:, None] + column[None, :], mask=inside, other=0.0)
    return tl.where(inside, transformed(x, scale, softcap, KIND), -float("inf"))


@function
def offset(maximum):
    """One that may be subtracted: a row of -inf has none."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@function
def any_of(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@function
def total(maximum, tail):
    """The sum over every entry, the maximum too."""
    return tail + tl.where(maximum > -float("inf"), 1.0, 0.0)


@function
def row_sum(lanes):
    return tl.sum(lanes, 1).to(tl.float64)


@function
def above_others(maximum, tail, it):
    """A logit above this is the row's maximum: the exponentials of all others together are less than a half.

    A product of hidden states that was formed once more, in another shape, may have rounded the maximum otherwise;
    where one entry has most of the mass the digits of its gradient are in that difference.
    """
    return tl.where((tail < 0.5) & (maximum > -float("inf")), maximum - 0.25 / it, float("inf"))


@function
def framed(frame, row, here, INDEX: tl.constexpr):
    """A column of the frame, as [ROWS, 1]."""
    return tl.load(frame + row * FRAME + INDEX, mask=here, other=0.0)[:, None]
