"""The divergences' terms from the textbook, with 50 digits: what `fastdiv.pointwise` is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from types import ModuleType

import mpmath
import torch
from torch import Tensor

mpmath.mp.dps = 50
Number = mpmath.mpf
ZERO = mpmath.mpf(0)


def _log_ratio_times(weight: Number, top: Number, bottom: Number) -> Number:
    """weight log(top / bottom) with 0 log = 0."""
    if weight == 0:
        return ZERO
    if bottom == 0:
        return mpmath.inf
    return -mpmath.inf if top == 0 else weight * mpmath.log(top / bottom)


def _weights(a: Number) -> tuple[Number, Number]:
    """Of q and of p; a negative `a` is beta - 1."""
    return (1 + a, -a) if a < 0 else (a, 1 - a)


def _mixture(p: Number, q: Number, a: Number) -> Number:
    of_q, of_p = _weights(a)
    return of_q * q + of_p * p


# Each is (p, q, a) -> number; derivatives are with respect to log p and log q.
TERMS: dict[str, Callable[[Number, Number, Number], Number]] = {
    "forward_kl_value": lambda p, q, a: _log_ratio_times(q, q, p) + p - q,
    "forward_kl_dlp": lambda p, q, a: p - q,
    "forward_kl_dlq": lambda p, q, a: _log_ratio_times(q, q, p),
    "reverse_kl_value": lambda p, q, a: _log_ratio_times(p, p, q) + q - p,
    "reverse_kl_dlp": lambda p, q, a: _log_ratio_times(p, p, q),
    "reverse_kl_dlq": lambda p, q, a: q - p,
    "jeffreys_value": lambda p, q, a: _log_ratio_times(p, p, q) + _log_ratio_times(q, q, p),
    "jeffreys_dlp": lambda p, q, a: _log_ratio_times(p, p, q) + p - q,
    "jeffreys_dlq": lambda p, q, a: _log_ratio_times(q, q, p) + q - p,
    "js_value": lambda p, q, a: (
        _weights(a)[0] * _log_ratio_times(q, q, _mixture(p, q, a))
        + _weights(a)[1] * _log_ratio_times(p, p, _mixture(p, q, a))
    ),
    "js_dlp": lambda p, q, a: _weights(a)[1] * _log_ratio_times(p, p, _mixture(p, q, a)),
    "js_dlq": lambda p, q, a: _weights(a)[0] * _log_ratio_times(q, q, _mixture(p, q, a)),
    "tv_value": lambda p, q, a: abs(p - q) / 2,
    "tv_dlp": lambda p, q, a: mpmath.sign(p - q) * p / 2,
    "tv_dlq": lambda p, q, a: -mpmath.sign(p - q) * q / 2,
}

PARAMETERS = (0.5, 0.1, 0.9, 1e-6, -1e-6)
# Both sides of every threshold, and far from them; 1.4 and 1.1 show a threshold that moved outwards.
_SIZES = (0.0, 1e-6, 1e-3, 0.1, 0.3, 0.4999, 0.5001, 0.8, 1.1, 1.4, 3.0, 20.0)
_BASES = (1.0, 0.3, 1e-6)


@cache
def points(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(d, p, q): q given, p = q exp(d) rounded, in `dtype`; then the limits, where d is what logits give."""
    ds = [sign * size for size in _SIZES for sign in (1.0, -1.0)]
    rows = [(d, base) for d, base in product(ds, _BASES) if base * float(mpmath.exp(d)) < 4.0]
    d = torch.tensor([d for d, _ in rows], dtype=dtype)
    q = torch.tensor([base for _, base in rows], dtype=dtype)
    p = torch.tensor(
        [float(mpmath.mpf(b) * mpmath.exp(mpmath.mpf(x))) for x, b in zip(d.tolist(), q.tolist(), strict=True)],
        dtype=dtype,
    )
    inf = float("inf")
    one_is_0 = [(-inf, 0.0, 0.4), (inf, 0.4, 0.0)]
    both_are_0 = [(x, 0.0, 0.0) for x in (float("nan"), inf, -inf, 7.0)]
    limits = torch.tensor(one_is_0 + both_are_0, dtype=dtype)
    return tuple(torch.cat([x, y]) for x, y in zip((d, p, q), limits.unbind(1), strict=True))  # type: ignore[return-value]


@cache
def exact(name: str, dtype: torch.dtype, a: float) -> Tensor:
    """The term at `points(dtype)` with p = q exp(d) unrounded (so that d decides near equality), float64."""
    d, p, q = points(dtype)
    weight = mpmath.mpf(torch.tensor(a, dtype=dtype).item())
    result = []
    for di, pi, qi in zip(d.tolist(), p.tolist(), q.tolist(), strict=True):
        both = pi > 0 and qi > 0
        p_exact = mpmath.mpf(qi) * mpmath.exp(mpmath.mpf(di)) if both else mpmath.mpf(pi)
        result.append(float(TERMS[name](p_exact, mpmath.mpf(qi), weight)))
    return torch.tensor(result, dtype=torch.float64)


def misses(name: str, dtype: torch.dtype, a: float, got: Tensor) -> Tensor:
    """Where `got`, a function's values at `points(dtype)`, is not what it should be.

    p is rounded, and just outside the near branch a value loses a factor of 8 to cancellation.  A derivative that is a
    difference of first-order terms is judged by their size.
    """
    d, p, _ = points(dtype)
    want, got = exact(name, dtype, a), got.double().expand(d.shape)
    value = name.endswith("_value")
    scale = want.abs() if value else want.abs() + (p.double() * d.double().abs()).nan_to_num(0)
    off = (got - want).abs() > (64 if value else 16) * torch.finfo(dtype).eps * scale + 1e-300
    return torch.where(torch.isfinite(want), off | torch.isnan(got), got != want)


def faults(module: ModuleType, names: Iterable[str] = TERMS) -> list[str]:
    """Every function of a `pointwise` module that misses the oracle somewhere, with the worst point."""
    found = []
    for dtype in (torch.float64, torch.float32):
        d, p, q = points(dtype)
        for name, a in product(names, PARAMETERS):
            got = torch.as_tensor(getattr(module, name)(d, p, q, torch.tensor(a, dtype=dtype)))
            wrong = misses(name, dtype, a, got)
            if wrong.any():
                i = int(wrong.nonzero()[0])
                found.append(f"{name} {dtype} a = {a} at d, p, q = {d[i].item()}, {p[i].item()}, {q[i].item()}")
    return found
