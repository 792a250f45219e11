"""Every check of user input, and every error text.  Messages name operator, argument, expectation, and what came."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from fastdiv import accept
from fastdiv.accept import describe as describe
from fastdiv.divergences import DIVERGENCES
from fastdiv.sources import LinearLogits, Logits, LogProbabilities, Source
from fastdiv.statistics import OUTPUTS, per_label

WORKSPACE_OF_CPU = 128 << 20
WORKSPACE = 256 << 20
WORKSPACE_OF_FULL_ROWS = 1 << 30
"""Elsewhere the height of a tile of full rows is that of the products it goes into: 256 MiB hold 524 rows of 128256
(`linear_loss`, H200, 4096 tokens: 29.1 ms, with 1 GiB 23.0 ms)."""

_BOTH_KLS = "'forward_kl' KL(teacher || student) or 'reverse_kl' KL(student || teacher)"
_ALIASES = {
    "kl": _BOTH_KLS,
    "kld": _BOTH_KLS,
    "kldiv": _BOTH_KLS,
    "kldivergence": _BOTH_KLS,
    "jsd": "'js'",
    "jensenshannon": "'js'",
    "tvd": "'tv'",
    "totalvariation": "'tv'",
    "symmetrickl": "'jeffreys'",
    "fkl": "'forward_kl'",
    "rkl": "'reverse_kl'",
    "logp": "'log_prob'",
    "nll": "'log_prob'",
    "lse": "'logsumexp'",
}
"""What others call them."""


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
        tensor = _floating(operator, argument, value.tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{operator}: {argument} must be logits [*, V], got a number")
    elif isinstance(value, LinearLogits):
        _head(f"{operator}: LinearLogits given as {argument}", value)
    else:
        raise TypeError(
            f"{operator}: {argument} must be a tensor [*, V], Logits or LinearLogits, got {describe(value)}"
        )
    if value.shape[-1] == 0:
        raise ValueError(f"{operator}: {argument} has an empty vocabulary, shape {list(value.shape)}")
    if not -math.inf < accept.number(operator, f"scale of {argument}", value.scale) < math.inf:
        raise ValueError(f"{operator}: scale of {argument} must be finite, got {value.scale!r}")
    if value.softcap is not None:
        expected = "a positive number or None"
        if not 0.0 < accept.number(operator, f"softcap of {argument}", value.softcap, expected) < math.inf:
            raise ValueError(f"{operator}: softcap of {argument} must be {expected}, got {value.softcap!r}")
    return value


def _head(where: str, head: LinearLogits) -> None:
    """Hidden states and an output projection that fit."""
    hidden, weight = _floating(where, "hidden", head.hidden), _floating(where, "weight", head.weight, 2)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        if hidden.dim() and hidden.shape[-1] == weight.shape[0]:
            raise ValueError(
                f"{where}: weight must be [V, H], [V, {hidden.shape[-1]}] to match hidden {list(hidden.shape)}, "
                f"got {describe(weight)}; transpose it"
            )
        raise ValueError(
            f"{where}: hidden must be [*, {weight.shape[1]}] to match weight {list(weight.shape)}, "
            f"got {describe(hidden)}"
        )
    if head.bias is not None:
        bias = _floating(where, "bias", head.bias, 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{where}: bias must be [{weight.shape[0]}], got {describe(bias)}")
    for name, part in (("weight", weight), ("bias", head.bias)):
        if part is not None and part.device != hidden.device:
            raise ValueError(f"{where}: {name} must be on {hidden.device} like hidden, got {part.device}")


def teacher(operator: str, student: Source, value: object, temperature: float | None) -> Source:
    """A second model's logits: same vocabulary and device as the student's, leading sizes the same or 1.

    `temperature`: None where it is not the same for all tokens.
    """
    if isinstance(value, LogProbabilities):
        if temperature is None:
            raise ValueError(
                f"{operator}: a teacher given as LogProbabilities goes with one number as temperature, got a tensor; "
                "give Logits(log_q * temperature[..., None])"
            )
        value = Logits(value.tensor, scale=temperature)  # and divided by it again
    other = source(operator, "teacher", value)
    if other.shape[-1] != student.shape[-1]:
        raise ValueError(
            f"{operator}: teacher must have the student's vocabulary of {student.shape[-1]}, got {other.shape[-1]}; "
            "restrict the larger one to the common ids first"
        )
    _on(operator, "teacher", student.device, other.tensors[0])
    if other.shape != student.shape:
        wide = _spread(other.tensors[0], (*student.shape[:-1], other.tensors[0].shape[-1]))
        if wide is None:
            raise ValueError(
                f"{operator}: teacher must have shape {list(student.shape)}, where 1 may stand for any leading size, "
                f"got {list(other.shape)}"
            )
        return replace(other, tensor=wide) if isinstance(other, Logits) else replace(other, hidden=wide)
    return other


def _refuse(operator: str, argument: str, lead: torch.Size, value: Tensor, more: str = "") -> NoReturn:
    raise ValueError(
        f"{operator}: {argument} must have shape {list(lead)}, where 1 may stand for any size{more}, "
        f"got {describe(value)}"
    )


def _spread(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`value` expanded where it has a size of 1; None if that does not make it `shape`."""
    if value.dim() != len(shape) or any(n not in (1, m) for n, m in zip(value.shape, shape, strict=True)):
        return None
    return value.expand(shape)


