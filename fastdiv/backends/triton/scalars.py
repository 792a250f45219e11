"""What is done once a row, rows side by side: outputs from sums, coefficients from upstream gradients.

The formulas stand in `fastdiv.rowwise`, and in `fastdiv.statistics` for the reasons of each coefficient.

Bytes: O(1) a row.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fastdiv.backends.triton.language import (
    entropy,
    function,
    kl,
    log_norm,
    log_prob,
    log_sum_sq_probs,
    logsumexp,
    varentropy,
)
from fastdiv.backends.triton.rows import COUNTS, FIELDS, FRAME, above_others, offset, taking_part


@function
def column(state, here, INDEX: tl.constexpr):
    """A column of the state [BLOCK]; `state` points to the rows' first."""
    return tl.load(state + INDEX, mask=here, other=0.0)


@function
def write_frame(frame, state, it, row, here, active):
    """Student's maximum and log-norm, teacher's maximum and log-norm; then for d = z_x - z_y - log-norms what is
    subtracted from each logit: both maxima, or zeros where the maxima are close and x - y keeps more digits; the
    log-norms' difference; whether the row takes part; the maxima's difference where that is still to be subtracted,
    rounded as x - y is; above which logits of either model are its maximum."""
    x_max = column(state, here, 0)
    y_max = column(state, here, 7)
    x_norm = log_norm(x_max, column(state, here, 1))
    y_norm = log_norm(y_max, column(state, here, 8))
    apart = offset(x_max) - offset(y_max)
    far = tl.abs(apart * it) > 8.0
    rest = x_norm - y_norm
    frame += row * FRAME
    tl.store(frame, offset(x_max).to(tl.float32), mask=here)
    tl.store(frame + 1, x_norm.to(tl.float32), mask=here)
    tl.store(frame + 2, offset(y_max).to(tl.float32), mask=here)
    tl.store(frame + 3, y_norm.to(tl.float32), mask=here)
    tl.store(frame + 4, tl.where(far, offset(x_max), 0.0).to(tl.float32), mask=here)
    tl.store(frame + 5, tl.where(far, offset(y_max), 0.0).to(tl.float32), mask=here)
    tl.store(frame + 6, rest.to(tl.float32), mask=here)
    tl.store(frame + 7, active.to(tl.float32), mask=here)
    tl.store(frame + 8, tl.where(far, 0.0, apart).to(tl.float32), mask=here)
    tl.store(frame + 9, above_others(x_max, column(state, here, 1), it).to(tl.float32), mask=here)
    tl.store(frame + 10, above_others(y_max, column(state, here, 8), it).to(tl.float32), mask=here)


@function
def forward_kl_of(state, here):
    difference = log_norm(column(state, here, 0), column(state, here, 1)) - log_norm(
        column(state, here, 7), column(state, here, 8)
    )
    return kl(column(state, here, 9), column(state, here, 8), difference)


@function
def reverse_kl_of(state, here):
    difference = log_norm(column(state, here, 7), column(state, here, 8)) - log_norm(
        column(state, here, 0), column(state, here, 1)
    )
    return kl(column(state, here, 10), column(state, here, 1), difference)


