"""The custom operators: one per direction, for every output, source and backend.  torch.compile and opcheck see these.

    fastdiv::stats               student and teacher tensors -> the outputs, then the state that `grad` wants back
    fastdiv::grad                upstream gradients of some outputs -> gradients of the tensors that need one
    fastdiv::value_and_gradient  logits and weights of the outputs -> the outputs, then the gradient of the logits

A side's tensors are [logits], [hidden, weight] or [hidden, weight, bias]; an empty teacher list means there is none.
The functions below call an operator's work directly where nothing watches: the dispatcher takes longer than a small
batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiv import engine
from fastdiv.plain import watched
from fastdiv.request import Request
from fastdiv.sources import work_dtype
from fastdiv.statistics import STATE, output_dtype, per_label

LIBRARY = torch.library.Library("fastdiv", "DEF")
_REQUEST = "str outputs, float[] scalars, int ignore_index, str backend, int workspace, str products"
_BESIDE = "Tensor? labels, Tensor? mask, Tensor? temperature"
_TENSORS = f"Tensor[] student, Tensor[] teacher, {_BESIDE}"
LIBRARY.define(f"stats({_TENSORS}, {_REQUEST}) -> Tensor[]")
LIBRARY.define(
    f"grad(Tensor[] upstream, str differentiated, bool[] needs, Tensor state, Tensor compared, {_TENSORS}, {_REQUEST})"
    " -> Tensor[]"
)
LIBRARY.define(
    f"value_and_gradient(Tensor logits, Tensor[] teacher, Tensor[] weights, {_BESIDE}, {_REQUEST}) -> Tensor[]"
)

_Beside = tuple[Tensor | None, Tensor | None, Tensor | None]  # labels, mask, temperature
_Tensors = Sequence[Tensor]


def arguments(request: Request) -> tuple[str, list[float], int, str, int, str]:
    """A request as the operators' plain arguments."""
    return (
        ",".join(request.outputs),
        list(request.scalars),
        request.ignore_index,
        request.backend,
        request.workspace,
        request.products,
    )


def request(outputs: str, scalars: list[float], *rest: Any) -> Request:
    """The request of an operator's plain arguments."""
    return Request(tuple(outputs.split(",")), tuple(scalars), *rest)


def stats(asked: Request, student: _Tensors, teacher: _Tensors, *beside: Tensor | None) -> list[Tensor]:
    """(outputs, state, compared); beside the models' tensors: labels, mask, temperature."""
    if watched(*student, *teacher, *beside):
        return list(torch.ops.fastdiv.stats(student, teacher, *beside, *arguments(asked)))
    return run_stats(asked, student, teacher, *beside)


def run_stats(asked: Request, student: _Tensors, teacher: _Tensors, *beside: Tensor | None) -> list[Tensor]:
    """`stats` where nothing watches."""
    with engine.exact(student[0].device):
        outputs, state, compared = engine.forward(engine.Problem(asked, list(student), list(teacher), *beside))
    return [*outputs, state, compared]


