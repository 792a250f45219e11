"""Walks tiles: statistics over all columns, a second look where one is needed, gradients back to the inputs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiv import backends
from fastdiv.planner import Plan, plan
from fastdiv.request import Request
from fastdiv.sources import work_dtype
from fastdiv.statistics import Statistics, coefficients, empty_state, output_dtype, per_label, values, wanted
from fastdiv.tiles import Given, Projected, Side, Tile

_LOG = logging.getLogger("fastdiv")

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
    ) -> None:
        self.request = request
        self.backend = backends.get(request.backend)
        self.student, self.teacher = student, teacher
        self.lead = student[0].shape[:-1]
        self.vocabulary = student[1].shape[0] if len(student) > 1 else student[0].shape[-1]
        self.tokens = math.prod(self.lead)
        self.device, self.work = student[0].device, work_dtype(*(t.dtype for t in [*student, *teacher]))
        self.label_shape = self.lead if labels is None else labels.shape
        k = 0 if labels is None else 1 if labels.shape == self.lead else labels.shape[-1]
        every = torch.empty(self.tokens, 0, dtype=torch.int64, device=self.device)
        every = every if labels is None else labels.reshape(self.tokens, k).long()
        active = None if mask is None else mask.reshape(-1)
        if k:
            counted = (every != request.ignore_index).any(1)
            active = counted if active is None else active & counted
        # Flat numbers of the tokens that take part; None: all.
        self.index = None if active is None or bool(active.all()) else active.nonzero()[:, 0]
        self.labels = self.gather(every).contiguous()  # [rows, K]
        self.ignored = self.labels == request.ignore_index
        self.invalid = ~self.ignored & ((self.labels < 0) | (self.labels >= self.vocabulary))
        self._check_labels()
        self.inverse_temperature = self._inverse_temperature(temperature)

    def _check_labels(self) -> None:
        # Looking at the labels of another device would wait for it: there the row becomes NaN instead.
        look = self.device.type == "cpu" or os.environ.get("FASTDIV_CHECK", "0") not in ("", "0")
        if look and bool(self.invalid.any()):
            row, column = (int(i) for i in self.invalid.nonzero()[0])
            raise IndexError(
                f"labels: expected values in [0, {self.vocabulary}) or ignore_index {self.request.ignore_index}, "
                f"got {int(self.labels[row, column])} at token {int(self.numbers[row])}"
            )

    def _inverse_temperature(self, temperature: Tensor | None) -> Tensor:
        if temperature is None:
            value = 1.0 / self.request.temperature
            return torch.full((self.rows,), value, dtype=self.work, device=self.device)
        if self.device.type == "cpu" and not bool((temperature > 0.0).all()):
            raise ValueError(f"temperature: expected numbers above 0, got {float(temperature.min())}")
        return self.gather(temperature.reshape(-1)).to(self.work).reciprocal()

    @property
    def rows(self) -> int:
        return self.tokens if self.index is None else self.index.numel()

    @property
    def numbers(self) -> Tensor:
        """[rows] the flat numbers of the tokens that take part."""
        return torch.arange(self.tokens, device=self.device) if self.index is None else self.index

    def gather(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] -> [rows, ...]."""
        return tokens if self.index is None else tokens[self.index]

    def plan(self, full_rows: bool) -> Plan:
        projected = (len(self.student) > 1) + (len(self.teacher) > 1)
        itemsize = torch.finfo(self.work).bits // 8
        result = plan(self.rows, self.vocabulary, projected, itemsize, self.request.workspace, full_rows)
        _LOG.info(
            "%s on %s: %d of %d tokens x %d, tiles of %d x %d",
            "+".join(self.request.outputs), self.backend.name, self.rows, self.tokens, self.vocabulary,
            result.rows, result.columns,
        )  # fmt: skip
        return result

    def sides(self, tiles: Plan, needs: list[bool]) -> tuple[Side, Side | None]:
        """Student and teacher; `needs` says which of their tensors want a gradient."""
        size = min(tiles.rows, self.rows) * tiles.columns
        one_visit = tiles.rows >= self.rows

        def side(tensors: list[Tensor], which: str, needs: list[bool]) -> Side:
            transform = self.request.student if which == "student" else self.request.teacher
            if len(tensors) == 1:
                return Given(tensors, transform, self.index, needs)
            return Projected(tensors, transform, self.index, needs, self.work, size, one_visit)

        count = len(self.student)
        teacher = side(self.teacher, "teacher", needs[count:]) if self.teacher else None
        return side(self.student, "student", needs[:count]), teacher

    def tile(self, student: Side, teacher: Side | None, rows: slice, columns: slice) -> Tile:
        return Tile(
            student.tile(rows, columns),
            teacher.tile(rows, columns) if teacher else None,
            columns.start,
            columns.stop - columns.start,
            self.inverse_temperature[rows],
            self.labels[rows],
        )

    def scatter(self, rows: Tensor) -> Tensor:
        """[rows, ...] -> [tokens, ...], 0 at masked tokens."""
        if self.index is None:
            return rows
        return rows.new_zeros(self.tokens, *rows.shape[1:]).index_copy_(0, self.index, rows)

    def outputs(self, rows: slice, s: Statistics, sums: Tensor) -> dict[str, Tensor]:
        """Output name -> [rows] or [rows, K], in the output's dtype, 0 at ignored labels."""
        result = {}
        for name, value in zip(self.request.outputs, values(self.request, s, sums), strict=True):
            if per_label(name):
                value = value.masked_fill(self.ignored[rows], 0)
            result[name] = value.to(output_dtype(name, self.work))
        return result


