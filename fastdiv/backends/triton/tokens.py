"""What kernels over tokens share: `covariance` and `selection`."""

# Kernels have no types to check; what calls them has.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fastdiv.backends.triton.blocks import Shape
from fastdiv.backends.triton.language import function


@function
def taking_part(mask, at, rows):
    inside = at < rows
    if mask is not None:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return inside


def spread(count: int, shape: Shape, most: int) -> tuple[int, int]:
    """(programs, blocks each takes), at least one program: it has scalars to write."""
    blocks = max(triton.cdiv(count, shape.rows), 1)
    loops = triton.cdiv(blocks, most)
    return triton.cdiv(blocks, loops), loops