def _stats(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> list[Tensor]:
    return run_stats(request(*rest[3:]), student, teacher, *rest[:3])


def _outputs_fake(asked: Request, tensors: _Tensors, labels: Tensor | None) -> list[Tensor]:
    x, lead = tensors[0], tensors[0].shape[:-1]
    work = work_dtype(*(t.dtype for t in tensors))
    shapes = [labels.shape if per_label(name) and labels is not None else lead for name in asked.outputs]
    return [
        x.new_empty(shape, dtype=output_dtype(name, work)) for shape, name in zip(shapes, asked.outputs, strict=True)
    ]


def _stats_fake(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, *rest: Any) -> list[Tensor]:
    asked = request(*rest[2:])
    x = student[0]
    tokens = math.prod(x.shape[:-1])  # shape.numel() would fix the number of tokens for a compiled graph
    state = x.new_empty((tokens, len(STATE)), dtype=torch.float64)
    compared = x.new_empty((tokens, len(asked.compared), 3), dtype=torch.float64)
    return [*_outputs_fake(asked, [*student, *teacher], labels), state, compared]


def grad(
    asked: Request,
    upstream: Mapping[str, Tensor],
    needs: list[bool],
    state: Tensor,
    compared: Tensor,
    student: _Tensors,
    teacher: _Tensors,
    *beside: Tensor | None,
) -> list[Tensor]:
    """The gradients that are needed, of student and teacher tensors, from those of some outputs."""
    if watched(*upstream.values(), state, *student, *teacher):
        names, given = ",".join(upstream), list(upstream.values())
        known = (names, needs, state, compared, student, teacher)
        return list(torch.ops.fastdiv.grad(given, *known, *beside, *arguments(asked)))
    return _run_grad(asked, upstream, needs, state, compared, student, teacher, *beside)


def _run_grad(
    asked: Request,
    upstream: Mapping[str, Tensor],
    needs: list[bool],
    state: Tensor,
    compared: Tensor,
    student: _Tensors,
    teacher: _Tensors,
    *beside: Tensor | None,
) -> list[Tensor]:
    with engine.exact(state.device):
        problem = engine.Problem(asked, list(student), list(teacher), *beside)
        gradients = engine.backward(problem, state, compared, dict(upstream), needs)
    return [g for g in gradients if g is not None]


def _grad(upstream: list[Tensor], differentiated: str, *rest: Any) -> list[Tensor]:
    by_name = dict(zip(differentiated.split(","), upstream, strict=True))
    return _run_grad(request(*rest[8:]), by_name, *rest[:8])


def _grad_fake(
    upstream: list[Tensor],
    differentiated: str,
    needs: list[bool],
    state: Tensor,
    compared: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip([*student, *teacher], needs, strict=True) if need]


def value_and_gradient(
    asked: Request, overwrite: bool, logits: Tensor, teacher: _Tensors, weights: _Tensors, *beside: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """(outputs, gradient of the logits); `weights` [tokens] or [tokens, K], one for each output."""
    if not watched(logits, *teacher, *weights, *beside):
        return _differentiate(asked, overwrite, logits, teacher, weights, *beside)
    # What overwrites the logits cannot return new tensors too where torch.compile is to trace it: there it is copied.
    *outputs, gradient = torch.ops.fastdiv.value_and_gradient(logits, teacher, weights, *beside, *arguments(asked))
    return outputs, logits.copy_(gradient) if overwrite else gradient


def _differentiate(
    asked: Request, overwrite: bool, logits: Tensor, teacher: _Tensors, weights: _Tensors, *beside: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    with engine.exact(logits.device):
        problem = engine.Problem(asked, [logits], list(teacher), *beside)
        return engine.differentiate(problem, dict(zip(asked.outputs, weights, strict=True)), overwrite)


def _value_and_gradient(logits: Tensor, teacher: list[Tensor], weights: list[Tensor], *rest: Any) -> list[Tensor]:
    outputs, gradient = _differentiate(request(*rest[3:]), False, logits, teacher, weights, *rest[:3])
    return [*outputs, gradient]


def _value_and_gradient_fake(
    logits: Tensor, teacher: list[Tensor], weights: list[Tensor], labels: Tensor | None, *rest: Any
) -> list[Tensor]:
    gradient = logits.new_empty(logits.shape)
    return [*_outputs_fake(request(*rest[2:]), [logits, *teacher], labels), gradient]


def _without_gradient(*given: Any) -> list[Tensor]:
    """`fastdiv::value_and_gradient` where autograd may want to know: nothing of it has a gradient."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        return list(torch.ops.fastdiv.value_and_gradient(*given))


for _name, _function, _fake in (
    ("stats", _stats, _stats_fake),
    ("grad", _grad, _grad_fake),
    ("value_and_gradient", _value_and_gradient, _value_and_gradient_fake),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiv::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("value_and_gradient", _without_gradient, "Autograd")
