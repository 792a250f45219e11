"""The list of objectives: one decorator writes it, `fastdiv.objectives.list()` reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Objective:
    """One entry of `fastdiv.objectives.list()`."""

    name: str
    """Path below `fastdiv.objectives`."""
    family: str
    paper: str
    arxiv: str | None
    """arXiv identifier; None for a source that is not on arXiv."""
    inputs: tuple[str, ...]
    """Tensors the objective consumes."""
    full_vocabulary: bool
    """True if an input other than a log-probability is a sum over the vocabulary (an entropy or a
    divergence)."""
    function: Callable[..., Any] = field(repr=False)


_OBJECTIVES: dict[str, Objective] = {}


def objective(
    family: str,
    *,
    paper: str,
    arxiv: str | None,
    full_vocabulary: bool = False,
    inputs: tuple[str, ...] | None = None,
    prefix: str = "",
) -> Callable[[F], F]:
    """Enter the decorated function in the list; `inputs` defaults to its positional parameters."""

    def enter(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        name = prefix + function.__name__
        _OBJECTIVES[name] = Objective(name, family, paper, arxiv, inputs or positional, full_vocabulary, function)
        return function

    return enter


def list_objectives() -> tuple[Objective, ...]:
    """Every objective with its paper, its inputs and whether it needs a pass over the full vocabulary."""
    return tuple(_OBJECTIVES.values())
