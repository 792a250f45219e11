"""From a public operator's arguments to a checked `Request` and the tensors that go with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv import backends, checks, plain
from fastdiv.request import Request, Transform, looks_twice
from fastdiv.sources import LinearLogits, Logits, LogProbabilities, Source

_STUDENT = {"token_stats": "source", "divergence": "student", "linear_loss": "head"}
"""What operators call their first argument."""


class Call(NamedTuple):
    """What the autograd functions take."""

    request: Request
    students: int
    labels: Tensor | None
    mask: Tensor | None
    temperature: Tensor | None
    tensors: tuple[Tensor, ...]


def prepare(
    operator: str,
    student: Tensor | Source,
    labels: Tensor | None,
    teacher: Tensor | Source | LogProbabilities | None,
    outputs: tuple[str, ...],
    *,
    parameters: dict[str, float | None],
    temperature: float | Tensor,
    mask: Tensor | None,
    ignore_index: int,
    backend: str | None,
    workspace: int | None,
) -> Call:
    """Checks everything once; the result is passed down unchanged."""
    name = _STUDENT.get(operator, "logits")
    given: dict[str, object] = {"labels": labels, "mask": mask, "temperature": temperature}
    _parts(given, name, student)
    _parts(given, "teacher", teacher)
    plain.check(operator, given)
    own = checks.source(operator, name, student)
    number, per_token = checks.temperature(operator, own, temperature)
    one = number if per_token is None else None
    other = None if teacher is None else checks.teacher(operator, own, teacher, one)
    names = checks.outputs(operator, outputs, labels is not None, other is not None)
    sides = [own] if other is None else [own, other]
    with checks.named(operator):
        chosen = backends.select([tensor.dtype for side in sides for tensor in side.tensors], own.device, backend)
    request = Request.of(
        names,
        Transform(float(own.scale), float(own.softcap or 0.0)),
        Transform(float(other.scale), float(other.softcap or 0.0)) if other else Transform(),
        number,
        checks.parameters(operator, names, parameters),
        checks.ignore_index(operator, ignore_index),
        chosen,
        checks.workspace(operator, own.device, workspace, operator == "linear_loss" or looks_twice(names)),
        _products(sides),
    )
    return Call(
        request,
        len(own.tensors),
        None if labels is None else checks.labels(operator, own, labels),
        checks.mask(operator, own, mask),
        per_token,
        own.tensors + (other.tensors if other else ()),
    )


def _parts(given: dict[str, object], name: str, source: object) -> None:
    """Adds the tensors of a source, by their names."""
    if isinstance(source, LinearLogits):
        given |= {f"{name}.hidden": source.hidden, f"{name}.weight": source.weight, f"{name}.bias": source.bias}
    else:
        given[name] = source.tensor if isinstance(source, (Logits, LogProbabilities)) else source


def _products(sides: list[Source]) -> str:
    """What autocast would multiply hidden states and weight in; "" for logits that exist, and without autocast."""
    device = sides[0].device.type
    if device == "meta" or not any(isinstance(side, LinearLogits) for side in sides):
        return ""
    if not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
