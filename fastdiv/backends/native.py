"""The C++ kernels of csrc/: float32, float16 and bfloat16 rows on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiv import _C
from fastdiv.backends import Backend
from fastdiv.divergences import DIVERGENCES
from fastdiv.statistics import STATE, Prepared, Sums
from fastdiv.tiles import Rows, Terms, Tile

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

if _C.divergences != list(DIVERGENCES) or _C.state_fields != len(STATE):
    raise ImportError("it was built from other sources than this Python code")


class _Tile:
    """A `Tile` as the kernels take it; keeps the tensors alive that it points into."""

    def __init__(self, tile: Tile, labels: Tensor) -> None:
        self._alive: list[Tensor] = []
        student = self._logits(tile.student)
        teacher = self._logits(tile.teacher) if tile.teacher else _C.Logits(0, 0, 0, 1.0, 0.0)
        inverse_temperature = self.keep(tile.tokens.inverse_temperature)
        self.tile = _C.Tile(
            student,
            teacher,
            tile.tokens.inverse_temperature.numel(),
            tile.columns,
            tile.first_column,
            inverse_temperature,
            self.keep(labels),
            labels.shape[1],
        )

    def keep(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor that lives as long as this object; 0 for None."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()

    def _logits(self, rows: Rows) -> _C.Logits:
        self._alive.append(rows.tensor)
        return _C.Logits(
            rows.tensor.data_ptr(),
            self.keep(rows.offsets()),
            _DTYPES[rows.tensor.dtype],
            rows.transform.scale,
            rows.transform.softcap,
        )

    def target(self, rows: Rows | None) -> tuple[int, int]:
        """(address, address of the row offsets) of a gradient to be written."""
        if rows is None:
            return 0, 0
        self._alive.append(rows.tensor)
        return rows.tensor.data_ptr(), self.keep(rows.offsets())


_NUMBERS = {name: number for number, name in enumerate(DIVERGENCES)}


def _split(terms: Terms) -> tuple[list[int], list[float]]:
    return [_NUMBERS[divergence.name] for divergence, _ in terms], [parameter for _, parameter in terms]


class Native(Backend):
    """Vectorised C++ over rows, one row per thread, with torch's number of threads."""

    name = "native"

    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""
        if device.type != "cpu":
            return f"it runs on cpu, got {device}"
        if dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, got {dtype}"
        return None

    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        t = _Tile(tile, tile.tokens.labels)
        _C.accumulate(t.tile, wanted, t.keep(state), t.keep(label_logits), torch.get_num_threads())

    def compare(self, tile: Tile, terms: Terms, sums: Sums, rank: bool) -> None:
        t = _Tile(tile, tile.tokens.labels)
        addresses = t.keep(sums.state), t.keep(sums.label_logits), t.keep(sums.compared)
        _C.compare(t.tile, *_split(terms), *addresses, t.keep(sums.rank if rank else None), torch.get_num_threads())

    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        t = _Tile(tile, prepared.labels)
        addresses = t.keep(state), t.keep(prepared.c), t.keep(prepared.gains), *t.target(student), *t.target(teacher)
        _C.gradient(t.tile, *_split(prepared.terms), *addresses, torch.get_num_threads())
