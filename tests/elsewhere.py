"""Lets tests that make CPU tensors run one backend on another device.

What a test gives to a public operator goes there, what the operator returns comes back, both differentiably and with
the same strides.  Only the functions between the public operators and the autograd functions are exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import select
from fastdiv.ops import covariance, linear, stats

HOME = torch.device("cpu")

_VIEW = "what comes back is a view of a copy, which may not be written"
_TRACED = "while a call is traced its token loss runs there, the tensors that it closes over are here"
NOT_THERE = {
    "test_saved_tensors_are_small": "counts the tensors of the test, which a copy of them hides",
    "test_outputs_may_be_written_in_place": _VIEW,
    "test_opcheck_of_value_and_gradient": "hands tensors of two devices to the operator itself",
    "test_an_exported_program_trains": _TRACED,
    "test_compile_over_a_functional_gradient": _TRACED,
    "test_compile_linear_loss": _TRACED,
}
"""Tests that mean nothing elsewhere, and why."""

WHOLE = ("masked_covariance", "top_k", "random_subset", "value_and_gradient")
"""Functions without a graph, which are run there as a whole."""


class Moved(torch.autograd.Function):
    """(tensor, device) -> a copy there, overlaps and gaps included; its gradient comes back in the same way."""

    @staticmethod
    def forward(tensor: Tensor, device: torch.device) -> Tensor:
        room = tensor.untyped_storage().nbytes() // tensor.element_size()
        there = tensor.as_strided((room,), (1,), 0).to(device, copy=True)
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.origin = inputs[0].device

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return Moved.apply(upstream[0], ctx.origin), None


def move(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a logits source, a mapping or a tuple, on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device) if torch.compiler.is_compiling() else Moved.apply(value, device)
    if isinstance(value, fastdiv.Logits):
        return fastdiv.Logits(move(value.tensor, device), value.softcap, value.scale)
    if isinstance(value, fastdiv.LinearLogits):
        tensors = (move(t, device) for t in (value.hidden, value.weight, value.bias))
        return fastdiv.LinearLogits(*tensors, value.softcap, value.scale)
    if isinstance(value, dict):
        return type(value)({k: move(v, device) for k, v in value.items()})
    if isinstance(value, tuple):
        parts = [move(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _inputs_moved(function: Callable[..., Any], name: str, device: torch.device) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*values: Any, backend: str | None = None, **options: Any) -> Any:
        if backend == name:
            values = tuple(move(v, device) for v in values)
            options = {k: move(v, device) for k, v in options.items()}
        return function(*values, backend=backend, **options)

    return wrapper


def _all_moved(function: Callable[..., Any], name: str, device: torch.device) -> Callable[..., Any]:
    """Also the result; a call from inside the library, which has its tensors there, is left alone."""

    @functools.wraps(function)
    def wrapper(*values: Any, **options: Any) -> Any:
        given = [v for v in (*values, *options.values()) if isinstance(v, Tensor)]
        if options.get("backend") != name or any(v.device.type != HOME.type for v in given):
            return function(*values, **options)
        found = function(*(move(v, device) for v in values), **{k: move(v, device) for k, v in options.items()})
        return move(found, HOME)

    return wrapper


@contextmanager
def elsewhere(name: str, device: torch.device, module: ModuleType) -> Iterator[None]:
    """Inside the block, calls with `backend=name` run on `device`; `module` is that of the test.

    Labels are checked there as on a CPU, so that the same errors come.
    """
    outputs_of, loss = stats.outputs_of, linear.LinearLoss

    def outputs(call: Any) -> tuple[Tensor, ...]:
        found = outputs_of(call)
        return tuple(move(o, HOME) for o in found) if call.request.backend == name else found

    class Loss:
        @staticmethod
        def apply(request: Any, token_loss: Callable[..., Any], *inputs: Any) -> Tensor:
            if request.backend != name:
                return loss.apply(request, token_loss, *inputs)

            def at_home(values: dict[str, Tensor], rows: Tensor) -> Any:
                return move(token_loss({n: move(v, HOME) for n, v in values.items()}, move(rows, HOME)), device)

            return move(loss.apply(request, at_home, *inputs), HOME)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIV_CHECK", "1")
        for holder in (stats, linear):
            patch.setattr(holder, "outputs_of", outputs)
        patch.setattr(linear, "LinearLoss", Loss)
        for holder in (stats, linear, module):
            if hasattr(holder, "prepare"):
                patch.setattr(holder, "prepare", _inputs_moved(holder.prepare, name, device))
        for holder in (fastdiv, select, covariance, module):
            for function in WHOLE:
                if hasattr(holder, function):
                    patch.setattr(holder, function, _all_moved(getattr(holder, function), name, device))
        yield
