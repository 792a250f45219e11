"""What users give in more than one form: numbers, names, masks.  And how an error says what came."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

UNNAMED = "fastdiv"
"""Stands for the operator in errors raised where it is not known, until `checks.named` puts its name there; a compiled
graph shows them as they are."""


def describe(value: object) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if not isinstance(value, type) else value.__name__


def number(operator: str, argument: str, value: object, expected: str = "a number") -> float:
    """A real number, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{operator}: {argument} must be {expected}, got {describe(value)}")
    return float(value)


def integer(operator: str, argument: str, value: object, expected: str = "an int") -> int:
    """An integer, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{operator}: {argument} must be {expected}, got {describe(value)}")
    return int(value)


def bounded(
    operator: str, argument: str, value: float | Tensor, low: float, expected: str, *, strictly: bool = False
) -> float | Tensor:
    """A number of at least `low`, or `strictly` above it; a tensor of one passes as it is."""
    if not isinstance(value, Tensor):
        value = number(operator, argument, value)
    if not (value > low if strictly else value >= low):
        raise ValueError(f"{operator}: {argument} must {expected}, got {value}")
    return value


def name(
    operator: str,
    argument: str,
    value: object,
    known: Iterable[str],
    aliases: Mapping[str, str] | None = None,
    error: type[ValueError] = ValueError,
) -> str:
    """One of the known names; the error suggests those that are close."""
    known = tuple(known)
    if isinstance(value, str) and value in known:
        return value
    close = suggestion(value, known, aliases)
    raise error(f"{operator}: unknown {argument} {value!r}{close}; known are {', '.join(known)}")


def suggestion(value: object, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """ ", did you mean ...?", or nothing where no known name is close."""
    if not isinstance(value, str):
        return ""
    plain = value.lower().replace("-", "_").replace(" ", "_")
    found = (aliases or {}).get(plain.replace("_", "")) or " or ".join(
        repr(close) for close in difflib.get_close_matches(plain, list(known), n=2, cutoff=0.7)
    )
    return f", did you mean {found}?" if found else ""


def looks_at(tensor: Tensor) -> bool:
    """Whether values are checked: on a CPU, elsewhere (where looking waits for the device) with FASTDIV_CHECK, and
    never while a call is traced, when there are none."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTDIV_CHECK", "0") not in ("", "0")


def mask(operator: str, argument: str, value: object) -> Tensor:
    """A bool tensor, from bool or from numbers that are 0 or 1."""
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(f"{operator}: {argument} must be a bool tensor, or one of 0 and 1, got {describe(value)}")
    if value.dtype == torch.bool:
        return value
    value = value.detach()
    if looks_at(value) and bool((wrong := (value != 0) & (value != 1)).any()):
        raise ValueError(
            f"{operator}: {argument} must hold nothing but 0 and 1, got {value[wrong][0].item():g} in {describe(value)}"
        )
    return value != 0
