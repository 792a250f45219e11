"""Row gradients.

Bytes: each logit of the models that matter is read once, each gradient written once.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fastdiv.backends.triton.language import expm1, function
from fastdiv.backends.triton.rows import CAPPED, COUNTS, FLOOR, FRAME, SCALED, any_of, first_of, framed, read


@function
def through_softcap(g, first, column, inside, scale, softcap, KIND: tl.constexpr):
    """A gradient times the softcap's slope 1 / cosh^2, from its argument: near saturation 1 - tanh^2 has no digits."""
    if KIND == CAPPED:
        x = tl.load(first[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(-2.0 * tl.abs(x * scale / softcap))
        g = g * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return g


@function
def write(gradient, first, column, inside, g, t, it, scale, KIND: tl.constexpr):
    """Stores a gradient with respect to z, taken back through temperature and scale; 0 at -inf logits."""
    if KIND == CAPPED or KIND == SCALED:
        g = g * (it * scale)
    else:
        g = g * it
    g = tl.where(t == -float("inf"), 0.0, g)
    tl.store(first[:, None] + column[None, :], g.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def gradient(
    x,
    x_offsets,
    x_stride,
    x_scale,
    x_softcap,
    dx,
    dx_offsets,
    dx_stride,
    y,
    y_offsets,
    y_stride,
    y_scale,
    y_softcap,
    dy,
    dy_offsets,
    dy_stride,
    inverse_temperature,  # [rows] float32
    labels,  # [rows, LABELS] int64, in whole-vocabulary numbers
    label_gains,  # [rows, LABELS] float32
    frame,  # [rows, FRAME] float32
    coefficients,  # [rows, 6 + terms] float32: c0 c1 c2 c3 c4 e0 gain...
    parameters,  # one number a term
    rows,
    columns,
    first_column,
    DLP: tl.constexpr,  # a function a term
    DLQ: tl.constexpr,
    TEXT: tl.constexpr,  # of the mathematics
    X_KIND: tl.constexpr,
    Y_KIND: tl.constexpr,
    POLYNOMIAL: tl.constexpr,  # whether c1 to c4 are in use
    NARROWER: tl.constexpr,  # whether a gradient's elements take fewer bytes than its logits'
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dx of some rows (see `fastdiv.statistics`), and dL/dy.

    Either may overwrite its logits, whole or in the first half of a row: a step has read all it needs.  In a row of the
    same dtype a thread overwrites only what it has read itself.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    active = here & (tl.load(frame + row * FRAME + 7, mask=here, other=0.0) > 0.0)
    lane = tl.arange(0, BLOCK)
    it = tl.load(inverse_temperature + row, mask=here, other=1.0)[:, None]
    WIDTH: tl.constexpr = 6 + len(DLP)
    coefficients += row * WIDTH
    c0 = tl.load(coefficients, mask=here, other=0.0)[:, None]
    x_first = first_of(x, x_offsets, x_stride, row, here)
    if dx is not None:
        dx_first = first_of(dx, dx_offsets, dx_stride, row, here)
    if y is not None:
        y_first = first_of(y, y_offsets, y_stride, row, here)
        y_max = framed(frame, row, here, 2)
        y_norm = framed(frame, row, here, 3)
        x_shift = framed(frame, row, here, 4)
        y_shift = framed(frame, row, here, 5)
        rest = framed(frame, row, here, 6)
        apart = framed(frame, row, here, 8)
        e0 = tl.load(coefficients + 5, mask=here, other=0.0)[:, None]
    if dy is not None:
        dy_first = first_of(dy, dy_offsets, dy_stride, row, here)
    x_max = framed(frame, row, here, 0)
    x_norm = framed(frame, row, here, 1)
    if LABELS > 0:
        slot = tl.arange(0, LABEL_BLOCK)[None, :]
        at = row[:, None] * LABELS + slot
        known = here[:, None] & (slot < LABELS)
        label = tl.load(labels + at, mask=known, other=-1) - first_column
        label_total = tl.sum(tl.load(label_gains + at, mask=known, other=0.0), 1)[:, None]

    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = here[:, None] & (column < columns)[None, :]
        present = inside & active[:, None]  # a row that does not take part has logits of -inf, so gradients of 0
        t = read(x_first, column, present, x_scale, x_softcap, X_KIND)
        v = tl.where(t > framed(frame, row, here, 9), x_max, t)  # loaded here: no register keeps it
        lp = (v - x_max) * it - x_norm
        p = tl.exp(lp)
        g = c0 * p
        if POLYNOMIAL:
            # In registers all the way they are four too many for some versions of ptxas.
            c1 = tl.load(coefficients + 1, mask=here, other=0.0)[:, None]
            c2 = tl.load(coefficients + 2, mask=here, other=0.0)[:, None]
            c3 = tl.load(coefficients + 3, mask=here, other=0.0)[:, None]
            c4 = tl.load(coefficients + 4, mask=here, other=0.0)[:, None]
            bounded = tl.maximum(lp, FLOOR)
            g += p * (bounded * (c1 + bounded * c2) + c3 * p) + c4
        if LABELS > 0:
            if any_of(tl.max(((label >= start) & (label < start + BLOCK)).to(tl.int32), 1)):
                # At a label 1 - p = -expm1(log p) keeps its digits.
                same = tl.zeros([ROWS, BLOCK], tl.float32)
                for k in range(LABELS):
                    own = tl.load(labels + row * LABELS + k, mask=here, other=-1)[:, None] - first_column
                    gain = tl.load(label_gains + row * LABELS + k, mask=here, other=0.0)[:, None]
                    same += tl.where(column[None, :] == own, gain, 0.0)
                g -= (label_total - same) * p + tl.where(same == 0.0, 0.0, same * expm1(lp))
            else:
                g -= label_total * p
        if y is not None:
            u = read(y_first, column, present, y_scale, y_softcap, Y_KIND)
            w = tl.where(u > framed(frame, row, here, 10), y_max, u)
            q = tl.exp((w - y_max) * it - y_norm)
            d = (((v - x_shift) - (w - y_shift)) - apart) * it - rest
            h = tl.where(e0 == 0.0, 0.0, e0 * q)
            for i in tl.static_range(len(DLP)):
                gain = tl.load(coefficients + 6 + i, mask=here, other=0.0)[:, None]
                g += gain * DLP[i](d, p, q, parameters[i])
                if dy is not None:
                    h += gain * DLQ[i](d, p, q, parameters[i])
        if dx is not None:
            g = through_softcap(g, x_first, column, present, x_scale, x_softcap, X_KIND)
        if dy is not None:
            h = through_softcap(h, y_first, column, present, y_scale, y_softcap, Y_KIND)
        if NARROWER:
            tl.debug_barrier()  # the gradient may lie in the first half of its row of logits, whose others still read
        if dx is not None:
            write(dx, dx_first, column, inside, g, t, it, x_scale, X_KIND)
        if dy is not None:
            write(dy, dy_first, column, inside, h, u, it, y_scale, Y_KIND)
