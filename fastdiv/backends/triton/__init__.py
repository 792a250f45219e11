"""Triton kernels: float32, float16 and bfloat16 rows on NVIDIA and AMD GPUs, or on a CPU by Triton's interpreter.

Nothing here imports triton before the first launch.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from fastdiv.backends import Backend, TokenKernels
from fastdiv.request import Request
from fastdiv.statistics import Prepared, Sums, Tokens
from fastdiv.tiles import Projection, Rows, Terms, Tile

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class Triton(Backend):
    """One program a row, any GPU that Triton compiles for.

    Raises ImportError where no kernel could run.
    """

    name = "triton"
    skips_rows = True

    def __init__(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise ImportError("triton is not installed; pip install 'fastdiv[triton]'")
        if not torch.cuda.is_available() and not interpreted():
            raise ImportError("torch sees no GPU; TRITON_INTERPRET=1 runs it on a CPU, slowly")

    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""
        if device.type != ("cpu" if interpreted() else "cuda"):
            how = "runs on cpu with TRITON_INTERPRET=1" if interpreted() else "runs on cuda devices"
            return f"it {how}, got {device}"
        if dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, got {dtype}"
        return None

    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        _launch().accumulate(tile, wanted, state, label_logits)

    def accumulate_on_chip(
        self, projection: Projection, tokens: Tokens, wanted: int, state: Tensor, label_logits: Tensor
    ) -> bool:
        from fastdiv.backends.triton import linear

        linear.statistics(*projection, tokens.inverse_temperature, tokens.labels, wanted, state, label_logits)
        return True

    def compare(self, tile: Tile, terms: Terms, sums: Sums, rank: bool) -> None:
        if terms:
            _launch().compare(tile, terms, sums)
        if rank:
            _launch().rank(tile, sums)

    def finish(self, request: Request, tokens: Tokens, sums: Sums) -> list[Tensor]:
        outputs: list[Tensor] = _launch().finish(request, tokens, sums)
        return outputs

    def prepare(self, request: Request, tokens: Tokens, sums: Sums, upstream: dict[str, Tensor]) -> Prepared:
        prepared: Prepared = _launch().prepare(request, tokens, sums, upstream)
        return prepared

    def token_kernels(self) -> TokenKernels:
        from fastdiv.backends.triton import covariance, selection

        return TokenKernels(covariance.covariance, selection.smallest)

    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        _launch().gradient(tile, prepared, student, teacher)


def _launch() -> ModuleType:
    from fastdiv.backends.triton import launch

    return launch
