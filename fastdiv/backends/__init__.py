"""Which backend sums and differentiates rows: `native` (C++ on a CPU), `cuda` (NVIDIA GPUs), `triton` (GPUs) or
`reference` (plain torch, every dtype and device).

A backend is five operations on rows; it knows nothing of callers:

    accumulate  adds a tile's columns to the rows' state
    compare     sums that need the finished normalisers: a second look
    finish      from sums to outputs
    prepare     from upstream gradients to the coefficients of the row gradient
    gradient    writes row gradients (see fastdiv.statistics)
"""

from __future__ import annotations

import abc
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv import accept, statistics
from fastdiv.request import Request
from fastdiv.statistics import Prepared, Sums, Tokens
from fastdiv.tiles import Projection, Rows, Terms, Tile

_LOG = logging.getLogger("fastdiv")


class TokenKernels(NamedTuple):
    """Kernels over tokens, in place of the plain torch of `fastdiv.ops.covariance` and `fastdiv.select`."""

    covariance: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    """(x, y, mask, dtype, process_group) -> the fields of `MaskedCovariance`."""
    smallest: Callable[..., Tensor]
    """(scores, mask, index, like, *, k, largest, drawn, offset, process_group) -> the k smallest by (key, index)."""


class Backend(abc.ABC):
    """The five operations.  The two that are O(rows) are plain torch unless a backend has its own."""

    name: str
    skips_rows = False
    """Whether it takes `Tokens.mask` itself, so that logits that exist need no list of their rows."""

    @abc.abstractmethod
    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""

    @abc.abstractmethod
    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        """Adds to `state` [n, len(STATE)] what `wanted` asks for, and finds the logits [n, K] of labels in the tile.

        A tile that begins at column 0 is a row's first.
        """

    def accumulate_on_chip(
        self, projection: Projection, tokens: Tokens, wanted: int, state: Tensor, label_logits: Tensor
    ) -> bool:
        """`accumulate` of a whole vocabulary from hidden states, with no logits in memory; False: not here."""
        return False

    @abc.abstractmethod
    def compare(self, tile: Tile, terms: Terms, sums: Sums, rank: bool) -> None:
        """Adds to `sums.compared` [n, terms, 3], and with `rank` to `sums.rank` [n, K] the logits above a label's."""

    def look(self, tile: Tile, wanted: int, terms: Terms, sums: Sums, rank: bool) -> None:
        """`accumulate` and `compare` of whole rows."""
        self.accumulate(tile, wanted, sums.state, sums.label_logits)
        self.compare(tile, terms, sums, rank)

    def finish(self, request: Request, tokens: Tokens, sums: Sums) -> list[Tensor]:
        """The outputs of a request, [n] or [n, K] each."""
        return statistics.finish(request, tokens, sums, self.skips_rows)

    def prepare(self, request: Request, tokens: Tokens, sums: Sums, upstream: dict[str, Tensor]) -> Prepared:
        """What `gradient` needs to know of the upstream gradients, [n] or [n, K] each."""
        return statistics.prepare(request, tokens, sums, upstream)

    def value_and_gradient(
        self, tile: Tile, request: Request, sums: Sums, upstream: dict[str, Tensor], student: Rows
    ) -> bool:
        """All sums of whole rows, and the row gradients of sum upstream * output, in one go; False: not of these."""
        return False

    def token_kernels(self) -> TokenKernels | None:
        """Those of masked covariance and selection; None: plain torch does it."""
        return None

    @abc.abstractmethod
    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        """Writes the gradient of each logit to where `student` and `teacher` say; None: nobody wants it."""


NAMES = ("native", "cuda", "triton", "reference")
"""Every backend, the preferred one first."""


# Not functools.cache, which torch.compile does not see through.
_LOADED: dict[str, Backend | str] = {}


def _load(name: str) -> Backend | str:
    """The backend, or why it is absent."""
    if name not in _LOADED:
        _LOADED[name] = _import(name)
    return _LOADED[name]


def _import(name: str) -> Backend | str:
    if name == "reference":
        from fastdiv.backends.reference import Reference

        return Reference()
    if name == "triton":
        from fastdiv.backends.triton import Triton

        try:
            return Triton()
        except ImportError as error:
            return str(error)
    if name == "cuda":
        try:
            from fastdiv.backends.cuda import Cuda

            return Cuda()
        except ImportError as error:
            return str(error)
    try:
        from fastdiv.backends.native import Native
    except ImportError as error:
        return (
            f"fastdiv._C is not built or does not load ({error}); reinstall with FASTDIV_BUILD=cpu and a C++ compiler"
        )
    return Native()


def get(name: str) -> Backend:
    """The backend called `name`.  Raises ValueError for an unknown name, RuntimeError for an absent backend."""
    backend = _load(accept.name(accept.UNNAMED, "backend", name, NAMES))
    if isinstance(backend, str):
        raise RuntimeError(f"backend {name!r} is absent: {backend}")
    return backend


def available() -> dict[str, str | None]:
    """Backend name -> None where it is present, else why it is absent."""
    return {name: reason if isinstance(reason := _load(name), str) else None for name in NAMES}


def _refusal(backend: Backend, dtypes: list[torch.dtype], device: torch.device) -> str | None:
    return next((reason for dtype in dtypes if (reason := backend.refuses(dtype, device))), None)


def select(dtypes: list[torch.dtype], device: torch.device, name: str | None) -> str:
    """The name of the backend for inputs of these dtypes and device.

    An explicit `name` or FASTDIV_BACKEND is obeyed or refused with an error; else the first of `NAMES` that is
    present and takes the inputs.  FASTDIV_LOG=1 says why the others were passed over.  `checks.named` gives errors
    the operator's name.
    """
    asked = name or os.environ.get("FASTDIV_BACKEND")
    if asked:
        reason = _refusal(get(asked), dtypes, device)
        if reason:
            raise ValueError(f"{accept.UNNAMED}: backend {asked!r} was asked for but {reason}")
        return asked
    for candidate in NAMES:
        backend = _load(candidate)
        reason = backend if isinstance(backend, str) else _refusal(backend, dtypes, device)
        if reason is None:
            return candidate
        _LOG.info("backend %s passed over: %s", candidate, reason)
    raise RuntimeError(f"no backend takes {dtypes} on {device}")
