"""Every check of user input, and every error text.  Messages name operator, argument, expectation, and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiv.divergences import DIVERGENCES
from fastdiv.sources import LinearLogits, Logits, Source
from fastdiv.statistics import OUTPUTS, per_label

DEFAULT_WORKSPACE = {"cpu": 128 << 20}
DEFAULT_WORKSPACE_ELSEWHERE = 256 << 20


def describe(value: object) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if not isinstance(value, type) else value.__name__


def _floating(operator: str, argument: str, value: object, dimensions: int | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {argument} must be a tensor, got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{operator}: {argument} must have a floating dtype, got {describe(value)}")
    if dimensions is not None and value.dim() != dimensions:
        raise ValueError(f"{operator}: {argument} must have {dimensions} dimensions, got {describe(value)}")
    return value


def source(operator: str, argument: str, value: object) -> Source:
    """`value` as a logits source: a tensor [*, V], `Logits` or `LinearLogits`."""
    if isinstance(value, Tensor):
        value = Logits(value)
    if isinstance(value, Logits):
        tensor = _floating(operator, f"{argument} (logits)", value.tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{operator}: {argument} must be logits [*, V], got a number")
    elif isinstance(value, LinearLogits):
        hidden = _floating(operator, f"{argument}.hidden", value.hidden)
        weight = _floating(operator, f"{argument}.weight", value.weight, 2)
        if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{operator}: {argument}.hidden must be [*, {weight.shape[1]}] to match {argument}.weight "
                f"{list(weight.shape)}, got {describe(hidden)}"
            )
        if value.bias is not None:
            bias = _floating(operator, f"{argument}.bias", value.bias, 1)
            if bias.shape[0] != weight.shape[0]:
                raise ValueError(f"{operator}: {argument}.bias must be [{weight.shape[0]}], got {describe(bias)}")
        for name, part in (("weight", weight), ("bias", value.bias)):
            if part is not None and part.device != hidden.device:
                raise ValueError(
                    f"{operator}: {argument}.{name} must be on {hidden.device} like {argument}.hidden, "
                    f"got {part.device}"
                )
    else:
        raise TypeError(
            f"{operator}: {argument} must be a tensor [*, V], Logits or LinearLogits, got {describe(value)}"
        )
    if value.shape[-1] == 0:
        raise ValueError(f"{operator}: {argument} has an empty vocabulary, shape {list(value.shape)}")
    if not -math.inf < value.scale < math.inf:
        raise ValueError(f"{operator}: {argument}.scale must be finite, got {value.scale!r}")
    if value.softcap is not None and not 0.0 < value.softcap < math.inf:
        raise ValueError(f"{operator}: {argument}.softcap must be a positive number or None, got {value.softcap!r}")
    return value


def teacher(operator: str, student: Source, value: object) -> Source:
    """A second model's logits: same leading shape, vocabulary and device as the student's."""
    other = source(operator, "teacher", value)
    if other.shape[-1] != student.shape[-1]:
        raise ValueError(
            f"{operator}: teacher must have the student's vocabulary of {student.shape[-1]}, got {other.shape[-1]}; "
            "restrict the larger one to the common ids first"
        )
    if other.shape != student.shape:
        raise ValueError(f"{operator}: teacher must have shape {list(student.shape)}, got {list(other.shape)}")
    if other.device != student.device:
        raise ValueError(f"{operator}: teacher must be on {student.device}, got {other.device}")
    return other


def labels(operator: str, student: Source, value: object) -> Tensor:
    """Token ids [*] or [*, K]."""
    lead = student.shape[:-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: labels must be a tensor of token ids, got {describe(value)}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{operator}: labels must have an integer dtype, got {describe(value)}")
    if value.shape != lead and not (value.dim() == len(lead) + 1 and value.shape[:-1] == lead):
        raise ValueError(
            f"{operator}: labels must have shape {list(lead)} or {[*lead, 'K']} for logits {list(student.shape)}, "
            f"got {describe(value)}"
        )
    if value.device != student.device:
        raise ValueError(f"{operator}: labels must be on {student.device}, got {value.device}")
    return value


def mask(operator: str, student: Source, value: object) -> Tensor | None:
    """Which tokens take part: bool [*]."""
    if value is None:
        return None
    lead = student.shape[:-1]
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{operator}: mask must be a bool tensor {list(lead)}, got {describe(value)}")
    if value.shape != lead:
        raise ValueError(f"{operator}: mask must have shape {list(lead)}, got {describe(value)}")
    if value.device != student.device:
        raise ValueError(f"{operator}: mask must be on {student.device}, got {value.device}")
    return value


def temperature(operator: str, student: Source, value: object) -> tuple[float, Tensor | None]:
    """(number, per-token tensor or None)."""
    if isinstance(value, Tensor) and value.dim() > 0:
        _floating(operator, "temperature", value)
        if value.shape != student.shape[:-1]:
            raise ValueError(
                f"{operator}: temperature must be a number or a tensor {list(student.shape[:-1])}, "
                f"got {describe(value)}"
            )
        if value.device != student.device:
            raise ValueError(f"{operator}: temperature must be on {student.device}, got {value.device}")
        if value.requires_grad:
            raise ValueError(f"{operator}: temperature has no gradient here; pass temperature.detach()")
        return 1.0, value
    if isinstance(value, Tensor):
        raise TypeError(f"{operator}: temperature must be a number or a tensor [*], got a 0-dim tensor; use .item()")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: temperature must be a number or a tensor [*], got {describe(value)}")
    if not 0.0 < value < math.inf:  # a comparison, unlike isfinite, is one that torch.compile can trace
        raise ValueError(f"{operator}: temperature must be finite and above 0, got {value!r}")
    return float(value), None


def outputs(operator: str, names: object, has_labels: bool, has_teacher: bool) -> tuple[str, ...]:
    """Names of outputs, all known, none twice, with the inputs they need."""
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, (tuple, list)) or not names:
        raise TypeError(f"{operator}: outputs must be a tuple of names, got {describe(names)}")
    known = (*OUTPUTS, *DIVERGENCES)
    for name in names:
        if name not in known:
            raise ValueError(f"{operator}: unknown output {name!r}; known are {', '.join(known)}")
        if per_label(name) and not has_labels:
            raise ValueError(f"{operator}: output {name!r} needs labels, got none")
        if name in DIVERGENCES and not has_teacher:
            raise ValueError(f"{operator}: output {name!r} needs a teacher, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"{operator}: outputs must not repeat a name, got {tuple(names)}")
    if has_teacher and not any(name in DIVERGENCES for name in names):
        raise ValueError(f"{operator}: a teacher was given, but no output of {tuple(names)} compares with it")
    return tuple(names)


def kind(operator: str, name: object) -> str:
    """The name of a divergence."""
    if not isinstance(name, str) or name not in DIVERGENCES:
        raise ValueError(f"{operator}: unknown divergence {name!r}; known are {', '.join(DIVERGENCES)}")
    return name


def parameters(operator: str, names: tuple[str, ...], given: dict[str, float | None]) -> tuple[float, ...]:
    """One parameter per output, defaults filled in; a parameter that no output takes is an error."""
    used = set()
    result = []
    for name in names:
        parameter = DIVERGENCES[name].parameter if name in DIVERGENCES else None
        if parameter is None:
            result.append(0.0)
            continue
        used.add(parameter.name)
        value = given.get(parameter.name)
        value = parameter.default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{operator}: {parameter.name} must be a number, got {describe(value)}")
        if not parameter.low < value < parameter.high:
            raise ValueError(
                f"{operator}: {parameter.name} of {name!r} must lie strictly between {parameter.low:g} and "
                f"{parameter.high:g}, got {value!r}; {parameter.outside}"
            )
        result.append(float(value))
    for name, value in given.items():
        if value is not None and name not in used:
            raise ValueError(f"{operator}: {name} is given, but none of {', '.join(names)} takes it")
    return tuple(result)


def workspace(operator: str, device: torch.device, value: object) -> int:
    """Bytes for tiles of logits; 0: as few as possible."""
    if value is None:
        return DEFAULT_WORKSPACE.get(device.type, DEFAULT_WORKSPACE_ELSEWHERE)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{operator}: workspace must be a number of bytes, 0 for as few as possible, got {describe(value)}"
        )
    return value


def ignore_index(operator: str, value: object) -> int:
    """The label that marks tokens to leave out."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{operator}: ignore_index must be an integer, got {describe(value)}")
    return value
