"""CUDA kernels of csrc/cuda: float32, float16 and bfloat16 rows on NVIDIA GPUs.

Without a GPU the same kernels can run on CPU tensors, threads in lock-step: for tests, by `fastdiv._lockstep`.
"""

from __future__ import annotations

import importlib
import os
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiv import backends
from fastdiv.backends import Backend, TokenKernels
from fastdiv.backends.addresses import DTYPES, NUMBERS, Addresses, fits, split
from fastdiv.request import Request
from fastdiv.statistics import WANTED, Prepared, Sums, Tokens, usable
from fastdiv.tiles import Projection, Rows, Terms, Tile

_BESIDE_A_DIVERGENCE = WANTED["first"]
"""What the kernels of two-pass divergences sum in their first look beside the normalisers."""


def in_lockstep() -> bool:
    """Whether the kernels run on a CPU, as tests want it."""
    return os.environ.get("FASTDIV_LOCKSTEP", "0") not in ("", "0")


def module() -> Any:
    """The native module with the kernels.  Raises ImportError where there is none."""
    native = importlib.import_module("fastdiv._lockstep" if in_lockstep() else "fastdiv._C")
    if not hasattr(native, "cuda"):
        raise ImportError("fastdiv._C has no CUDA kernels; reinstall with FASTDIV_BUILD=cuda where nvcc is")
    if not fits(native):
        raise ImportError(f"{native.__name__} was built from other sources than this Python code")
    return native


def architectures(native: Any) -> list[str]:
    """What a native module has code for: sm_90 runs on 9.x, ptx_100 on 10.0 and everything later; [] for none."""
    cuda = getattr(native, "cuda", None)
    return cuda.architectures.split() if cuda else []


def runs_on(built: list[str], major: int, minor: int) -> bool:
    """Whether code for one of `built` runs on a GPU of that compute capability."""
    for name in built:
        kind, ten, one, only = re.fullmatch(r"(sm|ptx)_(\d+)(\d)([af]?)", name).groups()  # type: ignore[union-attr]
        own = int(ten), int(one)
        same = own == (major, minor) if only == "a" else own[0] == major and own[1] <= minor
        if same or (kind == "ptx" and not only and own <= (major, minor)):
            return True
    return False


def queue(device: torch.device) -> tuple[int, int]:
    """(device, stream) of a launch; kernels in lock-step on a CPU have none."""
    if device.type == "cpu":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


