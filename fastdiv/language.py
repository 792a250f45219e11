"""The vocabulary of `fastdiv.pointwise` and `fastdiv.rowwise`, on tensors of any floating dtype.

`csrc/language.h` has the same names for float.

`phi(d) = exp(d) - 1 - d` and u - log(1 + u), the latter as `psi`, are what every f-divergence is made of near equality:
both are
non-negative and of second order, so they must not be formed by subtraction.  Each is a polynomial, valid for
the arguments they are given there, with as many terms as the dtype needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Value = Tensor | float

exp = torch.exp
log = torch.log
log1p = torch.log1p
expm1 = torch.expm1
abs = torch.abs


def where(condition: Tensor, yes: Value, no: Value) -> Tensor:
    """`yes` where `condition`, else `no`; one of the arms may be a number."""
    like = yes if isinstance(yes, Tensor) else no
    if not isinstance(like, Tensor):
        raise TypeError(f"where: one arm must be a tensor, got {yes!r} and {no!r}")
    return torch.where(condition, yes, no)


def _horner(x: Tensor, coefficients: list[float]) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def phi(d: Tensor) -> Tensor:
    """exp(d) - 1 - d for |d| <= 0.5: d^2 (1/2! + d/3! + d^2/4! + ...)."""
    terms = 18 if d.dtype == torch.float64 else 8
    return d * d * _horner(d, [1.0 / math.factorial(k) for k in range(2, 2 + terms)])


def psi(e: Tensor, w: Tensor) -> Tensor:
    """e - w log(1 + e / w), or w (u - log(1 + u)) with u = e / w, for -0.5 <= u <= 0.65: with s = u / (2 + u),
    log(1 + u) = 2 atanh(s) and the result is s (e - 2 w s^2 (1/3 + s^2/5 + ...))."""
    terms = 18 if e.dtype == torch.float64 else 8
    s = e / (2.0 * w + e)
    t = s * s
    return s * (e - 2.0 * w * t * _horner(t, [1.0 / (2 * k + 3) for k in range(terms)]))
