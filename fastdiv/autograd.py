"""The autograd functions: save O(tokens), compute only the gradients that are asked for, refuse second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiv import engine, library
from fastdiv.request import Request
from fastdiv.statistics import differentiable


class _Final(torch.autograd.Function):
    """(gradient, something that requires one) -> the gradient, which cannot be differentiated again.

    `once_differentiable` alone lets the gradient of a plain sum pass for a constant, so that a penalty on it would be
    silently wrong: it looks at what flows in, which requires no gradient there, not at the inputs, which do.
    """

    @staticmethod
    def forward(gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(
            "fastdiv: second derivatives are not available; detach() the gradient if it is a constant to you"
        )


def _final(gradients: list[Tensor | None], anchor: Tensor) -> tuple[Tensor | None, ...]:
    """What a backward returns; with create_graph=True it must not pass for a constant."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(None if g is None else _Final.apply(g, anchor) for g in gradients)  # type: ignore[no-untyped-call]


class TokenStatistics(torch.autograd.Function):
    """(request, number of student tensors, labels, mask, temperature, *tensors) -> one tensor per output."""

    @staticmethod
    def forward(
        request: Request,
        students: int,
        labels: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        student, teacher = list(tensors[:students]), list(tensors[students:])
        return tuple(torch.ops.fastdiv.stats(student, teacher, labels, mask, temperature, *library.arguments(request)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.request, ctx.students, labels, mask, temperature, *tensors = inputs
        *outputs, state, compared = output
        fixed = [o for name, o in zip(ctx.request.outputs, outputs, strict=True) if not differentiable(name)]
        ctx.mark_non_differentiable(state, compared, *fixed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state, compared, labels, mask, temperature, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        state, compared, labels, mask, temperature, *tensors = ctx.saved_tensors
        given = [(n, g) for n, g in zip(ctx.request.outputs, upstream[:-2], strict=True) if g is not None]
        needs = list(ctx.needs_input_grad[5:])
        nothing = (None,) * 5
        if not given or not any(needs):
            return nothing + (None,) * len(tensors)
        with torch.no_grad():
            formed = torch.ops.fastdiv.grad(
                [g for _, g in given],
                ",".join(n for n, _ in given),
                needs,
                state,
                compared,
                tensors[: ctx.students],
                tensors[ctx.students :],
                labels,
                mask,
                temperature,
                *library.arguments(ctx.request),
            )
        gradients = iter(formed)
        anchor = tensors[needs.index(True)]
        return nothing + _final([next(gradients) if need else None for need in needs], anchor)


class LinearLoss(torch.autograd.Function):
    """(request, token loss, number of student tensors, labels, mask, temperature, *tensors) -> sum of the token losses.

    The gradients are formed in the forward, where each tile of logits already is; the backward scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        request: Request,
        token_loss: engine.TokenLoss,
        students: int,
        labels: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        sides = list(tensors[:students]), list(tensors[students:])
        problem = engine.Problem(request, *sides, labels, mask, temperature, drop_rows=True)
        needs = list(ctx.needs_input_grad[6:])
        total, gradients = engine.fused(problem, token_loss, needs)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = [None if g is None else g * upstream for g in ctx.saved_tensors]
        return (None,) * 6 + _final(gradients, torch.zeros((), device=upstream.device, requires_grad=True))
