"""Triton kernels: float32, float16 and bfloat16 rows on NVIDIA and AMD GPUs, or on a CPU by Triton's interpreter.

Nothing here imports triton before the first launch.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from fastdiv.tiles import Rows, Terms, Tile

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class Triton:
    """One program a row, any GPU that Triton compiles for.

    Raises ImportError where no kernel could run.
    """

    name = "triton"

    def __init__(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise ImportError("triton is not installed; pip install 'fastdiv[triton]'")
        if not torch.cuda.is_available() and not _interpreted():
            raise ImportError("torch sees no GPU; TRITON_INTERPRET=1 runs it on a CPU, slowly")

    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""
        if device.type != ("cpu" if _interpreted() else "cuda"):
            how = "runs on cpu with TRITON_INTERPRET=1" if _interpreted() else "runs on cuda devices"
            return f"it {how}, got {device}"
        if dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, got {dtype}"
        return None

    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        if tile.labels.shape[0]:
            from fastdiv.backends.triton import launch

            launch.accumulate(tile, wanted, state, label_logits, fresh=False)

    def compare(
        self,
        tile: Tile,
        terms: Terms,
        state: Tensor,
        label_logits: Tensor,
        compared: Tensor,
        rank: Tensor | None,
    ) -> None:
        if tile.labels.shape[0]:
            from fastdiv.backends.triton import launch

            if terms:
                launch.compare(tile, terms, launch.frames(state, tile.inverse_temperature), compared)
            if rank is not None:
                launch.rank(tile, label_logits, rank)

    def gradient(
        self,
        tile: Tile,
        terms: Terms,
        state: Tensor,
        c: Tensor,
        label_gains: Tensor,
        student: Rows | None,
        teacher: Rows | None,
    ) -> None:
        if tile.labels.shape[0]:
            from fastdiv.backends.triton import launch

            frame = launch.frames(state, tile.inverse_temperature)
            launch.gradient(tile, terms, frame, c, label_gains, student, teacher)
