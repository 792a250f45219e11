"""The C++ kernels of csrc/: float32, float16 and bfloat16 rows on a CPU."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv import _C
from fastdiv.backends import Backend
from fastdiv.backends.addresses import DTYPES, Addresses, address, fits, split
from fastdiv.divergences import DIVERGENCES
from fastdiv.request import Request
from fastdiv.statistics import OUTPUTS, Prepared, Sums, Tokens, output_dtype, per_label
from fastdiv.tiles import Rows, Terms, Tile

if not fits(_C):
    raise ImportError("it was built from other sources than this Python code")
# A ValueError, not an ImportError: a request that cannot be met is no absent backend.
if _isa := os.environ.get("FASTDIV_ISA"):
    _C.choose_isa(_isa)


class _Finished(NamedTuple):
    """An output as `_C.finish` writes it."""

    kind: _C.Output
    per_label: bool
    dtype: torch.dtype


@functools.lru_cache(maxsize=256)
def _finished(names: tuple[str, ...]) -> list[_Finished]:
    numbers = {name: number for number, name in enumerate(OUTPUTS)}
    result, compared = [], 0
    for name in names:
        if name in numbers:
            output = _C.Output(numbers[name], -1, 0.0, 0.0)
        elif (kls := DIVERGENCES[name].one_pass) is not None:
            output = _C.Output(-1, -1, *kls)
        else:
            output = _C.Output(-1, compared, 0.0, 0.0)
            compared += 1
        result.append(_Finished(output, per_label(name), output_dtype(name, torch.float32)))
    return result


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

    def finish(self, request: Request, tokens: Tokens, sums: Sums) -> list[Tensor]:
        n, k = tokens.labels.shape
        read = (tokens.inverse_temperature, tokens.labels, sums.state, sums.label_logits, sums.compared, sums.rank)
        sizes = n, k, sums.compared.shape[1], tokens.ignore_index, tokens.vocabulary
        rows = _C.FinishedRows(*sizes, *(address(tensor) for tensor in read))
        outputs = []
        for output in _finished(request.outputs):
            outputs.append(torch.empty((n, k) if output.per_label else n, dtype=output.dtype))
            _C.finish(rows, output.kind, outputs[-1].data_ptr(), torch.get_num_threads())
        return outputs

    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        t = Addresses(_C, tile, prepared.labels)
        addresses = t.keep(state), t.keep(prepared.c), t.keep(prepared.gains)
        targets = t.target(student), t.target(teacher)
        _C.gradient(t.tile, *split(prepared.terms), *addresses, *targets, torch.get_num_threads())
