"""The shape of tiles: the one place that decides how a vocabulary is walked."""

from __future__ import annotations

from typing import NamedTuple

# Elements of one projected tile.  2048 x 1024 float32 is 8 MiB, which stays in a last-level cache between the product
# that writes it, the row kernel and the products that read it (4096 hidden 576 columns 49152, 2 cores, AVX2: 1024
# columns 0.745 s, 4096 columns 0.825 s, whole 0.850 s a product; narrower gains nothing).
_TILE = 2 << 20
_NARROWEST = 512  # columns: below this the products lose more than the cache gives
_ALIGNED = 16  # elements from which on rows of a tile begin: products of a GPU are slower on rows that begin elsewhere
_LEAST = 1 << 20  # bytes of a workspace that is to be as small as possible: a hundredth of what is usual


class Plan(NamedTuple):
    """Tiles of `rows` x `columns`, row by row of tiles."""

    rows: int
    columns: int

    def row_slices(self, total: int) -> list[slice]:
        return _slices(total, self.rows)

    def column_slices(self, total: int) -> list[slice]:
        return _slices(total, self.columns)


def row_stride(columns: int) -> int:
    """Elements from a row of a projected tile to the next."""
    return -(-columns // _ALIGNED) * _ALIGNED


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _evenly(total: int, largest: int) -> int:
    """A step of at most `largest` that leaves no small rest."""
    largest = max(largest, 1)
    return -(-total // -(-total // largest)) if total else 1


def plan(
    rows: int, vocabulary: int, projected: int, itemsize: int, workspace: int, full_rows: bool, cached: bool
) -> Plan:
    """The tile for `projected` sides (0, 1 or 2) whose logits must be formed, within `workspace` bytes for all of them
    (0: as few as make sense).

    Logits that exist are one tile.  Sums that merge take all rows x a slice of the vocabulary, so that each slice of
    the weight gradient is finished at one visit.  What needs a second look takes full rows.  `cached`: a tile is worth
    keeping in a CPU's cache; a GPU's large products gain more from wide tiles.
    """
    if projected == 0:
        return Plan(max(rows, 1), vocabulary)
    budget = max((workspace or _LEAST) // (itemsize * projected), 1)
    if full_rows:
        return Plan(_evenly(rows, budget // row_stride(vocabulary)), vocabulary)
    narrowest = min(_NARROWEST, vocabulary)
    tile_rows = _evenly(rows, budget // row_stride(narrowest))
    columns = max(narrowest, (min(_TILE, budget) if cached else budget) // tile_rows // 64 * 64)
    return Plan(tile_rows, min(columns, vocabulary))
