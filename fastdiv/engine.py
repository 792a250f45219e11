"""Walks tiles: statistics over all columns, a second look where one is needed, gradients back to the inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastdiv import backends
from fastdiv.accept import UNNAMED
from fastdiv.log import log
from fastdiv.planner import Plan, plan, row_stride
from fastdiv.request import Request
from fastdiv.sources import work_dtype
from fastdiv.statistics import Sums, Tokens, empty_state, per_label, wanted
from fastdiv.tiles import Given, Projected, Projection, Side, Tile

_shaped = torch.ops.aten._unsafe_view.default


def exact(device: torch.device) -> AbstractContextManager[object]:
    """No autocast: which dtype a product has is said by the request, and everything else is float32 or float64."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


TokenLoss = Callable[[dict[str, Tensor], Tensor], Tensor]


class Problem:
    """One call's tensors, flattened to rows and freed of masked ones."""

    def __init__(
        self,
        request: Request,
        student: list[Tensor],
        teacher: list[Tensor],
        labels: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor | None,
        *,
        drop_rows: bool = False,
    ) -> None:
        """`drop_rows`: masked rows must not appear at all, even to a backend that would skip them."""
        self.request = request
        self.backend = backends.get(request.backend)
        self.student, self.teacher = student, teacher
        self.lead = student[0].shape[:-1]
        self.vocabulary = student[1].shape[0] if len(student) > 1 else student[0].shape[-1]
        self.tokens = math.prod(self.lead)
        self.device, self.work = student[0].device, work_dtype(*(t.dtype for t in [*student, *teacher]))
        self.label_shape = self.lead if labels is None else labels.shape
        k = 0 if labels is None else 1 if labels.shape == self.lead else labels.shape[-1]
        if labels is None:
            every = torch.empty(self.tokens, 0, dtype=torch.int64, device=self.device)
        else:
            every = labels.reshape(self.tokens, k).long()
        mask = None if mask is None else mask.reshape(-1).contiguous()
        exist = len(student) == 1 and len(teacher) < 2
        skip = exist and self.backend.skips_rows and not drop_rows
        clean = self._clean(every)
        self.index = None if skip else self._active(every, mask, clean)
        self.rows = self.tokens if self.index is None else self.index.numel()
        self.every_token = Tokens(
            self._inverse_temperature(temperature),
            self.gather(every).contiguous(),
            request.ignore_index,
            mask if skip else None,
            self.vocabulary,
            clean,
        )
        if not clean:
            self._check_labels()

    def _clean(self, labels: Tensor) -> bool:
        """Whether one glance shows that no label is ignored or impossible; not where it would wait for a device."""
        if self.device.type != "cpu" or not labels.numel():
            return False
        ends = labels.aminmax()
        low, high = ends.min.item(), ends.max.item()
        ignored = self.request.ignore_index
        return 0 <= low and high < self.vocabulary and not low <= ignored <= high

    def _active(self, labels: Tensor, mask: Tensor | None, clean: bool) -> Tensor | None:
        """Flat numbers of the tokens that take part; None: all.  Their count decides the size of every product, so
        another device is waited for here, where there is a mask or a label."""
        if labels.shape[1] and not clean:
            counted = (labels != self.request.ignore_index).any(1)
            mask = counted if mask is None else mask & counted
        return None if mask is None or bool(mask.all()) else mask.nonzero()[:, 0]

    def _check_labels(self) -> None:
        # Looking at the labels of another device would wait for it: there the row becomes NaN instead.
        look = self.device.type == "cpu" or os.environ.get("FASTDIV_CHECK", "0") not in ("", "0")
        tokens = self.every_token
        if not look or not tokens.labels.numel():
            return
        invalid = tokens.invalid if tokens.mask is None else tokens.invalid & tokens.mask[:, None]
        if bool(invalid.any()):
            row, column = (int(i) for i in invalid.nonzero()[0])
            raise IndexError(
                f"{UNNAMED}: labels: expected values in [0, {self.vocabulary}) "
                f"or ignore_index {self.request.ignore_index}, got {int(tokens.labels[row, column])} "
                f"at token {int(self.numbers[row])}"
            )

    def _inverse_temperature(self, temperature: Tensor | None) -> Tensor:
        if temperature is None:
            value = 1.0 / self.request.temperature
            return torch.full((self.rows,), value, dtype=self.work, device=self.device)
        if self.device.type == "cpu" and not bool((temperature > 0.0).all()):
            raise ValueError(f"{UNNAMED}: temperature: expected numbers above 0, got {float(temperature.min())}")
        return self.gather(temperature.reshape(-1)).to(self.work).reciprocal()

    @property
    def numbers(self) -> Tensor:
        """[rows] the flat numbers of the tokens that take part."""
        return torch.arange(self.tokens, device=self.device) if self.index is None else self.index

    def gather(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] -> [rows, ...]."""
        return tokens if self.index is None else tokens[self.index]

    def plan(self, full_rows: bool) -> Plan:
        projected = (len(self.student) > 1) + (len(self.teacher) > 1)
        itemsize, cached = self.work.itemsize, self.device.type == "cpu"
        result = plan(self.rows, self.vocabulary, projected, itemsize, self.request.workspace, full_rows, cached)
        log(
            "%s on %s: %d of %d tokens x %d, tiles of %d x %d",
            self.request.outputs, self.backend.name, self.rows, self.tokens, self.vocabulary,
            result.rows, result.columns,
        )  # fmt: skip
        return result

    def sides(self, tiles: Plan, needs: list[bool], unscaled: bool = False) -> tuple[Side, Side | None]:
        """Student and teacher; `needs` says which of their tensors want a gradient, `unscaled` that a loss scale is yet
        to come, so that those in float16 stay in float32."""
        size = min(tiles.rows, self.rows) * row_stride(tiles.columns)
        one_visit = tiles.rows >= self.rows

        def side(tensors: list[Tensor], which: str, needs: list[bool]) -> Side:
            transform = self.request.student if which == "student" else self.request.teacher
            if len(tensors) == 1:
                if unscaled and needs[0] and tensors[0].dtype == torch.float16:
                    tensors = [tensors[0].to(self.work)]  # kernels write a gradient in the dtype of its logits
                return Given(tensors, transform, self.index, needs)
            return Projected(
                tensors, transform, self.index, needs, self.work, size, one_visit, self.request.operand, unscaled
            )

        count = len(self.student)
        teacher = side(self.teacher, "teacher", needs[count:]) if self.teacher else None
        return side(self.student, "student", needs[:count]), teacher

    def tile(self, student: Side, teacher: Side | None, rows: slice, columns: slice) -> Tile:
        return Tile(
            student.tile(rows, columns),
            teacher.tile(rows, columns) if teacher else None,
            columns.start,
            columns.stop - columns.start,
            self.every_token.part(rows),
        )

    def scatter(self, rows: Tensor) -> Tensor:
        """[rows, ...] -> [tokens, ...], 0 at masked tokens."""
        if self.index is None:
            return rows
        return rows.new_zeros(self.tokens, *rows.shape[1:]).index_copy_(0, self.index, rows)

    def outputs(self, sums: Sums) -> list[Tensor]:
        """The outputs of all tokens, in their shapes."""
        values = self.backend.finish(self.request, self.every_token, sums)
        # Not a view, which could not be written in place once a graph is recorded.
        return [
            _shaped(self.scatter(value).contiguous(), self.label_shape if per_label(name) else self.lead)
            for name, value in zip(self.request.outputs, values, strict=True)
        ]

    def empty_sums(self) -> Sums:
        """Before anything was added."""
        shape = self.every_token.labels.shape
        state = empty_state(self.rows, self.device)
        terms = len(self.request.compared)
        compared = state.new_zeros((self.rows, terms, 3)) if terms else state.new_empty((self.rows, 0, 3))
        label_logits = torch.full(shape, torch.nan, dtype=self.work, device=self.device)
        if "rank" in self.request.outputs:
            rank = state.new_zeros(shape, dtype=torch.int64)
        else:
            rank = self.every_token.labels  # not read
        return Sums(state, label_logits, compared, rank)


def _on_chip(problem: Problem, sums: Sums) -> bool:
    """All sums of a call that asks for the least memory, where the backend takes one model's hidden states itself."""
    request = problem.request
    if request.workspace or len(problem.student) == 1 or problem.teacher or request.second_look or request.products:
        return False
    hidden, weight, *bias = problem.student
    if not hidden.shape[-1]:
        return False
    rows = problem.gather(hidden.reshape(-1, hidden.shape[-1]))
    projection = Projection(rows, weight, bias[0] if bias else None, request.student)
    tokens = problem.every_token
    done = problem.backend.accumulate_on_chip(
        projection, tokens, wanted(request.outputs), sums.state, sums.label_logits
    )
    how = "logits stay on the chip" if done else "this backend forms tiles of logits"
    log("%s on %s: workspace 0, %s", request.outputs, problem.backend.name, how)
    return done


