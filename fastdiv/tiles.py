"""Tiles of logits: some rows x some columns of the vocabulary, seen as they are or projected into a workspace.

Both sides of a comparison answer the same questions, so that `engine` walks tiles without knowing where logits come
from: `tile` gives logits, `target` says where their gradient goes, `absorb` takes the gradient on to the inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv.divergences import Divergence
from fastdiv.planner import row_stride
from fastdiv.request import Transform
from fastdiv.statistics import Tokens

Terms = list[tuple[Divergence, float]]


@dataclass  # not frozen, which costs more than the fields are worth
class Rows:
    """Some rows of a tensor [*, columns]: those whose flat numbers are in `index`, or all where it is None."""

    tensor: Tensor  # [*, columns]
    index: Tensor | None  # [rows] int64
    transform: Transform

    @property
    def numbers(self) -> Tensor:
        """[rows] int64: flat row numbers."""
        if self.index is not None:
            return self.index
        return torch.arange(math.prod(self.tensor.shape[:-1]), device=self.tensor.device)

    def place(self) -> tuple[Tensor | None, int]:
        """(None, elements from a row to the next) where that is one number, else (offsets, 0)."""
        if self.index is not None:
            return self.offsets(), 0
        stride, below = None, 1
        for size, step in zip(reversed(self.tensor.shape[:-1]), reversed(self.tensor.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if stride is not None and step != stride * below:
                return self.offsets(), 0
            stride = step if stride is None else stride
            below *= size
        if stride is None:  # one row has the stride of its batch, by which Triton chooses the order of its sums
            stride = self.tensor.stride(-2) if self.tensor.dim() > 1 else 0
        return None, stride

    def offsets(self) -> Tensor:
        """[rows] int64: the first element of each row, in elements from the tensor's first: no layout needs a copy."""
        if self.tensor.dim() == 2:
            return self.numbers * self.tensor.stride(0)
        rest = self.numbers
        offsets = torch.zeros_like(rest)
        for size, stride in zip(reversed(self.tensor.shape[:-1]), reversed(self.tensor.stride()[:-1]), strict=True):
            offsets = offsets + rest % size * stride
            rest = rest // size
        return offsets

    def unravelled(self, part: slice) -> tuple[Tensor, ...]:
        """The numbers of a part of the rows as one index per leading dimension."""
        return tuple(torch.unravel_index(self.numbers[part], self.tensor.shape[:-1]))


class Tile(NamedTuple):
    """What a backend sees of a call at a time: n rows, columns [first_column, first_column + columns)."""

    student: Rows
    teacher: Rows | None
    first_column: int
    columns: int
    tokens: Tokens


