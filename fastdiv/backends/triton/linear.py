"""Statistics of rows of `hidden @ weight.T + bias` with no tile of logits in memory.

A program takes ROWS rows and one span of the vocabulary.  It forms ROWS x BLOCK logits at a time with the matrix units,
adds them to one number a row and sum, and leaves what it found of its span; `merge_spans` joins the spans of a row.

Spans and blocks depend on dtypes, vocabulary and width alone, so a row has the same bits alone and in a batch.  A span
is at most 128 steps of float32 addition, each of a block's sum as a tree: rounding is at most 135 units of 2^-24 of the
sum, and a few in practice.  Spans are joined in float64.

Bytes: a program reads its columns of `weight` once, and its rows of `hidden` once a block; both mostly from the
last-level cache, as its neighbours read the same.  A row writes 56 bytes a span.
"""

# mypy: ignore-errors

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiv.backends.triton import blocks, language, launch
from fastdiv.backends.triton.language import function
from fastdiv.backends.triton.rows import CAPPED, COUNTS, FIELDS, FLOOR, any_of, first_of, offset, total, transformed
from fastdiv.request import Transform
from fastdiv.statistics import WANTED
from fastdiv.tiles import Rows

SPAN = 4096
"""Columns of a program: 38 spans of a vocabulary of 151936, so that even a few rows reach many processors."""

SUMS = tl.constexpr(7)
"""The first columns of the state, those of one model: max, tail, first, second, squares, sum, argmax."""


class Blocks(NamedTuple):
    """ROWS x BLOCK logits at a time, in steps of `depth` hidden features."""

    rows: int
    block: int
    depth: int
    warps: int


# Registers decide: besides the accumulator about three arrays of its size are alive as a block is summed.  Blocks of
# 128 x 128 spill them on some NVIDIA GPUs; the operands fit 64 KB of shared memory, which AMD's have.
_BLOCKS = {
    torch.bfloat16: Blocks(128, 64, 64, 8),
    torch.float16: Blocks(128, 64, 64, 8),
    torch.float32: Blocks(64, 64, 16, 16),  # no matrix units on NVIDIA: operands are in registers too
}

_UNALIGNED = Blocks(64, 32, 32, 8)
"""Where rows do not begin at a multiple of 16 elements: each element is loaded alone and has its own pointer."""


@function
def operand(x, EXACT: tl.constexpr):
    """What `tl.dot` takes: the interpreter multiplies bfloat16 wrongly, and two dtypes meet in float32."""
    if EXACT:
        return x.to(tl.float32)
    else:
        return x


