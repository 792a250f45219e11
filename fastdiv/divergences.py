"""The table of divergences: name -> functions of `fastdiv.pointwise`, parameter, and how many passes it takes.

A new divergence is three functions in `pointwise` and one line here; every backend, operator and test finds it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastdiv import pointwise

Pointwise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Parameter:
    """A divergence's parameter, with its default and its open interval of allowed values."""

    name: str
    default: float
    low: float
    high: float
    outside: str
    """What to use at the ends of the interval, for the error message."""


@dataclass(frozen=True)
class Divergence:
    """One divergence between student p and teacher q.

    `one_pass` holds (f, r) where the divergence is f KL(q||p) + r KL(p||q): these merge from any cut of the vocabulary
    and need no second look at the logits.  None: the normalisers must be known before the terms can be summed.
    """

    name: str
    formula: str
    parameter: Parameter | None = None
    one_pass: tuple[float, float] | None = None

    @property
    def value(self) -> Pointwise:
        return self._function("value")

    @property
    def dlp(self) -> Pointwise:
        return self._function("dlp")

    @property
    def dlq(self) -> Pointwise:
        return self._function("dlq")

    def argument(self, parameter: float) -> float:
        """A parameter as `pointwise` takes it: a float32 near 1 has no digits for what is missing to 1."""
        return parameter - 1.0 if self.parameter and parameter > 0.5 else parameter

    def _function(self, kind: str) -> Pointwise:
        function: Pointwise = getattr(pointwise, f"{self.name}_{kind}")
        return function


_BETA = Parameter("beta", 0.5, 0.0, 1.0, "at the ends use 'forward_kl' (teacher || student) or 'reverse_kl'")

DIVERGENCES = {
    d.name: d
    for d in (
        Divergence("forward_kl", "KL(q || p) = sum q (log q - log p)", one_pass=(1.0, 0.0)),
        Divergence("reverse_kl", "KL(p || q) = sum p (log p - log q)", one_pass=(0.0, 1.0)),
        Divergence("jeffreys", "KL(p || q) + KL(q || p)", one_pass=(1.0, 1.0)),
        Divergence("js", "beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p", parameter=_BETA),
        Divergence("tv", "sum |p - q| / 2"),
    )
}