def _per_token(value: Tensor, lead: torch.Size) -> Tensor | None:
    """`value` as [*]: it is that, has sizes of 1 in it, or is flat; None if it is none of them."""
    if value.shape == lead:
        return value
    if value.dim() == 1 and len(lead) > 1 and value.numel() == lead.numel():
        return value.reshape(lead)
    return _spread(value, lead)


def _on(operator: str, argument: str, device: torch.device, value: Tensor) -> Tensor:
    if value.device != device:
        raise ValueError(f"{operator}: {argument} must be on {device}, got {value.device}")
    return value


def labels(operator: str, student: Source, value: object) -> Tensor:
    """Token ids [*] or [*, K]."""
    lead = student.shape[:-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: labels must be a tensor of token ids, got {describe(value)}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{operator}: labels must have an integer dtype, got {describe(value)}")
    _on(operator, "labels", student.device, value)
    if (found := _per_token(value, lead)) is not None:
        return found
    if value.dim() == len(lead) + 1:
        if value.shape[:-1] == lead:
            return value
        if value.numel() == lead.numel():
            raise ValueError(
                f"{operator}: labels {list(value.shape)} for logits {list(student.shape)} may be an id per token or "
                f"{value.shape[-1]} ids for every token; give {list(lead)} or {[*lead, value.shape[-1]]}"
            )
        if (found := _spread(value, (*lead, value.shape[-1]))) is not None:
            return found
    _refuse(operator, "labels", lead, value, f", or {[*lead, 'K']} for logits {list(student.shape)}")


def mask(operator: str, student: Source, value: object) -> Tensor | None:
    """Which tokens take part: bool [*]."""
    if value is None:
        return None
    lead, given = student.shape[:-1], _on(operator, "mask", student.device, accept.mask(operator, "mask", value))
    found = _per_token(given, lead)
    return _refuse(operator, "mask", lead, given) if found is None else found


def temperature(operator: str, student: Source, value: object) -> tuple[float, Tensor | None]:
    """(number, per-token tensor or None).  A tensor's first sizes are those of the tokens: [B] is one per sequence."""
    expected = "a number or a tensor [*]"
    if not isinstance(value, Tensor):
        number = accept.number(operator, "temperature", value, expected)
        if not 0.0 < number < math.inf:  # a comparison, unlike isfinite, is one that torch.compile can trace
            raise ValueError(f"{operator}: temperature must be finite and above 0, got {value!r}")
        return number, None
    _floating(operator, "temperature", value)
    if value.requires_grad:
        raise ValueError(f"{operator}: temperature has no gradient here; pass temperature.detach()")
    lead = student.shape[:-1]
    if value.shape == lead and lead:
        return 1.0, _on(operator, "temperature", student.device, value)
    if value.dim() == 0:  # one number, which is not asked for here: that would wait for its device
        value = value.to(student.device, non_blocking=True)
    _on(operator, "temperature", student.device, value)
    behind = (1,) * (len(lead) - value.dim())
    found = _spread(value.reshape(*value.shape, *behind), lead)
    found = _per_token(value, lead) if found is None else found
    if found is None:
        _refuse(operator, "temperature", lead, value, " and last sizes may be left out, or be a number")
    return 1.0, found


def outputs(operator: str, names: object, has_labels: bool, has_teacher: bool) -> tuple[str, ...]:
    """Names of outputs, all known, none twice, with the inputs they need."""
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, (tuple, list)) or not names:
        raise TypeError(f"{operator}: outputs must be a tuple of names, got {describe(names)}")
    for name in names:
        accept.name(operator, "output", name, (*OUTPUTS, *DIVERGENCES), _ALIASES)
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
    return accept.name(operator, "divergence", name, DIVERGENCES, _ALIASES)


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
        value = accept.number(operator, parameter.name, value)
        if not parameter.low < value < parameter.high:
            raise ValueError(
                f"{operator}: {parameter.name} of {name!r} must lie strictly between {parameter.low:g} and "
                f"{parameter.high:g}, got {value!r}; {parameter.outside}"
            )
        result.append(value)
    for name, value in given.items():
        if value is not None and name not in used:
            raise ValueError(f"{operator}: {name} is given, but none of {', '.join(names)} takes it")
    return tuple(result)


def workspace(operator: str, device: torch.device, value: object, full_rows: bool) -> int:
    """Bytes for tiles of logits, which may have to be full rows; 0: as few as possible."""
    if value is None:
        return WORKSPACE_OF_CPU if device.type == "cpu" else WORKSPACE_OF_FULL_ROWS if full_rows else WORKSPACE
    expected = "a number of bytes, 0 for as few as possible"
    number = accept.integer(operator, "workspace", value, expected)
    if number < 0:
        raise ValueError(f"{operator}: workspace must be {expected}, got {describe(value)}")
    return number


def ignore_index(operator: str, value: object) -> int:
    """The label that marks tokens to leave out."""
    return accept.integer(operator, "ignore_index", value, "an integer")


class named:
    """Errors about values are raised where no operator is known; here they get its name."""

    def __init__(self, operator: str) -> None:
        self._operator = operator

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        unnamed = f"{accept.UNNAMED}: "
        if isinstance(error, (IndexError, ValueError)) and str(error).startswith(unnamed):
            raise type(error)(f"{self._operator}: {str(error).removeprefix(unnamed)}") from None
