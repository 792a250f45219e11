"""The C++ kernels of csrc/: float32, float16 and bfloat16 rows on a CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastdiv import _C
from fastdiv.backends import Backend
from fastdiv.backends.addresses import DTYPES, Addresses, fits, split
from fastdiv.statistics import Prepared, Sums
from fastdiv.tiles import Rows, Terms, Tile

if not fits(_C):
    raise ImportError("it was built from other sources than this Python code")
# A ValueError, not an ImportError: a request that cannot be met is no absent backend.
if _isa := os.environ.get("FASTDIV_ISA"):
    _C.choose_isa(_isa)


class Native(Backend):
    """Vectorised C++ over rows, one row per thread, with torch's number of threads."""

    name = "native"

    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""
        if device.type != "cpu":
            return f"it runs on cpu, got {device}"
        if dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, got {dtype}"
        return None

    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        t = Addresses(_C, tile, tile.tokens.labels)
        _C.accumulate(t.tile, wanted, t.keep(state), t.keep(label_logits), torch.get_num_threads())

    def compare(self, tile: Tile, terms: Terms, sums: Sums, rank: bool) -> None:
        t = Addresses(_C, tile, tile.tokens.labels)
        addresses = t.keep(sums.state), t.keep(sums.label_logits), t.keep(sums.compared)
        _C.compare(t.tile, *split(terms), *addresses, t.keep(sums.rank if rank else None), torch.get_num_threads())

    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        t = Addresses(_C, tile, prepared.labels)
        addresses = t.keep(state), t.keep(prepared.c), t.keep(prepared.gains)
        targets = t.target(student), t.target(teacher)
        _C.gradient(t.tile, *split(prepared.terms), *addresses, *targets, torch.get_num_threads())