class Sums:
    """What the forward pass leaves of some rows."""

    def __init__(self, problem: Problem) -> None:
        rows, labels = problem.labels.shape
        self.state = empty_state(rows, problem.device)
        self.label_logits = torch.full((rows, labels), torch.nan, dtype=problem.work, device=problem.device)
        self.compared = torch.zeros(rows, len(problem.request.compared), 3, dtype=torch.float64, device=problem.device)
        self.rank = torch.zeros(rows, labels, dtype=torch.int64, device=problem.device)

    def statistics(self, problem: Problem, rows: slice) -> Statistics:
        return Statistics(
            self.state[rows],
            problem.inverse_temperature[rows],
            problem.vocabulary,
            problem.labels[rows],
            self.label_logits[rows],
            self.rank[rows],
        )


def _accumulate(problem: Problem, sums: Sums, student: Side, teacher: Side | None, tiles: Plan, rows: slice) -> Tile:
    """Sums over all columns of some rows; returns the last tile (the only one where rows are full)."""
    request = problem.request
    for columns in tiles.column_slices(problem.vocabulary):
        tile = problem.tile(student, teacher, rows, columns)
        problem.backend.accumulate(tile, wanted(request), sums.state[rows], sums.label_logits[rows])
    if request.second_look:
        rank = sums.rank[rows] if "rank" in request.outputs else None
        problem.backend.compare(
            tile, list(request.compared), sums.state[rows], sums.label_logits[rows], sums.compared[rows], rank
        )
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
    s = sums.statistics(problem, rows)
    wide = {name: _per_label_gradient(problem, rows, name, g.double()) for name, g in upstream.items()}
    c, terms = coefficients(problem.request, s, sums.compared[rows], wide)
    count = rows.stop - rows.start
    labels = torch.cat([torch.zeros(count, 0, dtype=torch.int64, device=problem.device), *c.labels], 1)
    gains = torch.cat([torch.zeros(count, 0, dtype=torch.float64, device=problem.device), *c.gains], 1)
    for columns, ready in tiles:
        tile = ready or problem.tile(student, teacher, rows, columns)
        problem.backend.gradient(
            tile._replace(labels=labels),
            terms,
            sums.state[rows],
            c.c.to(problem.work),
            gains.to(problem.work),
            student.target(rows, columns),
            teacher.target(rows, columns) if teacher else None,
        )
        student.absorb(rows, columns)
        if teacher:
            teacher.absorb(rows, columns)


