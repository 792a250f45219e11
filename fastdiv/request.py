"""What one call wants, said once: built and checked at the public operator, passed down unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from fastdiv.divergences import DIVERGENCES, Divergence

_TWO_LOOKS = {"rank", *(name for name, divergence in DIVERGENCES.items() if divergence.one_pass is None)}


def looks_twice(outputs: tuple[str, ...]) -> bool:
    """Whether the logits must be seen again once the normalisers are known."""
    return not _TWO_LOOKS.isdisjoint(outputs)


class Transform(NamedTuple):
    """One model's logits transform; softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Request:
    """Everything about a call but its tensors.

    `scalars` are the numbers that may change from call to call: student scale and softcap, teacher scale and softcap,
    temperature, and one parameter per output (0 where it has none).
    """

    outputs: tuple[str, ...]
    scalars: tuple[float, ...]
    ignore_index: int
    backend: str
    workspace: int
    products: str = ""
    """The dtype that autocast rounds the operands of products to; "": none."""

    @staticmethod
    def of(
        outputs: tuple[str, ...],
        student: Transform,
        teacher: Transform,
        temperature: float,
        parameters: tuple[float, ...],
        ignore_index: int,
        backend: str,
        workspace: int,
        products: str = "",
    ) -> Request:
        scalars = (student.scale, student.softcap, teacher.scale, teacher.softcap, temperature, *parameters)
        # Most calls ask what one before asked.  Dynamo does not see through the cache.
        known = Request if torch.compiler.is_compiling() else _known
        return known(outputs, scalars, ignore_index, backend, workspace, products)

    @cached_property
    def student(self) -> Transform:
        return Transform(*self.scalars[0:2])

    @cached_property
    def teacher(self) -> Transform:
        return Transform(*self.scalars[2:4])

    @property
    def operand(self) -> torch.dtype | None:
        """`products` as a dtype."""
        return getattr(torch, self.products) if self.products else None

    @property
    def temperature(self) -> float:
        return self.scalars[4]

    @cached_property
    def divergences(self) -> tuple[tuple[Divergence, float], ...]:
        """The divergences among the outputs, with their parameters as `pointwise` takes them."""
        pairs = zip(self.outputs, self.scalars[5:], strict=True)
        known = ((DIVERGENCES[name], parameter) for name, parameter in pairs if name in DIVERGENCES)
        return tuple((divergence, divergence.argument(parameter)) for divergence, parameter in known)

    @cached_property
    def compared(self) -> tuple[tuple[Divergence, float], ...]:
        """Those that need both normalisers before their terms can be summed."""
        return tuple(pair for pair in self.divergences if pair[0].one_pass is None)

    @cached_property
    def second_look(self) -> bool:
        """`looks_twice` of the outputs."""
        return looks_twice(self.outputs)


_known = lru_cache(maxsize=256)(Request)