@triton.jit(do_not_specialize=COUNTS)
def sum_spans(
    hidden,
    hidden_offsets,
    hidden_stride,
    scale,
    softcap,
    weight,  # [vocabulary, width], unit stride along `width`
    weight_stride,
    bias,  # [vocabulary] or None
    inverse_temperature,  # [rows] float32
    labels,  # [rows, LABELS] int64
    label_logits,  # [rows, LABELS] float32
    spans,  # [rows, number of spans, SUMS] float64
    rows,
    vocabulary,
    width,
    KIND: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SQUARES: tl.constexpr,
    SUM: tl.constexpr,
    ARGMAX: tl.constexpr,
    LABELS: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the last step along `width` is not whole
    ALIGNED: tl.constexpr,  # whether rows begin at a multiple of 16 elements, or are float32
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums a span of the vocabulary for some rows, and finds the logits of labels in it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    lane = tl.arange(0, BLOCK)
    step = tl.arange(0, DEPTH)
    it = tl.load(inverse_temperature + row, mask=here, other=1.0)
    # Rows and columns that are not there read the last one again: cheaper than a mask, and nobody looks at the result.
    hidden_first = first_of(hidden, hidden_offsets, hidden_stride, tl.minimum(row, rows - 1), row >= 0)
    # From here on columns are counted from the span's first: their numbers take 32 bits, and the loop does not need
    # the vocabulary, whose scalars AMD would spill.
    begin = tl.program_id(1).to(tl.int64) * SPAN
    columns = tl.minimum(vocabulary - begin, SPAN).to(tl.int32)
    weight += begin * weight_stride
    if bias is not None:
        bias += begin
    if LABELS > 0:
        slot = tl.arange(0, LABEL_BLOCK)[None, :]
        label = tl.load(labels + row[:, None] * LABELS + slot, mask=here[:, None] & (slot < LABELS), other=-1) - begin
        label = tl.where((label >= 0) & (label < columns), label, -1).to(tl.int32)
    if KIND == CAPPED and not ALIGNED:
        # One a row: AMD's packed multiplications would take a pair of scalar registers for each use of a scalar.
        scale = tl.where(here, scale, 1.0)[:, None]
        softcap = tl.where(here, softcap, 1.0)[:, None]
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    tail = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    added = tl.zeros([ROWS], tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)

    for start in range(0, columns, BLOCK):
        known = start + tl.minimum(lane, columns - start - 1)
        weight_first = weight + known.to(tl.int64) * weight_stride
        t = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in range(0, width, DEPTH):
            if RAGGED:
                inside = step < width - k
                h = tl.load(hidden_first[:, None] + (k + step)[None, :], mask=inside[None, :], other=0.0)
                w = tl.load(weight_first[None, :] + (k + step)[:, None], mask=inside[:, None], other=0.0)
            else:
                h = tl.load(hidden_first[:, None] + (k + step)[None, :])
                w = tl.load(weight_first[None, :] + (k + step)[:, None])
            t = tl.dot(operand(h, EXACT), operand(w, EXACT), t, input_precision="ieee")
        if bias is not None:
            t += tl.load(bias + known).to(tl.float32)[None, :]
        t = transformed(t, scale, softcap, KIND)
        exists = (lane < columns - start)[None, :]
        if SUM:
            added += tl.sum(tl.where(exists, t, 0.0), 1)
        t = tl.where(exists, t, -float("inf"))

        if LABELS > 0:
            if any_of(tl.max(((label >= start) & (label < start + BLOCK)).to(tl.int32), 1)):
                for k in range(LABELS):
                    own = tl.load(labels + row * LABELS + k, mask=here, other=-1) - begin - start
                    found = (own >= 0) & (own < BLOCK) & (own < columns - start)
                    if any_of(found):
                        at = tl.where(found, own, -1).to(tl.int32)
                        value = tl.sum(tl.where(lane[None, :] == at[:, None], t, 0.0), 1)
                        tl.store(label_logits + row * LABELS + k, value, mask=found)
        if ARGMAX:
            top = tl.max(tl.where(t == t, t, -float("inf")), 1)  # NaN shows in the sums
        else:
            top = tl.max(t, 1)
        new = tl.maximum(maximum, top)
        raised = new > maximum
        if ARGMAX:
            place = tl.min(tl.where(t == top[:, None], lane[None, :], BLOCK), 1)
            argmax = tl.where(raised, start + place, argmax)
        # All but one of the entries at the maximum are in the tail; a row of -inf so far has none.
        is_top = t == new[:, None]
        others = tl.sum(is_top.to(tl.float32), 1) - tl.where(raised, 1.0, 0.0)
        others = tl.where(new > -float("inf"), others, 0.0)
        a = tl.where(raised & (maximum > -float("inf")), (new - maximum) * it, 0.0)
        fade = tl.exp(-a)
        old = total(maximum, tail)
        z = (t - offset(new)[:, None]) * it[:, None]
        if FIRST:
            z = tl.where(z < FLOOR, FLOOR, z)
        e = tl.where(is_top, 0.0, tl.exp(z))
        tail = tl.where(raised, fade * old, tail) + (tl.sum(e, 1) + others)
        if SQUARES:
            squares = tl.where(raised, fade * fade * total(maximum, squares), squares)
            squares += tl.sum(e * e, 1) + others
        if FIRST:
            c = tl.minimum(a, 200.0)  # there exp(-c) is 0
            e = e * z
            if SECOND:
                second = fade * (second - 2.0 * c * first + c * c * old) + tl.sum(e * z, 1)
            first = fade * (first - c * old) + tl.sum(e, 1)
        maximum = new

    spans += (row * tl.num_programs(1) + tl.program_id(1)) * SUMS
    tl.store(spans, maximum.to(tl.float64), mask=here)
    tail = tl.where(maximum == float("inf"), float("nan"), tail)
    tl.store(spans + 1, tail.to(tl.float64), mask=here)
    if FIRST:
        tl.store(spans + 2, first.to(tl.float64), mask=here)
    if SECOND:
        tl.store(spans + 3, second.to(tl.float64), mask=here)
    if SQUARES:
        tl.store(spans + 4, squares.to(tl.float64), mask=here)
    if SUM:
        tl.store(spans + 5, added.to(tl.float64), mask=here)
    if ARGMAX:
        tl.store(spans + 6, (begin + argmax).to(tl.float64), mask=here)


@function
def found_sum(spans, inside, INDEX: tl.constexpr):
    """One sum of every span [ROWS, BLOCK]."""
    return tl.load(spans + INDEX, mask=inside, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def merge_spans(
    spans,  # [rows, count, SUMS] float64
    inverse_temperature,  # [rows] float32
    state,  # [rows, FIELDS] float64
    rows,
    count,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SQUARES: tl.constexpr,
    SUM: tl.constexpr,
    ARGMAX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least `count`
):
    """The state of some rows: every span moves to the highest maximum, which the first span that has it keeps apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    span = tl.arange(0, BLOCK)[None, :]
    inside = here[:, None] & (span < count)
    it = tl.load(inverse_temperature + row, mask=here, other=1.0).to(tl.float64)[:, None]
    spans += (row[:, None] * count + span) * SUMS
    state += row * FIELDS
    own = tl.load(spans, mask=inside, other=-float("inf"))
    highest = tl.max(own, 1)
    a = tl.where(own > -float("inf"), (highest[:, None] - own) * it, 0.0)
    fade = tl.exp(-a)
    leads = span == tl.min(tl.where(own == highest[:, None], span, BLOCK), 1)[:, None]
    tail = found_sum(spans, inside, 1)
    every = total(own, tail)
    tl.store(state, highest, mask=here)
    tl.store(state + 1, tl.sum(tl.where(leads, tail, fade * every), 1), mask=here)
    if FIRST:
        first = found_sum(spans, inside, 2)
        tl.store(state + 2, tl.sum(fade * (first - a * every), 1), mask=here)
        if SECOND:
            second = found_sum(spans, inside, 3)
            tl.store(state + 3, tl.sum(fade * (second - 2.0 * a * first + a * a * every), 1), mask=here)
    if SQUARES:
        squares = found_sum(spans, inside, 4)
        tl.store(state + 4, tl.sum(tl.where(leads, squares, fade * fade * total(own, squares)), 1), mask=here)
    if SUM:
        tl.store(state + 5, tl.sum(found_sum(spans, inside, 5), 1), mask=here)
    if ARGMAX:
        tl.store(state + 6, tl.sum(tl.where(leads, found_sum(spans, inside, 6), 0.0), 1), mask=here)


def _unit(tensor: Tensor) -> Tensor:
    """Itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def shape(hidden: torch.dtype, weight: torch.dtype, width: int) -> Blocks:
    """What a program takes of operands of these dtypes and `width` features."""
    if language.INTERPRETED:
        return Blocks(16, 256, 64, 4)
    dtype = hidden if hidden == weight else torch.float32
    return _BLOCKS[dtype] if width % 16 == 0 or dtype == torch.float32 else _UNALIGNED


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    inverse_temperature: Tensor,
    labels: Tensor,
    wanted: int,
    state: Tensor,
    label_logits: Tensor,
) -> None:
    """What `launch.accumulate` finds of a whole vocabulary, from hidden states: t = hidden @ weight.T + bias, summed in
    float32 whatever the operands, then transformed.

    Memory: 56 bytes a row and span of `SPAN` columns; a copy of `hidden` or `weight` whose last dimension is not
    contiguous.

    Arguments:
        hidden: [rows, H], weight: [V, H], bias: [V] or None; float32, float16 or bfloat16 each.  Float32 operands are
            multiplied as such, never rounded; of two dtypes both are multiplied in float32.
        transform: of the logits.
        inverse_temperature: [rows] float32.
        labels: [rows, K] int64.
        wanted: the sums beside the normaliser, as bits of `statistics.WANTED`; those of two models are ignored.
        state: [rows, len(STATE)] float64, overwritten where wanted; a teacher's columns stay.
        label_logits: [rows, K] float32, overwritten: t at each label, NaN at one outside the vocabulary.
    """
    count, labels_per_row = labels.shape
    vocabulary, width = weight.shape
    side, weight = Rows(_unit(hidden), None, transform), _unit(weight)
    chosen = shape(hidden.dtype, weight.dtype, width)
    rows, block, depth, warps = chosen
    spans = triton.cdiv(vocabulary, SPAN)
    found = torch.empty(count, spans, SUMS.value, dtype=torch.float64, device=hidden.device)
    needs = {
        "FIRST": bool(wanted & (WANTED["first"] | WANTED["second"])),
        "SECOND": bool(wanted & WANTED["second"]),
        "SQUARES": bool(wanted & WANTED["squares"]),
        "SUM": bool(wanted & WANTED["sum"]),
        "ARGMAX": bool(wanted & WANTED["argmax"]),
    }
    label_logits.fill_(torch.nan)
    launch.run(
        sum_spans,
        count,
        blocks.Shape(rows, block, warps),
        *launch.logits(side),
        weight,
        weight.stride(0),
        bias,
        inverse_temperature,
        labels,
        label_logits,
        found,
        count,
        vocabulary,
        width,
        times=spans,
        KIND=launch.kind(side),
        **needs,
        LABELS=labels_per_row,
        LABEL_BLOCK=blocks.power_of_two(labels_per_row),
        SPAN=SPAN,
        DEPTH=depth,
        RAGGED=width % depth != 0,
        ALIGNED=chosen != _UNALIGNED,
        EXACT=language.INTERPRETED or hidden.dtype != weight.dtype,
    )
    launch.run(
        merge_spans,
        count,
        _merging(spans),
        found,
        inverse_temperature,
        state,
        count,
        spans,
        **needs,
    )


def _merging(spans: int) -> blocks.Shape:
    """A span a thread where that is enough: seven float64 sums of each are in registers at a time."""
    block = blocks.power_of_two(spans)
    return blocks.Shape(max(128 // block, 1), block, 4)


def aot_launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """(title, a call that launches) for each dtype, width (whole steps, ragged, not aligned) and set of sums."""
    vocabulary, meta = 151936, torch.device("meta")
    every, plain = sum(WANTED.values()), Transform()
    kinds = [("normaliser", 0, plain), ("entropy", WANTED["first"], plain), ("one model's", every, plain)]
    kinds.append(("softcap one model's", every, Transform(0.5, 30.0)))
    dtypes = [(d, d) for d in _BLOCKS] + [(torch.bfloat16, torch.float32)]
    for (own, other), width, (name, wanted, transform) in itertools.product(dtypes, (4096, 1008, 1000), kinds):
        names = " x ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in (own, other)))
        yield (
            f"{names} hidden [{width}] {name} sums",
            partial(
                statistics,
                torch.empty(2, width, dtype=own, device=meta),
                torch.empty(vocabulary, width, dtype=other, device=meta),
                torch.empty(vocabulary, dtype=other, device=meta) if transform.softcap else None,
                transform,
                torch.empty(2, device=meta),
                torch.empty(2, 1, dtype=torch.int64, device=meta),
                wanted,
                torch.empty(2, FIELDS.value, dtype=torch.float64, device=meta),
                torch.empty(2, 1, device=meta),
            ),
        )
