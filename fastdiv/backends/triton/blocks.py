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


# Elements a thread holds of each lane array: registers, which a kernel with many of them runs out of first.
_LARGEST = {
    # kernel          block  warps
    "accumulate": (4096, 8),  # 16 a thread: up to four arrays of sums
    "accumulate_pair": (2048, 8),  # 8 a thread: six arrays, and three exponentials' temporaries
    "compare": (2048, 8),  # three arrays, two exponentials and the divergence's three functions
    "rank": (4096, 8),
    "gradient": (2048, 8),  # no sums, but both gradients' temporaries
}

FRAMES = Shape(128, 1, 4)
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
    return Shape(1, block, min(warps, max(block // 256, 1)))
