"""What the kernels are written in: `fastdiv.pointwise`, `fastdiv.rowwise` and their vocabulary as Triton functions.

`csrc/language.h` has the same names for C++, `fastdiv.language` for torch.
"""

# mypy: ignore-errors

from __future__ import annotations

import hashlib
import inspect
import types

import triton
import triton.language as tl

from fastdiv import pointwise, rowwise
from fastdiv.backends.triton import interpreted
from fastdiv.divergences import DIVERGENCES

INTERPRETED = interpreted()
"""Triton decides it as it meets the first kernel: from here on it stays."""


def function(f):
    """Something that kernels call: compiled into them; under the interpreter plain Python, which is much faster."""
    return f if INTERPRETED else triton.jit(f)


@function
def exp(x):
    return tl.exp(x)


@function
def log(x):
    return tl.log(x)


@function
def abs(x):
    return tl.abs(x)


@function
def where(condition, yes, no):
    return tl.where(condition, yes, no)


@function
def phi(d):
    """exp(d) - 1 - d for |d| <= 0.5: its series, the terms beyond d^7 folded back (Chebyshev)."""
    p = 1.99618e-4 * d + 1.39818919e-3
    p = p * d + 8.33318263e-3
    p = p * d + 4.16657947e-2
    p = p * d + 1.6666667e-1
    p = p * d + 0.5
    return d * d * p


@function
def psi(e, w):
    """w (u - log(1 + u)) with u = e / w, for -0.5 <= u <= 0.65, by log(1 + u) = 2 atanh(s), s = u / (2 + u)."""
    s = e / (2.0 * w + e)
    t = s * s
    p = 0.06666667 * t + 0.07692308
    p = p * t + 0.09090909
    p = p * t + 0.11111111
    p = p * t + 0.14285715
    p = p * t + 0.2
    p = p * t + 0.33333334
    return s * (e - 2.0 * w * (t * p))


@function
def expm1(x):
    """exp(x) - 1."""
    return tl.where(tl.abs(x) < 0.5, x + phi(x), tl.exp(x) - 1.0)


@function
def log1p(x):
    """log(1 + x), x >= 0, in float64."""
    one_more = 1.0 + x
    return tl.where(one_more == 1.0, x, tl.log(one_more) * (x / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))


@function
def tanh(x):
    """Near 0 x + x^3 p(x^2), p a fit by Chebyshev's nodes; beyond, 1 - 2 e / (1 + e), e = exp(-2x)."""
    u = tl.abs(x)
    z = x * x
    p = 2.249316449e-03 * z - 8.305100648e-03
    p = p * z + 2.175692685e-02
    p = p * z - 5.395777575e-02
    p = p * z + 1.333329729e-01
    p = p * z - 3.333333313e-01
    e = tl.exp(-2.0 * u)
    size = tl.where(u < 0.625, u + u * (z * p), 1.0 - 2.0 * e / (1.0 + e))
    return tl.where(x < 0.0, -size, size)


@function
def expm1_of_scalar(x):
    """exp(x) - 1 in float64, to about 1e-16."""
    return tl.exp(x) - 1.0


def _compiled(module, **vocabulary):
    """A module's functions by name: the same code, over other meanings of its words."""
    scope = {"__name__": module.__name__, "tl": tl, **vocabulary}
    for name, f in vars(module).items():
        if inspect.isfunction(f) and f.__module__ == module.__name__:
            scope[name] = function(types.FunctionType(f.__code__, scope, name))
    return scope


_POINTWISE = _compiled(pointwise, exp=exp, log=log, abs=abs, where=where, phi=phi, psi=psi)
_ROWWISE = _compiled(rowwise, expm1=expm1_of_scalar, log1p=log1p, where=where)
TEXT = hashlib.sha256("".join(map(inspect.getsource, (pointwise, rowwise))).encode()).hexdigest()[:16]
"""Changes with the mathematics: Triton's cache does not look into functions that a kernel is given in a tuple."""

forward_kl_value, reverse_kl_value = _POINTWISE["forward_kl_value"], _POINTWISE["reverse_kl_value"]
VALUE = {name: _POINTWISE[f"{name}_value"] for name in DIVERGENCES}
DLP = {name: _POINTWISE[f"{name}_dlp"] for name in DIVERGENCES}
DLQ = {name: _POINTWISE[f"{name}_dlq"] for name in DIVERGENCES}

log_norm, entropy, varentropy = _ROWWISE["log_norm"], _ROWWISE["entropy"], _ROWWISE["varentropy"]
log_sum_sq_probs, log_prob, logsumexp, kl = (_ROWWISE[n] for n in ("log_sum_sq_probs", "log_prob", "logsumexp", "kl"))
