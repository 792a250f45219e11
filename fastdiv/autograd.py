"""The autograd functions: save O(tokens), compute only the gradients that are asked for, refuse second derivatives.

They belong to the operators, so a traced or exported program trains too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from fastdiv import engine, library, plain
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


class TokenStatistics(_SingleLevelFunction):
    """(request, number of student tensors, labels, mask, temperature, *tensors) -> one tensor per output, and the
    state that the backward wants.

    Not a `Function`, whose `apply` looks for transforms of torch.func and for defaults in the signature of `forward`,
    which takes longer than a small batch.
    """

    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]

    @staticmethod
    def forward(
        request: Request,
        students: int,
        labels: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(library.stats(request, tensors[:students], tensors[students:], labels, mask, temperature))

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
        given = {n: g for n, g in zip(ctx.request.outputs, upstream[:-2], strict=True) if g is not None}
        needs = list(ctx.needs_input_grad[5:])
        nothing = (None,) * 5
        if not given or not any(needs):
            return nothing + (None,) * len(tensors)
        if plain.transformed():  # jacrev and jacobian put vmap here
            plain.check("fastdiv", {f"the gradient of {name}": g for name, g in given.items()})
        with torch.no_grad():
            formed = library.grad(
                ctx.request,
                given,
                needs,
                state,
                compared,
                tensors[: ctx.students],
                tensors[ctx.students :],
                labels,
                mask,
                temperature,
            )
        gradients = iter(formed)
        anchor = tensors[needs.index(True)]
        return nothing + _final([next(gradients) if need else None for need in needs], anchor)


class TransformedStatistics(TokenStatistics, torch.autograd.Function):
    """The same where torch.func transforms the call."""


def _stats(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    *request: Any,
) -> list[Tensor]:
    """`fastdiv::stats` where autograd may want to know."""
    tensors = [*student, *teacher]
    with torch._C._AutoDispatchBelowAutograd():
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            asked = library.request(*request)
            # What is to be done for torch.func the dispatcher has already done here.
            with enable_single_level_autograd_function():
                return list(TokenStatistics.apply(asked, len(student), labels, mask, temperature, *tensors))
        return list(torch.ops.fastdiv.stats(student, teacher, labels, mask, temperature, *request))


library.LIBRARY.impl("stats", _stats, "Autograd")


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
        ctx.dtypes = [t.dtype for t in tensors]
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            gradients = [None if g is None else (g * upstream).to(dtype) for g, dtype in pairs]
        return (None,) * 6 + _final(gradients, torch.zeros((), device=upstream.device, requires_grad=True))