class Projection(NamedTuple):
    """Logits of n rows that nobody forms: transform of hidden @ weight.T + bias."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: Transform


class Given:
    """Logits [*, V] that exist."""

    def __init__(self, tensors: list[Tensor], transform: Transform, index: Tensor | None, needs: list[bool]) -> None:
        (self._tensor,) = tensors
        if self._tensor.stride(-1) != 1 and self._tensor.shape[-1] > 1:
            self._tensor = self._tensor.contiguous()
        self._transform, self._index = transform, index
        self._gradient: Tensor | None = None
        if needs[0]:
            make = torch.empty if index is None else torch.zeros
            self._gradient = make(self._tensor.shape, dtype=self._tensor.dtype, device=self._tensor.device)

    def tile(self, rows: slice, columns: slice) -> Rows:
        return self._rows(self._tensor, rows, columns)

    def _rows(self, tensor: Tensor, rows: slice, columns: slice) -> Rows:
        tensor = tensor if tensor.dim() > 1 else tensor[None]
        if columns.stop - columns.start < tensor.shape[-1]:
            tensor = tensor[..., columns]
        if self._index is not None:
            return Rows(tensor, self._index[rows], self._transform)
        every = rows.stop - rows.start == math.prod(tensor.shape[:-1])
        index = None if every else torch.arange(rows.start, rows.stop, device=tensor.device)
        return Rows(tensor, index, self._transform)

    def target(self, rows: slice, columns: slice) -> Rows | None:
        if self._gradient is None:
            return None
        return self._rows(self._gradient, rows, columns)

    def overwrite(self) -> None:
        """From here on the gradient goes where the logits are; rows that do not take part become 0."""
        self._gradient = self._tensor
        if self._index is not None:
            count = math.prod(self._tensor.shape[:-1])
            absent = torch.ones(count, dtype=torch.bool, device=self._tensor.device)
            absent[self._index] = False
            self._tensor[absent.view(self._tensor.shape[:-1])] = 0.0

    def absorb(self, rows: slice, columns: slice) -> None:
        """The gradient was written in place."""

    def gradients(self) -> list[Tensor | None]:
        return [self._gradient]


class Projected:
    """Logits hidden @ weight.T + bias, one tile at a time in the work dtype; the gradient overwrites the tile.

    Only the rows in `index` take part (None: all).  Weight gradients are formed in the work dtype: straight into the
    result when each slice of the vocabulary is visited once (`one_visit`), else added up and rounded at the end.

    A GPU multiplies 16-bit operands as they are, with float32 sums and results; there the gradient of a tile is 16-bit
    too and lies in the first half of each of its rows.  A CPU, which rounds such sums, multiplies in the work dtype.
    Under autocast operands are first rounded to `products`.

    `unscaled`: a loss scale is yet to come, so nothing of a gradient may be rounded to float16.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        transform: Transform,
        index: Tensor | None,
        needs: list[bool],
        work: torch.dtype,
        tile_size: int,
        one_visit: bool,
        products: torch.dtype | None = None,
        unscaled: bool = False,
    ) -> None:
        hidden, self._weight = tensors[:2]
        self._bias = tensors[2] if len(tensors) == 3 else None
        self._shape, self._dtype, self._index, self._transform = hidden.shape, hidden.dtype, index, transform
        dtypes = {t.dtype for t in tensors[:2]}
        self._rounded = None if torch.float64 in dtypes else products
        same = {self._rounded} if self._rounded else dtypes
        narrow = hidden.device.type == "cuda" and same in ({torch.float16}, {torch.bfloat16})
        self._operand = next(iter(same)) if narrow else work
        self._kept = {t.dtype: work if unscaled and t.dtype == torch.float16 else t.dtype for t in tensors}
        # What multiplies gradients.
        self._back = work if unscaled and self._operand == torch.float16 else self._operand
        flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])  # its width may be 0
        self._hidden = self._as_operand(flat if index is None else flat[index])
        self._work = work
        self._buffer = torch.empty(tile_size, dtype=work, device=hidden.device)
        self._visited: set[int] = set()
        self._d_hidden = torch.zeros_like(self._hidden, dtype=work) if needs[0] else None
        accumulator = self._kept[self._weight.dtype] if one_visit else work
        self._d_weight = torch.empty_like(self._weight, dtype=accumulator) if needs[1] else None
        self._d_bias = torch.zeros_like(self._bias, dtype=work) if self._bias is not None and needs[2] else None
        self._needs = needs

    def _view(self, rows: slice, columns: slice) -> Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        stride = row_stride(width)
        return self._buffer[: height * stride].view(height, stride)[:, :width]

    def _as_operand(self, t: Tensor) -> Tensor:
        return (t if self._rounded is None else t.to(self._rounded)).to(self._operand)

    def _gradient(self, rows: slice, columns: slice) -> Tensor:
        tile = self._view(rows, columns)
        return tile if self._back == self._work else tile.view(self._back)[:, : tile.shape[1]]

    def tile(self, rows: slice, columns: slice) -> Rows:
        out, weight = self._view(rows, columns), self._as_operand(self._weight[columns])
        if self._bias is None:
            self._multiply(self._hidden[rows], weight.T, out)
        elif self._operand == self._work:
            torch.addmm(self._bias[columns].to(self._work), self._hidden[rows], weight.T, out=out)
        else:
            self._multiply(self._hidden[rows], weight.T, out).add_(self._bias[columns])
        return Rows(out, None, self._transform)

    def target(self, rows: slice, columns: slice) -> Rows | None:
        return Rows(self._gradient(rows, columns), None, self._transform) if any(self._needs) else None

    def absorb(self, rows: slice, columns: slice) -> None:
        if not any(self._needs):
            return
        gradient = self._gradient(rows, columns)
        if self._d_hidden is not None:
            self._add_product(self._d_hidden[rows], gradient, self._as_operand(self._weight[columns]).to(self._back))
        if self._d_weight is not None:
            target, hidden = self._d_weight[columns], self._hidden[rows].to(self._back)
            if columns.start in self._visited:
                self._add_product(target, gradient.T, hidden)
            else:
                self._multiply(gradient.T, hidden, target)
            self._visited.add(columns.start)
        if self._d_bias is not None:
            self._d_bias[columns] += gradient.sum(0, dtype=self._work)

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """out = a @ b."""
        if out.dtype == a.dtype:
            return torch.mm(a, b, out=out)
        if a.dtype == self._work:
            return out.copy_(torch.mm(a, b))
        return torch.mm(a, b, out_dtype=out.dtype, out=out)

    def _add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += a @ b, `out` in the work dtype."""
        if a.dtype == self._work:
            out.addmm_(a, b)
        else:
            torch.addmm(out, a, b, out_dtype=self._work, out=out)

    def gradients(self) -> list[Tensor | None]:
        d_hidden = self._d_hidden
        if d_hidden is not None:
            d_hidden = d_hidden.to(self._kept[self._dtype])
            if self._index is not None:
                full = d_hidden.new_zeros(math.prod(self._shape[:-1]), self._shape[-1])
                d_hidden = full.index_copy_(0, self._index, d_hidden)
            d_hidden = d_hidden.view(self._shape)
        d_weight = None if self._d_weight is None else self._d_weight.to(self._kept[self._weight.dtype])
        if d_weight is not None and not self._visited:
            d_weight.zero_()
        d_bias = None if self._d_bias is None or self._bias is None else self._d_bias.to(self._kept[self._bias.dtype])
        return [d_hidden, d_weight] if self._bias is None else [d_hidden, d_weight, d_bias]


Side = Given | Projected
