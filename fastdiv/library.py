"""The custom operators: one per direction, for every output, source and backend.  torch.compile and opcheck see these.

    fastdiv::stats  student and teacher tensors -> the outputs, then the state that `grad` wants back
    fastdiv::grad   upstream gradients of some outputs -> gradients of the tensors that need one

A side's tensors are [logits], [hidden, weight] or [hidden, weight, bias]; an empty teacher list means there is none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiv import engine
from fastdiv.request import Request
from fastdiv.sources import work_dtype
from fastdiv.statistics import STATE, output_dtype, per_label

_LIBRARY = torch.library.Library("fastdiv", "DEF")
_REQUEST = "str outputs, float[] scalars, int ignore_index, str backend, int workspace"
_TENSORS = "Tensor[] student, Tensor[] teacher, Tensor? labels, Tensor? mask, Tensor? temperature"
_LIBRARY.define(f"stats({_TENSORS}, {_REQUEST}) -> Tensor[]")
_LIBRARY.define(
    f"grad(Tensor[] upstream, str differentiated, bool[] needs, Tensor state, Tensor compared, {_TENSORS}, {_REQUEST})"
    " -> Tensor[]"
)


def arguments(request: Request) -> tuple[str, list[float], int, str, int]:
    """A request as the operators' plain arguments."""
    return (
        ",".join(request.outputs),
        list(request.scalars),
        request.ignore_index,
        request.backend,
        request.workspace,
    )


def _request(outputs: str, scalars: list[float], ignore_index: int, backend: str, workspace: int) -> Request:
    return Request(tuple(outputs.split(",")), tuple(scalars), ignore_index, backend, workspace)


def _stats(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    *request: object,
) -> list[Tensor]:
    problem = engine.Problem(_request(*request), student, teacher, labels, mask, temperature)  # type: ignore[arg-type]
    outputs, state, compared = engine.forward(problem)
    return [*outputs, state, compared]


def _stats_fake(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    *request: object,
) -> list[Tensor]:
    asked = _request(*request)  # type: ignore[arg-type]
    x, lead = student[0], student[0].shape[:-1]
    work = work_dtype(*(t.dtype for t in [*student, *teacher]))
    shapes = [labels.shape if per_label(name) and labels is not None else lead for name in asked.outputs]
    outputs = [
        x.new_empty(shape, dtype=output_dtype(name, work)) for shape, name in zip(shapes, asked.outputs, strict=True)
    ]
    tokens = math.prod(lead)  # lead.numel() would fix the number of tokens for a compiled graph
    state = x.new_empty((tokens, len(STATE)), dtype=torch.float64)
    return [*outputs, state, x.new_empty((tokens, len(asked.compared), 3), dtype=torch.float64)]


def _grad(
    upstream: list[Tensor],
    differentiated: str,
    needs: list[bool],
    state: Tensor,
    compared: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    *request: object,
) -> list[Tensor]:
    problem = engine.Problem(_request(*request), student, teacher, labels, mask, temperature)  # type: ignore[arg-type]
    by_name = dict(zip(differentiated.split(","), upstream, strict=True))
    gradients = engine.backward(problem, state, compared, by_name, needs)
    return [g for g in gradients if g is not None]


def _grad_fake(
    upstream: list[Tensor],
    differentiated: str,
    needs: list[bool],
    state: Tensor,
    compared: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    *request: object,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip([*student, *teacher], needs, strict=True) if need]


for _name, _function, _fake in (("stats", _stats, _stats_fake), ("grad", _grad, _grad_fake)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiv::{_name}", _fake, lib=_LIBRARY)
