"""The k smallest keys of tokens, by radix selection.

`fastdiv.select` says in plain torch what it computes; here it takes a few launches, and none waits for the device.

Bytes: keys and mask are read once a digit, and nothing any more once the digits so far decide.
"""

# Kernels have no types to check; what calls them has.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiv.backends.tokens import DIGIT_BITS, READ, as_bytes, digits, plain
from fastdiv.backends.triton import launch
from fastdiv.backends.triton.blocks import Shape
from fastdiv.backends.triton.language import INTERPRETED, function
from fastdiv.backends.triton.tokens import spread, taking_part
from fastdiv.ops.covariance import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Tokens a block, then bins.  Interpreted, small batches have many blocks.
DIGITS = Shape(64, 1 << DIGIT_BITS, 4) if INTERPRETED else Shape(1024, 1 << DIGIT_BITS, 8)
"""A warp counts 64 bins a thread; with 8 tokens a thread it would spill."""
COUNTERS = 2 if INTERPRETED else 128
"""Programs that count, all at once on a large GPU: each reads 16 KiB of counts first and adds up to 2048 at the end."""


NUMBER, RATIO, TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""How `k` is given: as such, as the bits of a float64 ratio, on the device."""

VARYING = ("rows", "loops", "drawn", "wanted", "shift", "shift_before", "index_before", "initial")
"""Numbers that no kernel is compiled for: another batch is not to compile again."""


@function
def mixed(x):
    """splitmix64's finaliser, as `fastdiv.select` has it."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@function
def numbers(index, offset, at, inside):
    """The tokens' numbers in the whole scope."""
    if index is not None:
        return tl.load(index + at, mask=inside, other=0)
    elif offset is not None:
        return at + tl.load(offset)
    else:
        return at


@function
def keys(scores, number, drawn, at, inside, LARGEST: tl.constexpr):
    """Signed integers, in the order of the scores when read as unsigned; without scores, the tokens' random numbers.

    Bits decide throughout: a comparison of floats may take the smallest for 0.
    """
    if scores is None:
        return mixed(mixed(number) ^ drawn.to(tl.int64))
    else:
        bits = tl.load(scores + at, mask=inside)
        if scores.dtype.element_ty == tl.float16:
            bits = bits.to(tl.float32).to(tl.int32, bitcast=True)
        elif scores.dtype.element_ty == tl.bfloat16:
            bits = bits.to(tl.int16, bitcast=True).to(tl.int32) << 16
        if scores.dtype.element_ty == tl.int64:
            size = bits & 0x7FFFFFFFFFFFFFFF
            bits = tl.where(size > 0x7FF0000000000000, 0x7FF8000000000000, bits)
            bits = tl.where(size == 0, 0, bits)
            key = bits ^ ((bits >> 63) | -0x8000000000000000)
        else:
            size = bits & 0x7FFFFFFF
            bits = tl.where(size > 0x7F800000, 0x7FC00000, bits)
            bits = tl.where(size == 0, 0, bits)
            key = bits ^ ((bits >> 31) | -0x80000000)
        if LARGEST:
            key = ~key
        return key


@function
def how_many(count, wanted, WANTED: tl.constexpr):
    """k of `count` tokens."""
    if WANTED == RATIO:
        share = count.to(tl.float64) * wanted.to(tl.int64).to(tl.float64, bitcast=True)
        asked = tl.maximum(share.to(tl.int64), 1)
    elif WANTED == TENSOR:
        asked = tl.maximum(tl.load(wanted).to(tl.int64), 0)
    else:
        asked = wanted.to(tl.int64)
    return tl.minimum(asked, count)