def _accumulate(problem: Problem, sums: Sums, student: Side, teacher: Side | None, tiles: Plan, rows: slice) -> Tile:
    """Sums over all columns of some rows; returns the last tile (the only one where rows are full)."""
    request, part = problem.request, sums.part(rows)
    for columns in tiles.column_slices(problem.vocabulary):
        tile = problem.tile(student, teacher, rows, columns)
        if request.second_look:  # rows are full
            problem.backend.look(tile, wanted(request.outputs), list(request.compared), part, "rank" in request.outputs)
        else:
            problem.backend.accumulate(tile, wanted(request.outputs), part.state, part.label_logits)
    return tile


def _gradient(
    problem: Problem,
    sums: Sums,
    student: Side,
    teacher: Side | None,
    rows: slice,
    tiles: list[tuple[slice, Tile | None]],
    upstream: dict[str, Tensor],
) -> None:
    """Row gradients of some rows; `upstream` [rows] or [rows, K] each.  A tile that is still there is not made
    again."""
    part = sums.part(rows)
    prepared = problem.backend.prepare(problem.request, problem.every_token.part(rows), part, upstream)
    for columns, ready in tiles:
        tile = ready or problem.tile(student, teacher, rows, columns)
        problem.backend.gradient(
            tile,
            prepared,
            part.state,
            student.target(rows, columns),
            teacher.target(rows, columns) if teacher else None,
        )
        student.absorb(rows, columns)
        if teacher:
            teacher.absorb(rows, columns)


