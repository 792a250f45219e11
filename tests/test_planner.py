"""Tiles stay within the workspace, and use it."""

from __future__ import annotations

import pytest

from fastdiv.planner import plan

MIB = 1 << 20


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("full_rows", [True, False])
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("workspace", [8 * MIB, 128 * MIB, 256 * MIB])
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 49152), (64, 1000), (4096, 49152), (926, 151936), (100000, 32000)]
)
def test_tiles_fit_the_workspace(
    rows: int, vocabulary: int, workspace: int, sides: int, itemsize: int, full_rows: bool, cached: bool
) -> None:
    tiles = plan(rows, vocabulary, sides, itemsize, workspace, full_rows, cached)
    size = tiles.rows * tiles.columns * itemsize * sides
    assert size <= workspace
    assert 1 <= tiles.rows <= rows and 1 <= tiles.columns <= vocabulary
    if not cached and rows * vocabulary * itemsize * sides > workspace:
        assert size > workspace * 0.4  # a row or 64 columns more would not fit, or the rows are cut evenly


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("full_rows", [True, False])
def test_no_workspace_is_about_a_mebibyte(full_rows: bool, cached: bool) -> None:
    tiles = plan(4096, 49152, 1, 4, 0, full_rows, cached)
    assert 0.75 * MIB <= tiles.rows * tiles.columns * 4 <= MIB
