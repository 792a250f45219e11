"""How much a program takes: one table for all kernels, chosen by the number of columns alone, so that sums are added
in an order that depends on nothing else.  No autotuning: a first call compiles one kernel, and results repeat.
"""

from __future__ import annotations

from typing import NamedTuple

from fastdiv.backends.triton.language import INTERPRETED


class Shape(NamedTuple):
    """ROWS x BLOCK elements at a time, by `warps` warps."""

    rows: int
    block: int
    warps: int


# A thread holds block / (32 warps) elements of every array: registers, which kernels with many arrays run out of first.
# ptxas keeps to 128 of them where two programs then fit a processor, and spills what is over: on two models sums get 4
# elements a thread (8 spill on sm_80 and sm_90; 4 with 8 warps on sm_90 and sm_120), the rest 8 (16 would).
_LARGEST = {
    # kernel: (block, warps)
    "accumulate": (4096, 8),
    "accumulate_pair": (512, 4),
    "compare": (1024, 4),
    "rank": (2048, 8),
    "gradient": (2048, 8),
    "gradient_pair": (1024, 4),
}

# How many steps ahead of its sums `accumulate` fetches logits, by (two models, a softcap); 1: not ahead.  Three hide
# the memory best (one model, bfloat16, H200: 1.20 ms against 1.57 ms with 1), but on some target ptxas of Triton 3.7
# spills 8 or 16 bytes with more than these.  That of 3.6 spills as much with these in KL with a softcap on sm_80 and
# sm_100.
_STAGES = {(False, False): 3, (False, True): 1, (True, False): 2, (True, True): 3}

SCALARS = Shape(128, 1, 4)
"""A row is one thread's."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def shape(kernel: str, columns: int) -> Shape:
    """The shape for `columns` columns."""
    if INTERPRETED:
        # Its cost is per operation, whatever the size; several blocks a row are to be seen at small vocabularies too.
        return Shape(16, min(256, max(power_of_two(columns), 16)) if columns <= 2048 else 4096, 4)
    block, warps = _LARGEST[kernel]
    block = min(block, max(power_of_two(columns), 128))
    return Shape(1, block, min(warps, max(block // 128, 1)))


def stages(pair: bool, softcap: bool) -> int:
    """How many steps ahead `accumulate` fetches the logits of two models or one, with a softcap or without."""
    return _STAGES[pair, softcap]