@function
def weighted_kl(state, here, it, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """(FORWARD KL(q || p), REVERSE KL(p || q)); one that does not belong is left out, as it may be infinite."""
    forward = it * 0.0
    reverse = it * 0.0
    if FORWARD != 0.0:
        forward = FORWARD * forward_kl_of(state, here)
    if REVERSE != 0.0:
        reverse = REVERSE * reverse_kl_of(state, here)
    return forward, reverse


@triton.jit(do_not_specialize=COUNTS)
def frames(
    state,  # [rows, FIELDS] float64
    inverse_temperature,  # [rows] float32
    mask,  # [rows] bool or None
    labels,  # [rows, LABELS] int64
    ignore_index,
    frame,  # [rows, FRAME] float32
    rows,
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `compare` subtracts from logits, once a row: the float64 logarithms would cost each of its threads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    it = tl.load(inverse_temperature + row, mask=here, other=1.0).to(tl.float64)
    active = taking_part(mask, labels, ignore_index, row, here, LABELS, LABEL_BLOCK)
    write_frame(frame, state + row * FIELDS, it, row, here, active)


@triton.jit(do_not_specialize=COUNTS)
def finish(
    state,  # [rows, FIELDS] float64
    inverse_temperature,  # [rows] float32
    mask,  # [rows] bool or None
    labels,  # [rows, LABELS] int64
    ignore_index,
    label_logits,  # [rows, LABELS] float32
    compared,  # [rows, C, 3] float64
    compared_stride,
    rank,  # [rows, LABELS] int64
    outputs,  # a tensor [rows] or [rows, LABELS] a name
    vocabulary,
    rows,
    NAMES: tl.constexpr,
    FORWARD: tl.constexpr,  # a divergence's weights of the two KLs
    REVERSE: tl.constexpr,
    COMPARED: tl.constexpr,  # its place in `compared`, or -1
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The outputs; 0 at rows that do not take part and at ignored labels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    it = tl.load(inverse_temperature + row, mask=here, other=1.0).to(tl.float64)
    active = taking_part(mask, labels, ignore_index, row, here, LABELS, LABEL_BLOCK)
    state += row * FIELDS
    maximum = column(state, here, 0)
    tail = column(state, here, 1)
    if LABELS > 0:
        slot = tl.arange(0, LABEL_BLOCK)[None, :]
        at = row[:, None] * LABELS + slot
        known = here[:, None] & (slot < LABELS)
        label = tl.load(labels + at, mask=known, other=0)
        counted = known & active[:, None] & (label != ignore_index)
    for i in tl.static_range(len(NAMES)):
        out = outputs[i]
        if NAMES[i] == "log_prob" or NAMES[i] == "rank" or NAMES[i] == "is_top1":
            if LABELS > 0:
                if NAMES[i] == "log_prob":
                    logit = tl.load(label_logits + at, mask=counted, other=0.0).to(tl.float64)
                    value = log_prob(maximum[:, None], tail[:, None], it[:, None], logit)
                    value = tl.where(counted, value, 0.0)
                elif NAMES[i] == "rank":
                    value = tl.load(rank + at, mask=counted, other=0)
                else:
                    value = counted & (label == column(state, here, 6).to(tl.int64)[:, None])
                tl.store(out + at, value.to(out.dtype.element_ty), mask=known)
        else:
            if NAMES[i] == "entropy":
                value = entropy(maximum, tail, column(state, here, 2))
            elif NAMES[i] == "logsumexp":
                value = logsumexp(maximum, tail, it)
            elif NAMES[i] == "log_sum_sq_probs":
                value = log_sum_sq_probs(maximum, tail, column(state, here, 4))
            elif NAMES[i] == "varentropy":
                value = varentropy(maximum, tail, column(state, here, 2), column(state, here, 3))
            elif NAMES[i] == "max_log_prob":
                value = -log_norm(maximum, tail)
            elif NAMES[i] == "mean_logit":
                value = column(state, here, 5) / vocabulary * it
            elif NAMES[i] == "argmax":
                value = column(state, here, 6)
            elif COMPARED[i] >= 0:
                value = tl.load(compared + row * compared_stride + 3 * COMPARED[i], mask=active, other=0.0)
            else:
                forward, reverse = weighted_kl(state, here, it, FORWARD[i], REVERSE[i])
                value = forward + reverse
            tl.store(out + row, tl.where(active, value, 0.0).to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    state,  # [rows, FIELDS] float64
    inverse_temperature,  # [rows] float32
    mask,  # [rows] bool or None
    labels,  # [rows, LABELS] int64
    ignore_index,
    compared,  # [rows, C, 3] float64
    compared_stride,
    upstream,  # a tensor [rows] of any stride, or [rows, LABELS], a name
    strides,  # of the former
    frame,  # [rows, FRAME] float32
    coefficients,  # [rows, 6 + TERMS] float32
    gain_labels,  # [rows, GAINS] int64
    gains,  # [rows, GAINS] float32
    vocabulary,
    rows,
    NAMES: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    COMPARED: tl.constexpr,
    TERM: tl.constexpr,  # a divergence's place among the gains in `coefficients`, or -1
    TERMS: tl.constexpr,
    GAINS: tl.constexpr,
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`fastdiv.statistics.prepare`, and the frame that `gradient` wants; all 0 where a row does not take part."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    it = tl.load(inverse_temperature + row, mask=here, other=1.0).to(tl.float64)
    active = taking_part(mask, labels, ignore_index, row, here, LABELS, LABEL_BLOCK)
    state += row * FIELDS
    write_frame(frame, state, it, row, here, active)
    maximum = column(state, here, 0)
    tail = column(state, here, 1)
    coefficients += row * (6 + TERMS)
    gains += row * GAINS
    gain_labels += row * GAINS
    c0 = it * 0.0
    c1 = it * 0.0
    c2 = it * 0.0
    c3 = it * 0.0
    c4 = it * 0.0
    e0 = it * 0.0
    for i in tl.static_range(len(NAMES)):
        if NAMES[i] == "log_prob":
            if LABELS > 0:
                slot = tl.arange(0, LABEL_BLOCK)[None, :]
                known = here[:, None] & (slot < LABELS)
                label = tl.load(labels + row[:, None] * LABELS + slot, mask=known, other=0)
                counted = known & active[:, None] & (label != ignore_index)
                own = tl.load(upstream[i] + row[:, None] * LABELS + slot, mask=counted, other=0.0).to(tl.float32)
                # An impossible label shows as a row of NaN.
                own = tl.where(counted & ((label < 0) | (label >= vocabulary)), float("nan"), own)
                tl.store(gains[:, None] + slot, own, mask=known)
                tl.store(gain_labels[:, None] + slot, label, mask=known)
        else:
            g = tl.load(upstream[i] + row * strides[i], mask=active, other=0.0).to(tl.float64)
            if NAMES[i] == "max_log_prob":
                tl.store(gains + (GAINS - 1), g.to(tl.float32), mask=here)
                tl.store(gain_labels + (GAINS - 1), column(state, here, 6).to(tl.int64), mask=here)
            elif NAMES[i] == "entropy":
                c1 -= g
                c0 -= g * entropy(maximum, tail, column(state, here, 2))
            elif NAMES[i] == "logsumexp":
                c0 += g
            elif NAMES[i] == "log_sum_sq_probs":
                c3 += 2.0 * g * tl.exp(-log_sum_sq_probs(maximum, tail, column(state, here, 4)))
                c0 -= 2.0 * g
            elif NAMES[i] == "varentropy":
                h = entropy(maximum, tail, column(state, here, 2))
                c2 += g
                c1 += 2.0 * g * (1.0 + h)
                v = varentropy(maximum, tail, column(state, here, 2), column(state, here, 3))
                c0 -= g * (v - h * h - 2.0 * h)
            elif NAMES[i] == "mean_logit":
                c4 += g / vocabulary
            else:
                if COMPARED[i] >= 0:
                    sums = compared + row * compared_stride + 3 * COMPARED[i]
                    dlp = tl.load(sums + 1, mask=active, other=0.0)
                    dlq = tl.load(sums + 2, mask=active, other=0.0)
                else:
                    dlq, dlp = weighted_kl(state, here, it, FORWARD[i], REVERSE[i])
                tl.store(coefficients + (6 + TERM[i]), g.to(tl.float32), mask=here)
                c0 -= g * dlp
                e0 -= g * dlq
    tl.store(coefficients, tl.where(active, c0, 0.0).to(tl.float32), mask=here)
    tl.store(coefficients + 1, tl.where(active, c1, 0.0).to(tl.float32), mask=here)
    tl.store(coefficients + 2, tl.where(active, c2, 0.0).to(tl.float32), mask=here)
    tl.store(coefficients + 3, tl.where(active, c3, 0.0).to(tl.float32), mask=here)
    tl.store(coefficients + 4, tl.where(active, c4, 0.0).to(tl.float32), mask=here)
    tl.store(coefficients + 5, tl.where(active, e0, 0.0).to(tl.float32), mask=here)