class Cuda(Backend):
    """One block a row, or a cluster of blocks that keeps the row on the chip for a second look.

    Raises ImportError where no kernel could run.
    """

    name = "cuda"
    skips_rows = True

    def __init__(self) -> None:
        self._native = module()
        self._built = architectures(self._native)
        if not in_lockstep() and not torch.cuda.is_available():
            raise ImportError(f"torch sees no GPU; the kernels here are for {', '.join(self._built)}")

    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""
        home = "cpu" if in_lockstep() else "cuda"
        if device.type != home:
            return f"it runs on {home}, got {device}"
        if dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, got {dtype}"
        if home == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if not runs_on(self._built, *capability):
                return f"it was built for {', '.join(self._built)}, got sm_{capability[0]}{capability[1]}"
        return None

    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        self._statistics(tile, wanted, state, label_logits)

    def _statistics(
        self,
        tile: Tile,
        wanted: int,
        state: Tensor,
        label_logits: Tensor,
        divergence: int = -1,
        parameter: float = 0.0,
        sums: Tensor | None = None,
        known: bool = False,
    ) -> None:
        """One launch; `sums` [n, >= 3] is added to where it begins in each row."""
        t = Addresses(self._native, tile, tile.tokens.labels)
        to, per_row = (0, 0) if sums is None else (sums.data_ptr(), sums.stride(0))
        fresh = tile.first_column == 0
        self._native.cuda.statistics(
            t.tile, wanted, divergence, parameter, fresh, known, t.keep(state), t.keep(label_logits), to, per_row,
            *queue(state.device),
        )  # fmt: skip

    def look(self, tile: Tile, wanted: int, terms: Terms, sums: Sums, rank: bool) -> None:
        """Both looks: in one launch for a divergence beside log_prob and entropy."""
        if terms and not wanted & ~_BESIDE_A_DIVERGENCE:
            self._compare(tile, wanted, terms[:1], sums, 0, known=False)
            self._compare(tile, wanted, terms[1:], sums, 1, known=True)
            if rank:
                self._rank(tile, sums)
        else:
            super().look(tile, wanted, terms, sums, rank)

    def accumulate_on_chip(
        self, projection: Projection, tokens: Tokens, wanted: int, state: Tensor, label_logits: Tensor
    ) -> bool:
        triton = self._triton()
        return triton is not None and triton.accumulate_on_chip(projection, tokens, wanted, state, label_logits)

    def compare(self, tile: Tile, terms: Terms, sums: Sums, rank: bool) -> None:
        self._compare(tile, 0, terms, sums, 0, known=True)
        if rank:
            self._rank(tile, sums)

    def _compare(self, tile: Tile, wanted: int, terms: Terms, sums: Sums, first: int, known: bool) -> None:
        for i, (divergence, parameter) in enumerate(terms, first):
            number, own = NUMBERS[divergence.name], sums.compared[:, i]
            self._statistics(tile, wanted, sums.state, sums.label_logits, number, parameter, own, known)

    def _rank(self, tile: Tile, sums: Sums) -> None:
        t = Addresses(self._native, tile, tile.tokens.labels)
        self._native.cuda.rank(t.tile, t.keep(sums.label_logits), t.keep(sums.rank), *queue(sums.rank.device))

    @staticmethod
    def _triton() -> Backend | None:
        """The Triton backend, where it is there: it has kernels for what is done once a row."""
        return None if in_lockstep() or backends.available()["triton"] else backends.get("triton")

    def finish(self, request: Request, tokens: Tokens, sums: Sums) -> list[Tensor]:
        triton = self._triton()
        return triton.finish(request, tokens, sums) if triton else super().finish(request, tokens, sums)

    def prepare(self, request: Request, tokens: Tokens, sums: Sums, upstream: dict[str, Tensor]) -> Prepared:
        triton = self._triton()
        prepare = triton.prepare if triton else super().prepare
        return prepare(request, tokens, sums, upstream)

    def value_and_gradient(
        self, tile: Tile, request: Request, sums: Sums, upstream: dict[str, Tensor], student: Rows
    ) -> bool:
        if tile.teacher is not None or not set(upstream) <= {"log_prob", "entropy", "logsumexp"}:
            return False
        tokens, t = tile.tokens, Addresses(self._native, tile, tile.tokens.labels)

        def weights(name: str) -> int:
            shape = tokens.labels.shape if name == "log_prob" else tokens.inverse_temperature.shape
            if name not in upstream:
                return t.keep(sums.label_logits.new_zeros(shape))
            return t.keep(usable(name, upstream[name], tokens).float().contiguous())

        done: bool = self._native.cuda.value_and_gradient(
            t.tile, t.keep(sums.state), t.keep(sums.label_logits), weights("log_prob"), weights("entropy"),
            weights("logsumexp"), t.target(student), *queue(sums.state.device),
        )  # fmt: skip
        return done

    def token_kernels(self) -> TokenKernels:
        from fastdiv.backends.cuda import tokens

        kernels = self._native.cuda
        return TokenKernels(partial(tokens.covariance, kernels), partial(tokens.smallest, kernels))

    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        t = Addresses(self._native, tile, tile.tokens.labels)
        gains = t.keep(prepared.labels), t.keep(prepared.gains), prepared.labels.shape[1]
        self._native.cuda.gradient(
            t.tile, *split(prepared.terms), t.keep(state), t.keep(prepared.c), *gains,
            t.target(student), t.target(teacher), *queue(state.device),
        )  # fmt: skip
