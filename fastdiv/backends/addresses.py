"""A tile's tensors as the kernels of csrc/ take them, on a CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiv.divergences import DIVERGENCES
from fastdiv.statistics import OUTPUTS, STATE
from fastdiv.tiles import Rows, Terms, Tile

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NUMBERS = {name: number for number, name in enumerate(DIVERGENCES)}


def fits(module: Any) -> bool:
    """Whether a native module was built from the sources that belong to this Python code."""
    known = [getattr(module, name, None) for name in ("divergences", "outputs", "state_fields")]
    return known == [list(DIVERGENCES), list(OUTPUTS), len(STATE)]


def split(terms: Terms) -> tuple[list[int], list[float]]:
    """Numbers and parameters of divergences."""
    return [NUMBERS[divergence.name] for divergence, _ in terms], [parameter for _, parameter in terms]


def address(tensor: Tensor) -> int:
    """The address of a contiguous tensor, which the caller keeps alive."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class Addresses:
    """A `Tile` in the terms of a native module; keeps the tensors alive that it points into."""

    def __init__(self, module: Any, tile: Tile, labels: Tensor) -> None:
        self._module = module
        self._alive: list[Tensor] = []
        tokens = tile.tokens
        self.tile = module.Tile(
            self._logits(tile.student),
            self._logits(tile.teacher) if tile.teacher else module.Logits(0, 0, 0, 0, 1.0, 0.0),
            tokens.inverse_temperature.numel(),
            tile.columns,
            tile.first_column,
            self.keep(tokens.inverse_temperature),
            self.keep(labels),
            labels.shape[1],
            self.keep(tokens.mask),
            tokens.ignore_index,
        )

    def keep(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor that lives as long as this object; 0 for None."""
        if tensor is None:
            return 0
        self._alive.append(tensor)
        return address(tensor)

    def _rows(self, rows: Rows) -> tuple[int, int, int, int]:
        self._alive.append(rows.tensor)
        offsets, stride = rows.place()
        return rows.tensor.data_ptr(), self.keep(offsets), stride, DTYPES[rows.tensor.dtype]

    def _logits(self, rows: Rows) -> Any:
        return self._module.Logits(*self._rows(rows), rows.transform.scale, rows.transform.softcap)

    def target(self, rows: Rows | None) -> Any:
        """Where a gradient is written; None: nowhere."""
        return self._module.Target(*(self._rows(rows) if rows else (0, 0, 0, 0)))
