"""The second look at a tile of logits: divergences that need both normalisers, and ranks.

Bytes: `compare` reads each logit of both models once a divergence, `rank` each of the student's once a label.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fastdiv.backends.triton.rows import COUNTS, FRAME, first_of, framed, last_column, read, row_sum, taking_part


@triton.jit(do_not_specialize=COUNTS)
def compare(
    x,
    x_offsets,
    x_stride,
    x_scale,
    x_softcap,
    y,
    y_offsets,
    y_stride,
    y_scale,
    y_softcap,
    inverse_temperature,  # [rows] float32
    frame,  # [rows, FRAME] float32
    parameter,
    sums,  # [rows, compared_stride] float64: value, dlp, dlq of this divergence
    compared_stride,
    rows,
    columns,
    VALUE: tl.constexpr,
    DLP: tl.constexpr,
    DLQ: tl.constexpr,
    X_KIND: tl.constexpr,
    Y_KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a tile's sums of a divergence that needs finished normalisers: value, dlp and dlq."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    here = here & (tl.load(frame + row * FRAME + 7, mask=here, other=0.0) > 0.0)
    lane = tl.arange(0, BLOCK)
    it = tl.load(inverse_temperature + row, mask=here, other=1.0)[:, None]
    x_first = first_of(x, x_offsets, x_stride, row, here)
    y_first = first_of(y, y_offsets, y_stride, row, here)
    x_max = framed(frame, row, here, 0)
    x_norm = framed(frame, row, here, 1)
    y_max = framed(frame, row, here, 2)
    y_norm = framed(frame, row, here, 3)
    x_shift = framed(frame, row, here, 4)
    y_shift = framed(frame, row, here, 5)
    rest = framed(frame, row, here, 6)
    apart = framed(frame, row, here, 8)
    value = tl.zeros([ROWS, BLOCK], tl.float32)
    dlp = tl.zeros([ROWS, BLOCK], tl.float32)
    dlq = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, last_column(columns, here), BLOCK):
        column = start + lane
        inside = here[:, None] & (column < columns)[None, :]
        t = read(x_first, column, inside, x_scale, x_softcap, X_KIND)
        u = read(y_first, column, inside, y_scale, y_softcap, Y_KIND)
        p = tl.exp((t - x_max) * it - x_norm)
        q = tl.exp((u - y_max) * it - y_norm)
        d = (((t - x_shift) - (u - y_shift)) - apart) * it - rest
        value += tl.where(inside, VALUE(d, p, q, parameter), 0.0)
        dlp += tl.where(inside, DLP(d, p, q, parameter), 0.0)
        dlq += tl.where(inside, DLQ(d, p, q, parameter), 0.0)
    sums += row * compared_stride
    tl.store(sums, tl.load(sums, mask=here, other=0.0) + row_sum(value), mask=here)
    tl.store(sums + 1, tl.load(sums + 1, mask=here, other=0.0) + row_sum(dlp), mask=here)
    tl.store(sums + 2, tl.load(sums + 2, mask=here, other=0.0) + row_sum(dlq), mask=here)


@triton.jit(do_not_specialize=COUNTS)
def rank(
    x,
    x_offsets,
    x_stride,
    x_scale,
    x_softcap,
    mask,  # [rows] bool or None
    label_logits,  # [rows, labels] float32
    above,  # [rows, labels] int64
    rows,
    columns,
    labels_per_row,
    X_KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds how many of a tile's logits are above each label's."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = taking_part(mask, None, 0, row, row < rows, 0, 1)
    lane = tl.arange(0, BLOCK)
    x_first = first_of(x, x_offsets, x_stride, row, here)
    at = row * labels_per_row + tl.program_id(1)
    label = tl.load(label_logits + at, mask=here, other=0.0)[:, None]
    count = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, last_column(columns, here), BLOCK):
        column = start + lane
        inside = here[:, None] & (column < columns)[None, :]
        t = read(x_first, column, inside, x_scale, x_softcap, X_KIND)
        count += (t > label).to(tl.int32)
    tl.store(above + at, tl.load(above + at, mask=here, other=0) + tl.sum(count, 1), mask=here)
