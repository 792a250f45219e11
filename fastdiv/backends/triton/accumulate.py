"""Sums over a tile of logits.

Bytes: each logit is read once; 88 bytes of state a row are written, and read where the tile is not the row's first.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fastdiv.backends.triton.language import expm1, forward_kl_value, function, reverse_kl_value
from fastdiv.backends.triton.rows import (
    COUNTS,
    FIELDS,
    FLOOR,
    any_of,
    first_of,
    last_column,
    offset,
    read,
    row_sum,
    taking_part,
    total,
    transformed,
)


@function
def faded(x, factor):
    """x * factor; below the smallest normal float32 the factor removes even an infinite x, as in csrc/row_state.h."""
    return tl.where(factor < 1.1754943508222875e-38, 0.0, x * factor)


@function
def shifted_kl(kl, growth, s, fade, sum_p, sum_q):
    """sum q phi(d + s), all times `fade`, of `kl` = sum q phi(d); `growth` is fade * (exp(s) - 1)."""
    return faded(kl, fade) + growth * sum_p - faded(s * sum_q, fade)


@function
def growth_of(a, b, fade_a, fade_b):
    """exp(-a) - exp(-b), with all its digits where a and b are close."""
    s = b - a
    near = tl.abs(s) < 0.5
    return tl.where(near, fade_b * expm1(tl.where(near, s, 0.0)), fade_a - fade_b)


@function
def beside_maximum(e, is_top, raised, lane_0):
    """`e` without the one maximum that the state counts apart; others like it go to the first lane."""
    count = tl.sum(is_top.to(tl.float32), 1) - tl.where(raised, 1.0, 0.0)
    return tl.where(is_top, 0.0, e) + lane_0 * count[:, None]


@triton.jit(do_not_specialize=COUNTS)
def accumulate(
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
    mask,  # [rows] bool or None
    labels,  # [rows, LABELS] int64, in whole-vocabulary numbers
    ignore_index,
    label_logits,  # [rows, LABELS] float32
    state,  # [rows, FIELDS] float64
    rows,
    columns,
    first_column,
    X_KIND: tl.constexpr,
    Y_KIND: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SQUARES: tl.constexpr,
    SUM: tl.constexpr,
    ARGMAX: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    FRESH: tl.constexpr,  # nothing was added before: the state is not read
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # steps whose logits are on their way at a time
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a tile's columns to the state of its rows; nothing happens to rows that do not take part."""
    PAIR: tl.constexpr = y is not None
    KL: tl.constexpr = FORWARD or REVERSE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = taking_part(mask, labels, ignore_index, row, row < rows, LABELS, LABEL_BLOCK)
    lane = tl.arange(0, BLOCK)
    lane_0 = tl.where(lane == 0, 1.0, 0.0)[None, :]
    it = tl.load(inverse_temperature + row, mask=here, other=1.0)
    x_first = first_of(x, x_offsets, x_stride, row, here)
    x_max = tl.full([ROWS], -float("inf"), tl.float32)
    x_tail = tl.zeros([ROWS, BLOCK], tl.float32)
    if FIRST:
        first = tl.zeros([ROWS, BLOCK], tl.float32)
    if SECOND:
        second = tl.zeros([ROWS, BLOCK], tl.float32)
    if SQUARES:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUM:
        added = tl.zeros([ROWS, BLOCK], tl.float32)
    if ARGMAX:
        argmax = tl.zeros([ROWS], tl.int32)
    if PAIR:
        y_first = first_of(y, y_offsets, y_stride, row, here)
        y_max = tl.full([ROWS], -float("inf"), tl.float32)
        y_tail = tl.zeros([ROWS, BLOCK], tl.float32)
    if KL:
        # Summed with p scaled by k = exp(log_k), so that both models weigh about the same and no large terms cancel.
        log_k = tl.zeros([ROWS], tl.float32)
        x_shift = tl.zeros([ROWS], tl.float32)
        y_shift = tl.zeros([ROWS], tl.float32)
        apart = tl.zeros([ROWS], tl.float32)
    if FORWARD:
        forward = tl.zeros([ROWS, BLOCK], tl.float32)
    if REVERSE:
        reverse = tl.zeros([ROWS, BLOCK], tl.float32)

    for start in tl.range(0, last_column(columns, here), BLOCK, num_stages=STAGES):
        column = start + lane
        inside = here[:, None] & (column < columns)[None, :]
        t = read(x_first, column, inside, x_scale, x_softcap, X_KIND)
        if ARGMAX:
            numbers = tl.where(t == t, t, -float("inf"))  # NaN shows in the sums
            x_top = tl.max(numbers, 1)
        else:
            x_top = tl.max(t, 1)
        x_new = tl.maximum(x_max, x_top)
        x_raised = x_new > x_max
        a = tl.where(x_raised & (x_max > -float("inf")), (x_new - x_max) * it, 0.0)
        z = (t - offset(x_new)[:, None]) * it[:, None]
        e = tl.exp(z)
        if PAIR:
            u = read(y_first, column, inside, y_scale, y_softcap, Y_KIND)
            y_top = tl.max(u, 1)
            y_new = tl.maximum(y_max, y_top)
            y_raised = y_new > y_max
            b = tl.where(y_raised & (y_max > -float("inf")), (y_new - y_max) * it, 0.0)
            f = tl.exp((u - offset(y_new)[:, None]) * it[:, None])

        # The branches below are rare: few of a row's blocks hold its maximum so far.
        if KL:
            # Also after each doubling of the columns: a model's sum grows without its maximum.
            moved = x_raised | y_raised | ((start & (start - BLOCK)) == 0)
            if any_of(moved):
                x_old = x_tail + total(x_max, 0.0)[:, None] * lane_0
                y_old = y_tail + total(y_max, 0.0)[:, None] * lane_0
                ratio = tl.sum(tl.exp(-b)[:, None] * y_old + f, 1) / tl.sum(tl.exp(-a)[:, None] * x_old + e, 1)
                usable = (ratio > 1e-18) & (ratio < 1e18)
                new_log_k = tl.where(usable, tl.log(tl.where(usable, ratio, 1.0)), 0.0)
                new_log_k = tl.where(moved, new_log_k, log_k)
                x_move = (a - (new_log_k - log_k))[:, None]
                y_move = b[:, None]
                x_fade = tl.exp(-x_move)
                y_fade = tl.exp(-y_move)
                x_old *= tl.exp(log_k)[:, None]
                s = y_move - x_move
                if FORWARD:
                    growth = growth_of(x_move, y_move, x_fade, y_fade)
                    forward = shifted_kl(forward, growth, s, y_fade, x_old, y_old)
                    # While the teacher has no probability the terms are p: as the normaliser has them, without a rest.
                    forward = tl.where((y_max == -float("inf"))[:, None], x_fade * x_old, forward)
                if REVERSE:
                    growth = growth_of(y_move, x_move, y_fade, x_fade)
                    reverse = shifted_kl(reverse, growth, -s, x_fade, y_old, x_old)
                    reverse = tl.where((x_max == -float("inf"))[:, None], y_fade * y_old, reverse)
                log_k = new_log_k
                apart = offset(x_new) - offset(y_new)
                far = tl.abs(apart * it) > 8.0
                x_shift = tl.where(far, offset(x_new), 0.0)
                y_shift = tl.where(far, offset(y_new), 0.0)
                apart = tl.where(far, 0.0, apart)
            p = tl.exp(log_k)[:, None] * e
            d = ((t - x_shift[:, None]) - (u - y_shift[:, None])) - apart[:, None]
            d = d * it[:, None] + log_k[:, None]
            if FORWARD:
                forward += forward_kl_value(d, p, f, 0.0)
            if REVERSE:
                reverse += reverse_kl_value(d, p, f, 0.0)
        if SQUARES:
            square = e * e
        if FIRST:
            z = e * tl.maximum(z, FLOOR)
        if SECOND:
            zz = z * tl.maximum((t - offset(x_new)[:, None]) * it[:, None], FLOOR)
        if any_of(x_top == x_new):
            is_top = (t == x_new[:, None]) & (x_new > -float("inf"))[:, None]
            if any_of(x_raised):
                x_old = x_tail + total(x_max, 0.0)[:, None] * lane_0
                fade = tl.exp(-a)[:, None]
                c = tl.minimum(a, 200.0)[:, None]  # there exp(-c) is 0
                if SECOND:
                    second = tl.where(x_raised[:, None], fade * (second - 2.0 * c * first + c * c * x_old), second)
                if FIRST:
                    first = tl.where(x_raised[:, None], fade * (first - c * x_old), first)
                if SQUARES:
                    old = squares + total(x_max, 0.0)[:, None] * lane_0
                    squares = tl.where(x_raised[:, None], fade * fade * old, squares)
                if ARGMAX:
                    argmax = tl.where(x_raised, start + tl.argmax(numbers, 1), argmax)
                x_tail = tl.where(x_raised[:, None], fade * x_old, x_tail)
            e = beside_maximum(e, is_top, x_raised, lane_0)
            if SQUARES:
                square = beside_maximum(square, is_top, x_raised, lane_0)
        if PAIR:
            if any_of(y_top == y_new):
                is_top = (u == y_new[:, None]) & (y_new > -float("inf"))[:, None]
                y_old = y_tail + total(y_max, 0.0)[:, None] * lane_0
                y_tail = tl.where(y_raised[:, None], tl.exp(-b)[:, None] * y_old, y_tail)
                f = beside_maximum(f, is_top, y_raised, lane_0)
            y_tail += f
            y_max = y_new
        x_tail += e
        x_max = x_new
        if FIRST:
            first += z
        if SECOND:
            second += zz
        if SQUARES:
            squares += square
        if SUM:
            added += tl.where(inside, t, 0.0)

    # The tile is summed; what follows is some scalars a row, in float64.
    it = it.to(tl.float64)
    x_max = x_max.to(tl.float64)
    x_sum = tl.where(x_max == float("inf"), float("nan"), row_sum(x_tail))
    if PAIR:
        y_max = y_max.to(tl.float64)
        y_sum = tl.where(y_max == float("inf"), float("nan"), row_sum(y_tail))
    if KL:
        log_k = log_k.to(tl.float64)
        back = tl.exp(-log_k)
        p_total = tl.exp(log_k) * total(x_max, x_sum)
        q_total = total(y_max, y_sum)
    if FORWARD:
        forward_sum = shifted_kl(
            row_sum(forward), back - 1.0, -log_k, tl.full([ROWS], 1.0, tl.float64), p_total, q_total
        )
        forward_sum = tl.where(y_max == -float("inf"), total(x_max, x_sum), forward_sum)
    if REVERSE:
        reverse_sum = shifted_kl(row_sum(reverse), 1.0 - back, log_k, back, q_total, p_total)
        reverse_sum = tl.where(x_max == -float("inf"), q_total, reverse_sum)

    state += row * FIELDS
    if FRESH:
        x_new = x_max
    else:
        # Both parts move to the higher maximum; the part that brings it keeps it apart, the other adds its own.
        x_old_max = tl.load(state, mask=here, other=0.0)
        x_old_tail = tl.load(state + 1, mask=here, other=0.0)
        x_new = tl.maximum(x_old_max, x_max)
        x_higher = x_max > x_old_max
        x_old = total(x_old_max, x_old_tail)
        x_own = total(x_max, x_sum)
        a_old = tl.where(x_old_max > -float("inf"), (x_new - x_old_max) * it, 0.0)
        a_own = tl.where(x_max > -float("inf"), (x_new - x_max) * it, 0.0)
        x_fade_old = tl.exp(-a_old)
        x_fade_own = tl.exp(-a_own)
        x_sum = tl.where(x_higher, x_sum + x_old * x_fade_old, x_old_tail + x_own * x_fade_own)
    tl.store(state, x_new, mask=here)
    tl.store(state + 1, x_sum, mask=here)
    if FIRST:
        first_sum = row_sum(first)
        if SECOND:
            second_sum = row_sum(second)
        if not FRESH:
            old_first = tl.load(state + 2, mask=here, other=0.0)
            if SECOND:
                old_second = tl.load(state + 3, mask=here, other=0.0)
                second_sum = x_fade_own * (second_sum - 2.0 * a_own * first_sum + a_own * a_own * x_own)
                second_sum += x_fade_old * (old_second - 2.0 * a_old * old_first + a_old * a_old * x_old)
            first_sum = x_fade_own * (first_sum - a_own * x_own) + x_fade_old * (old_first - a_old * x_old)
        tl.store(state + 2, first_sum, mask=here)
        if SECOND:
            tl.store(state + 3, second_sum, mask=here)
    if SQUARES:
        squares_sum = row_sum(squares)
        if not FRESH:
            old_squares = tl.load(state + 4, mask=here, other=0.0)
            from_old = x_fade_old * x_fade_old * total(x_old_max, old_squares)
            from_own = x_fade_own * x_fade_own * total(x_max, squares_sum)
            squares_sum = tl.where(x_higher, squares_sum + from_old, old_squares + from_own)
        tl.store(state + 4, squares_sum, mask=here)
    if SUM:
        added_sum = row_sum(added)
        if not FRESH:
            added_sum += tl.load(state + 5, mask=here, other=0.0)
        tl.store(state + 5, added_sum, mask=here)
    if ARGMAX:
        place = (argmax + first_column).to(tl.float64)
        if not FRESH:
            place = tl.where(x_higher, place, tl.load(state + 6, mask=here, other=0.0))
        tl.store(state + 6, place, mask=here)
    if PAIR:
        if FRESH:
            y_new = y_max
        else:
            y_old_max = tl.load(state + 7, mask=here, other=0.0)
            y_old_tail = tl.load(state + 8, mask=here, other=0.0)
            y_new = tl.maximum(y_old_max, y_max)
            y_old = total(y_old_max, y_old_tail)
            y_own = total(y_max, y_sum)
            b_old = tl.where(y_old_max > -float("inf"), (y_new - y_old_max) * it, 0.0)
            b_own = tl.where(y_max > -float("inf"), (y_new - y_max) * it, 0.0)
            y_fade_old = tl.exp(-b_old)
            y_fade_own = tl.exp(-b_own)
            y_sum = tl.where(y_max > y_old_max, y_sum + y_old * y_fade_old, y_old_tail + y_own * y_fade_own)
        tl.store(state + 7, y_new, mask=here)
        tl.store(state + 8, y_sum, mask=here)
    if FORWARD:
        if not FRESH:
            growth = x_fade_own - y_fade_own
            forward_sum = shifted_kl(forward_sum, growth, b_own - a_own, y_fade_own, x_own, y_own)
            old_forward = tl.load(state + 9, mask=here, other=0.0)
            growth = x_fade_old - y_fade_old
            forward_sum += shifted_kl(old_forward, growth, b_old - a_old, y_fade_old, x_old, y_old)
        tl.store(state + 9, forward_sum, mask=here)
    if REVERSE:
        if not FRESH:
            growth = y_fade_own - x_fade_own
            reverse_sum = shifted_kl(reverse_sum, growth, a_own - b_own, x_fade_own, y_own, x_own)
            old_reverse = tl.load(state + 10, mask=here, other=0.0)
            growth = y_fade_old - x_fade_old
            reverse_sum += shifted_kl(old_reverse, growth, a_old - b_old, x_fade_old, y_old, x_old)
        tl.store(state + 10, reverse_sum, mask=here)

    if LABELS > 0:
        slot = tl.arange(0, LABEL_BLOCK)[None, :]
        at = row[:, None] * LABELS + slot
        known = here[:, None] & (slot < LABELS)
        label = tl.load(labels + at, mask=known, other=-1) - first_column
        found = known & (label >= 0) & (label < columns)
        t = tl.load(x_first[:, None] + label, mask=found, other=0.0)
        tl.store(label_logits + at, transformed(t, x_scale, x_softcap, X_KIND), mask=found)