@function
def narrowed(counts, state, wanted, shift, on_index, initial, WANTED: tl.constexpr, BINS: tl.constexpr):
    """The digit at `shift` of the last token to be taken, from how many tokens have which.

    State and result: the digits found so far of that token's key and index, how many are wanted of the tokens that
    share them, and whether that is all of them; then the digits not yet found are the largest there are.
    """
    key = tl.load(state)
    index = tl.load(state + 1)
    need = tl.load(state + 2)
    settled = tl.load(state + 3)
    if settled == 0:
        bins = tl.arange(0, BINS)
        count = tl.load(counts + bins)
        if initial != 0:
            need = how_many(tl.sum(count, 0), wanted, WANTED)
        pivot = tl.sum((tl.cumsum(count, 0) < need).to(tl.int64), 0)
        need -= tl.sum(tl.where(bins < pivot, count, 0), 0)
        settled = (need == tl.sum(tl.where(bins == pivot, count, 0), 0)).to(tl.int64)
        one = tl.full([], 1, tl.int64)
        digit = (pivot << shift) | (settled * ((one << shift) - 1))
        if on_index != 0:
            index = index | digit
        else:
            key = key | digit
            index = index | -settled
    return key, index, need, settled


@triton.jit(do_not_specialize=VARYING)
def count_digits(
    scores,  # float32 and float64 as integers; None: random numbers
    mask,
    index,
    offset,  # of the positions in this call, where there is no index
    drawn,  # of seed and step
    counts_before,  # [BLOCK] of the digit before, None at the first
    state_before,
    wanted,
    counts,  # [BLOCK], zeros
    state,
    rows,
    loops,
    shift,
    shift_before,
    index_before,
    initial,  # whether the digit before was the first
    LARGEST: tl.constexpr,
    ON_INDEX: tl.constexpr,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the digit before, then counts the next one of the tokens that share all before.  Every program finds it
    for itself, and the first writes it down for the next launch."""
    program = tl.program_id(0)
    found_key = tl.zeros([], tl.int64)
    found_index = tl.zeros([], tl.int64)
    settled = tl.zeros([], tl.int64)
    if counts_before is not None:
        found_key, found_index, need, settled = narrowed(
            counts_before, state_before, wanted, shift_before, index_before, initial, WANTED, BLOCK
        )
        if program == 0:
            tl.store(state, found_key)
            tl.store(state + 1, found_index)
            tl.store(state + 2, need)
            tl.store(state + 3, settled)
    if settled == 0:
        bins = tl.arange(0, BLOCK)
        found = tl.zeros([BLOCK], tl.int32)
        # All bits above the digit.  In two steps, as no number may be shifted by all its bits.
        above = (tl.full([], -1, tl.int64) << tl.minimum(shift + 10, 63)) << 1
        for i in range(loops):
            at = (program.to(tl.int64) * loops + i) * ROWS + tl.arange(0, ROWS)
            alive = taking_part(mask, at, rows)
            number = numbers(index, offset, at, alive)
            key = keys(scores, number, drawn, at, alive, LARGEST)
            prefix = found_key.to(key.dtype)
            if ON_INDEX:
                alive = alive & (key == prefix) & (((number ^ found_index) & above) == 0)
                digit = (number >> shift) & (BLOCK - 1)
            else:
                alive = alive & (((key ^ prefix) & above.to(key.dtype)) == 0)
                digit = (key >> shift) & (BLOCK - 1)
            found += tl.histogram(digit.to(tl.int32), BLOCK, mask=alive)
        tl.atomic_add(counts + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def choose(
    scores,
    mask,
    index,
    offset,
    drawn,
    counts_before,
    state_before,
    wanted,
    chosen,  # uint8
    rows,
    shift_before,
    index_before,
    LARGEST: tl.constexpr,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the last digit, and marks the tokens up to the last one to be taken."""
    last_key, last_index, need, _ = narrowed(
        counts_before, state_before, wanted, shift_before, index_before, 0, WANTED, BLOCK
    )
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = taking_part(mask, at, rows)
    number = numbers(index, offset, at, valid)
    key = keys(scores, number, drawn, at, valid, LARGEST)
    last_key = last_key.to(key.dtype)
    lowest = tl.full([], -1, tl.int64) << 63
    if key.dtype == tl.int64:
        before = (key ^ lowest) < (last_key ^ lowest)
    else:
        before = (key ^ -0x80000000) < (last_key ^ -0x80000000)
    last = key == last_key
    if scores is not None:
        last = last & ((number ^ lowest) <= (last_index ^ lowest))
    tl.store(chosen + at, (valid & (before | last) & (need > 0)).to(tl.uint8), mask=at < rows)


_KEYS = {torch.float64: torch.int64, torch.float32: torch.int32}


def smallest(
    scores: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    like: Tensor,
    *,
    k: int | float | Tensor,
    largest: bool = False,
    drawn: int = 0,
    offset: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Bool, shaped `like`: the k smallest by (key, index), where the key is the score, or a random number from `drawn`.

    A float k is a ratio.  Launches: one for zeros, one for each of the `digits`, one to mark.
    """
    count, device = like.numel(), like.device
    turns = digits(count, scores, index, offset)
    if scores is not None:
        scores = plain(scores)
        scores = scores.view(_KEYS.get(scores.dtype, scores.dtype))
    mask, index = as_bytes(mask), None if index is None else index.contiguous()

    memory = torch.zeros(len(turns) * (DIGITS.block + 4), dtype=torch.int64, device=device)
    counts = memory[: len(turns) * DIGITS.block].view(-1, DIGITS.block).unbind()
    state = memory[len(turns) * DIGITS.block :].view(-1, 4).unbind()
    wanted, kind = _wanted(k, device)
    tokens = (scores, mask, index, offset, drawn)
    programs, loops = spread(count, DIGITS, COUNTERS)
    for turn, (on_index, shift) in enumerate(turns):
        before = turn - 1
        launch.run(
            count_digits,
            programs * DIGITS.rows,
            DIGITS,
            *tokens,
            counts[before] if turn else None,
            state[before] if turn else None,
            wanted,
            counts[turn],
            state[turn],
            count,
            loops,
            shift,
            turns[before][1],
            turns[before][0],
            int(turn == 1),
            LARGEST=largest,
            ON_INDEX=bool(on_index),
            WANTED=kind,
        )
        all_reduce_sum(counts[turn], process_group)
    chosen = torch.empty(like.shape, dtype=torch.bool, device=device)
    launch.run(
        choose,
        max(count, 1),
        DIGITS,
        *tokens,
        counts[-1],
        state[-1],
        wanted,
        chosen.view(torch.uint8),
        count,
        turns[-1][1],
        turns[-1][0],
        LARGEST=largest,
        WANTED=kind,
    )
    return chosen


def _wanted(k: int | float | Tensor, device: torch.device) -> tuple[int | Tensor, int]:
    """`k` as the kernels take it, and its kind; Triton would round a float argument to float32."""
    if isinstance(k, Tensor):
        return k.to(device, non_blocking=True), int(TENSOR.value)
    if isinstance(k, float):
        return struct.unpack("q", struct.pack("d", k))[0], int(RATIO.value)
    return min(k, 2**62), int(NUMBER.value)


def aot_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(title, call) for every kernel of this file in the forms that differ in code."""
    like = torch.zeros(100003, dtype=torch.bool)
    number = torch.zeros(100003, dtype=torch.int64)
    for dtype in READ:
        values, name = torch.zeros(100003, dtype=dtype), str(dtype).removeprefix("torch.")
        yield f"{name} top_k", partial(smallest, values, like, number, like, k=0.1, largest=True)
    first, k = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    yield "float32 smallest of all", partial(smallest, torch.zeros(100003), None, None, like, k=100)
    yield "float32 smallest, ranks", partial(smallest, torch.zeros(100003), like, None, like, k=k, offset=first)
    yield "random_subset", partial(smallest, None, like, number, like, k=0.1, drawn=2**60 + 1)
    yield "random_subset, positions", partial(smallest, None, like, None, like, k=0.1, drawn=2**60 + 1)
