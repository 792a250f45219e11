"""Tiles stay within the workspace, and use it."""

from __future__ import annotations

import pytest
import torch

from fastdiv import LinearLogits
from fastdiv.ops.call import prepare
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


@pytest.mark.parametrize(
    ("operator", "outputs", "device", "want"),
    [
        ("token_stats", ("entropy",), "cpu", 128 * MIB),
        ("linear_loss", ("entropy",), "cpu", 128 * MIB),
        ("token_stats", ("entropy", "reverse_kl"), "meta", 256 * MIB),
        ("token_stats", ("entropy", "js"), "meta", 1024 * MIB),
        ("linear_loss", ("entropy",), "meta", 1024 * MIB),
    ],
)
def test_the_default_depends_on_what_the_tiles_are(
    operator: str, outputs: tuple[str, ...], device: str, want: int
) -> None:
    head = LinearLogits(torch.zeros(3, 4, device=device), torch.zeros(8, 4, device=device))
    call = prepare(
        operator,
        head,
        None,
        teacher=head if len(outputs) > 1 else None,
        outputs=outputs,
        parameters={},
        temperature=1.0,
        mask=None,
        ignore_index=-100,
        backend=None,
        workspace=None,
    )
    assert call.request.workspace == want