def _per_label_gradient(problem: Problem, rows: slice, name: str, g: Tensor) -> Tensor:
    """Upstream of a per-label output: 0 at ignored labels, NaN (so that the row shows it) at impossible ones."""
    if not per_label(name):
        return g
    g = g.reshape(problem.ignored[rows].shape).masked_fill(problem.ignored[rows], 0.0)
    return g.masked_fill(problem.invalid[rows], torch.nan)


def forward(problem: Problem) -> tuple[list[Tensor], Tensor, Tensor]:
    """(outputs, state [tokens, len(STATE)], compared [tokens, C, 3])."""
    request = problem.request
    tiles = problem.plan(full_rows=request.second_look)
    student, teacher = problem.sides(tiles, [False] * (len(problem.student) + len(problem.teacher)))
    sums = Sums(problem)
    for rows in tiles.row_slices(problem.rows):
        _accumulate(problem, sums, student, teacher, tiles, rows)
    everything = slice(0, problem.rows)
    outputs = problem.outputs(everything, sums.statistics(problem, everything), sums.compared)
    shaped = [
        problem.scatter(value).reshape(problem.label_shape if per_label(name) else problem.lead)
        for name, value in outputs.items()
    ]
    return shaped, problem.scatter(sums.state), problem.scatter(sums.compared)


def backward(
    problem: Problem, state: Tensor, compared: Tensor, upstream: dict[str, Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of every student and teacher tensor (None where `needs` is False)."""
    tiles = problem.plan(full_rows=False)
    student, teacher = problem.sides(tiles, needs)
    sums = Sums(problem)
    sums.state, sums.compared = problem.gather(state), problem.gather(compared)
    lead = len(problem.lead)
    flat = {n: problem.gather(g.reshape(problem.tokens, *g.shape[lead:])) for n, g in upstream.items()}
    for rows in tiles.row_slices(problem.rows):
        columns: list[tuple[slice, Tile | None]] = [(c, None) for c in tiles.column_slices(problem.vocabulary)]
        _gradient(problem, sums, student, teacher, rows, columns, {name: g[rows] for name, g in flat.items()})
    return student.gradients() + (teacher.gradients() if teacher else [])


def fused(problem: Problem, token_loss: TokenLoss, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """(sum of token_loss over all rows, gradients): each row's logits are formed once and serve both directions."""
    tiles = problem.plan(full_rows=True)
    student, teacher = problem.sides(tiles, needs)
    whole = slice(0, problem.vocabulary)
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    sums, numbers = Sums(problem), problem.numbers
    for rows in tiles.row_slices(problem.rows):
        tile = _accumulate(problem, sums, student, teacher, tiles, rows)
        values_ = problem.outputs(rows, sums.statistics(problem, rows), sums.compared[rows])
        leaves = {n: v.detach().requires_grad_(v.is_floating_point() and any(needs)) for n, v in values_.items()}
        single = len(problem.label_shape) == len(problem.lead)
        with torch.enable_grad():
            shaped = {n: v[:, 0] if per_label(n) and single else v for n, v in leaves.items()}
            loss = token_loss(shaped, numbers[rows])
        _check_token_loss(loss, rows.stop - rows.start)
        total += loss.detach().double().sum()
        if not any(needs):
            continue
        names = [n for n, v in leaves.items() if v.requires_grad and loss.requires_grad]
        grads = _derivatives(loss, [leaves[n] for n in names])
        upstream = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
        _gradient(problem, sums, student, teacher, rows, [(whole, tile)], upstream)
    return total.to(problem.work), student.gradients() + (teacher.gradients() if teacher else [])


def _derivatives(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not leaves:
        return ()
    return torch.autograd.grad(loss, leaves, torch.ones_like(loss), allow_unused=True)


def _check_token_loss(loss: object, rows: int) -> None:
    if not isinstance(loss, Tensor) or loss.shape != (rows,):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"linear_loss: token_loss must return a tensor [{rows}], one loss per row, got {got}")
