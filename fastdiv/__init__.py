"""Exact per-token log-probabilities, entropies and divergences of language models, fused and differentiable."""

from __future__ import annotations

import contextlib as _contextlib

from fastdiv import backends as _backends
from fastdiv import objectives, select, testing
from fastdiv.log import configure as _configure
from fastdiv.ops.covariance import MaskedCovariance, masked_covariance
from fastdiv.ops.divergence import divergence
from fastdiv.ops.linear import linear_loss
from fastdiv.ops.logprob import entropy, log_prob
from fastdiv.ops.stats import TokenStats, token_stats
from fastdiv.ops.value_and_gradient import value_and_gradient
from fastdiv.sources import LinearLogits, Logits, LogProbabilities

__version__ = "0.1.0"

__all__ = [
    "LinearLogits",
    "LogProbabilities",
    "Logits",
    "MaskedCovariance",
    "TokenStats",
    "divergence",
    "entropy",
    "info",
    "linear_loss",
    "log_prob",
    "masked_covariance",
    "objectives",
    "select",
    "testing",
    "token_stats",
    "value_and_gradient",
]


def info() -> dict[str, object]:
    """What is installed here: versions, backends (None, or why one is absent), the native build's instruction set
    and the GPUs that it has code for."""
    import sys

    import torch

    from fastdiv import backends

    found = backends.available()
    native: str | None = None
    built: list[str] = []
    if found["native"] is None:
        from fastdiv import _C
        from fastdiv.backends import cuda

        native, built = _C.isa(), cuda.architectures(_C)
    return {
        "fastdiv": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backends": found,
        "native_instruction_set": native,
        "cuda_architectures": built or None,
    }


_configure()
# 3 ms; were torch.compile to trace it at the first call, the second would be traced again.  The first call tells of a
# wrong FASTDIV_ISA, or `fastdiv info` in one line.
with _contextlib.suppress(ValueError):
    _backends._load("native")
