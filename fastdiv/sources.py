"""Where logits come from: a tensor that exists, or hidden states times an output projection that never do together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def _leading_index(index: Any, tensor: Tensor) -> Any:
    """`index` so that it cannot reach the last dimension of `tensor`."""
    items = index if isinstance(index, tuple) else (index,)
    taken = sum(
        i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in items if i is not ...
    )
    if taken > tensor.dim() - 1:
        raise IndexError(
            f"a logits source takes indices into its leading dimensions {tuple(tensor.shape[:-1])}, got {taken} indices"
        )
    return (*items, slice(None)) if any(i is ... for i in items) else index


def work_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic and of all outputs: float64 if any input has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def transform(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """x -> scale x -> softcap tanh(. / softcap)."""
    x = raw * scale if scale != 1.0 else raw
    return softcap * torch.tanh(x / softcap) if softcap else x


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits [*, V] that exist, with the model's transform: `scale * x`, then `softcap * tanh(. / softcap)`."""

    tensor: Tensor  # [*, V]
    softcap: float | None = None
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the logits are made of, in the order that `library` takes it."""
        return (self.tensor,)

    def __getitem__(self, index: Any) -> Logits:
        return replace(self, tensor=self.tensor[_leading_index(index, self.tensor)])

    def materialize(self) -> Tensor:
        """The transformed logits [*, V], float32 (float64 from float64), by plain differentiable torch."""
        return transform(self.tensor.to(work_dtype(self.dtype)), self.scale, self.softcap)


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits `hidden @ weight.T + bias` that are never built, with the model's transform.

    Arguments:
        hidden: [*, H], the last hidden states.
        weight: [V, H], the output projection (`lm_head.weight`).
        bias: [V] or None.
        softcap: c > 0: logits become c tanh(logits / c).  None: they stay.
        scale: factor of the logits, before the softcap.
    """

    hidden: Tensor  # [*, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the logits are made of, in the order that `library` takes it."""
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    def __getitem__(self, index: Any) -> LinearLogits:
        return replace(self, hidden=self.hidden[_leading_index(index, self.hidden)])

    def materialize(self) -> Tensor:
        """The logits [*, V], float32 (float64 from float64), by plain differentiable torch: O(tokens V) memory."""
        dtype = work_dtype(self.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        raw = torch.nn.functional.linear(self.hidden.to(dtype), self.weight.to(dtype), bias)
        return transform(raw, self.scale, self.softcap)


@dataclass(frozen=True, eq=False)
class LogProbabilities:
    """A teacher's log-probabilities [*, V], which the temperature does not divide; of probabilities: their `log()`.

    They are normalised again.  A temperature, which then is the student's alone, must be one number.
    """

    tensor: Tensor  # [*, V]


Source = Logits | LinearLogits