def forward(problem: Problem) -> tuple[list[Tensor], Tensor, Tensor]:
    """(outputs, state [tokens, len(STATE)], compared [tokens, C, 3])."""
    request, sums = problem.request, problem.empty_sums()
    if not _on_chip(problem, sums):
        tiles = problem.plan(full_rows=request.second_look)
        student, teacher = problem.sides(tiles, [False] * (len(problem.student) + len(problem.teacher)))
        for rows in tiles.row_slices(problem.rows):
            _accumulate(problem, sums, student, teacher, tiles, rows)
    return problem.outputs(sums), problem.scatter(sums.state), problem.scatter(sums.compared)


def backward(
    problem: Problem, state: Tensor, compared: Tensor, upstream: dict[str, Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of every student and teacher tensor (None where `needs` is False)."""
    tiles = problem.plan(full_rows=False)
    student, teacher = problem.sides(tiles, needs)
    nothing = problem.every_token.labels[:, :0]
    sums = Sums(problem.gather(state), nothing.to(problem.work), problem.gather(compared), nothing)
    lead = len(problem.lead)
    flat = {n: problem.gather(g.reshape(problem.tokens, *g.shape[lead:])) for n, g in upstream.items()}
    for rows in tiles.row_slices(problem.rows):
        columns: list[tuple[slice, Tile | None]] = [(c, None) for c in tiles.column_slices(problem.vocabulary)]
        _gradient(problem, sums, student, teacher, rows, columns, {name: g[rows] for name, g in flat.items()})
    return student.gradients() + (teacher.gradients() if teacher else [])


def fused(problem: Problem, token_loss: TokenLoss, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """(sum of token_loss over all rows, gradients): each row's logits are formed once and serve both directions.

    Gradients of float16 tensors are float32: a loss scale, which keeps them in float16's range, comes later.
    """
    tiles = problem.plan(full_rows=True)
    student, teacher = problem.sides(tiles, needs, unscaled=True)
    whole = slice(0, problem.vocabulary)
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    sums, numbers = problem.empty_sums(), problem.numbers
    for rows in tiles.row_slices(problem.rows):
        with exact(problem.device):
            tile = _accumulate(problem, sums, student, teacher, tiles, rows)
            outputs = problem.backend.finish(problem.request, problem.every_token.part(rows), sums.part(rows))
        values = dict(zip(problem.request.outputs, outputs, strict=True))
        leaves = {n: v.detach().requires_grad_(v.is_floating_point() and any(needs)) for n, v in values.items()}
        single = len(problem.label_shape) == len(problem.lead)
        with torch.enable_grad():
            shaped = {n: v[:, 0] if per_label(n) and single else v for n, v in leaves.items()}
            loss = token_loss(shaped, numbers[rows])
        check_token_loss(loss, rows.stop - rows.start)
        total += loss.detach().double().sum()
        if not any(needs):
            continue
        upstream = _derivatives(loss, {n: v for n, v in leaves.items() if v.requires_grad})
        with exact(problem.device):
            _gradient(problem, sums, student, teacher, rows, [(whole, tile)], upstream)
    return total.to(problem.work), student.gradients() + (teacher.gradients() if teacher else [])


def differentiate(problem: Problem, weights: dict[str, Tensor], overwrite: bool) -> tuple[list[Tensor], Tensor]:
    """(outputs, gradient of the sum of weights [tokens] or [tokens, K] times outputs) for logits that exist."""
    request, sums, tiles = problem.request, problem.empty_sums(), problem.plan(full_rows=True)
    student, teacher = problem.sides(tiles, [not overwrite, *([False] * len(problem.teacher))])
    assert isinstance(student, Given)
    if overwrite:
        # Kernels write by address, which autograd does not see: who saved these logits must hear of it.
        torch.autograd.graph.increment_version(problem.student)
        student.overwrite()
    flat = {name: problem.gather(w) for name, w in weights.items()}
    whole = slice(0, problem.vocabulary)
    for rows in tiles.row_slices(problem.rows):
        tile, target = problem.tile(student, teacher, rows, whole), student.target(rows, whole)
        assert target is not None
        upstream = {name: w[rows] for name, w in flat.items()}
        done = problem.backend.value_and_gradient(tile, request, sums.part(rows), upstream, target)
        how = "values and gradients in one go" if done else "values, then gradients"
        log("%s on %s: %s", request.outputs, problem.backend.name, how)
        if not done:
            tile = _accumulate(problem, sums, student, teacher, tiles, rows)
            _gradient(problem, sums, student, teacher, rows, [(whole, tile)], upstream)
    (gradient,) = student.gradients()
    assert gradient is not None
    return problem.outputs(sums), gradient


def _derivatives(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of statistics that a token loss uses.  Raises RuntimeError if it uses none."""
    found: tuple[Tensor | None, ...] = ()
    if loss.requires_grad and leaves:
        found = torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss), allow_unused=True)
    upstream = {name: g for name, g in zip(leaves, found, strict=False) if g is not None}
    if not upstream:
        raise RuntimeError(
            "linear_loss: token_loss must give a differentiable function of the statistics, got one whose graph has "
            f"none of {', '.join(leaves) or 'them'} (were they detached?)"
        )
    return upstream


def check_token_loss(loss: object, rows: int) -> None:
    """Raise unless a token loss gave one number per row."""
    if not isinstance(loss, Tensor) or loss.shape != (rows,):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"linear_loss: token_loss must return a tensor [{rows}], one loss per row, got {got}")
