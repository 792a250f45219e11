"""Launches of the row kernels: from a `Tile` to a kernel's arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fastdiv.backends.triton import blocks, language, rows
from fastdiv.statistics import WANTED
from fastdiv.tiles import Rows, Terms, Tile

Arguments = tuple[Any, ...]


def place(it: Rows | None) -> Arguments:
    """(tensor, row offsets or None, row stride) as the kernels take a tensor's rows."""
    if it is None:
        return None, None, 0
    stride = row_stride(it.tensor)
    if it.index is None and stride is not None:
        return it.tensor, None, stride
    return it.tensor, it.offsets(), 0


def row_stride(tensor: Tensor) -> int | None:
    """Elements from a row of [*, columns] to the next, where that is one number."""
    result = None
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if result is None:
            result, rows_below = stride, size
        elif stride != result * rows_below:
            return None
        else:
            rows_below *= size
    return result or 0


def kind(it: Rows | None) -> int:
    """What the logits' transform has to do."""
    if it is None or (it.transform.softcap == 0.0 and it.transform.scale == 1.0):
        return int(rows.PLAIN.value)
    return int(rows.CAPPED.value if it.transform.softcap else rows.SCALED.value)


def logits(it: Rows | None) -> Arguments:
    """A side's arguments: tensor, row offsets, row stride, scale, softcap."""
    scale, softcap = (it.transform.scale, it.transform.softcap) if it else (1.0, 0.0)
    return *place(it), float(scale), float(softcap)


def run(kernel: Any, rows: int, shape: blocks.Shape, *arguments: Any, times: int = 1, **fixed: Any) -> None:
    """Every launch: (kernel, how many rows, what a program takes, the arguments that may change from call to call,
    then the ones that a kernel is compiled for); `times` for a second axis of the grid.

    A kernel that does not compile or run is an error that says what to do.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    try:
        with _on(device):
            kernel[triton.cdiv(rows, shape.rows), times](
                *arguments, **fixed, ROWS=shape.rows, BLOCK=shape.block, num_warps=shape.warps
            )
    except (TritonError, RuntimeError) as error:
        name = "the interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"backend 'triton': kernel {kernel.__name__} does not compile or run on {name}: {error}\n"
            "FASTDIV_BACKEND=reference computes the same in plain torch"
        ) from error


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if language.INTERPRETED:
        import numpy as np

        return np.errstate(all="ignore")  # numpy evaluates both arms of a `where`
    return torch.cuda.device(device)


def accumulate(tile: Tile, wanted: int, state: Tensor, label_logits: Tensor, fresh: bool) -> None:
    """Adds a tile's columns to the state [n, len(STATE)] and finds logits of labels [n, K]."""
    count, labels = tile.labels.shape
    shape = blocks.shape("accumulate_pair" if tile.teacher else "accumulate", tile.columns)
    run(
        rows.accumulate,
        count,
        shape,
        *logits(tile.student),
        *logits(tile.teacher),
        tile.inverse_temperature,
        tile.labels,
        label_logits,
        state,
        count,
        tile.columns,
        tile.first_column,
        X_KIND=kind(tile.student),
        Y_KIND=kind(tile.teacher),
        FIRST=bool(wanted & (WANTED["first"] | WANTED["second"])),
        SECOND=bool(wanted & WANTED["second"]),
        SQUARES=bool(wanted & WANTED["squares"]),
        SUM=bool(wanted & WANTED["sum"]),
        ARGMAX=bool(wanted & WANTED["argmax"]),
        FORWARD=bool(wanted & WANTED["forward"]),
        REVERSE=bool(wanted & WANTED["reverse"]),
        FRESH=fresh,
        LABELS=labels,
        LABEL_BLOCK=blocks.power_of_two(labels),
    )


def frames(state: Tensor, inverse_temperature: Tensor) -> Tensor:
    """[n, FRAME] float32: what the second look and the gradient subtract from logits."""
    count = state.shape[0]
    frame = torch.empty(count, rows.FRAME.value, dtype=torch.float32, device=state.device)
    run(rows.frames, count, blocks.FRAMES, state, inverse_temperature, frame, count)
    return frame


def compare(tile: Tile, terms: Terms, frame: Tensor, sums: Tensor) -> None:
    """Adds sums [n, terms, 3] of value, dlp and dlq, a launch a divergence."""
    count = frame.shape[0]
    shape = blocks.shape("compare", tile.columns)
    for i, (divergence, parameter) in enumerate(terms):
        run(
            rows.compare,
            count,
            shape,
            *logits(tile.student),
            *logits(tile.teacher),
            tile.inverse_temperature,
            frame,
            float(parameter),
            sums[:, i],
            sums.stride(0),
            count,
            tile.columns,
            VALUE=language.VALUE[divergence.name],
            DLP=language.DLP[divergence.name],
            DLQ=language.DLQ[divergence.name],
            X_KIND=kind(tile.student),
            Y_KIND=kind(tile.teacher),
        )


def rank(tile: Tile, label_logits: Tensor, above: Tensor) -> None:
    """Adds to `above` [n, K] how many of the tile's logits are above each label's."""
    count, labels = above.shape
    shape = blocks.shape("rank", tile.columns)
    run(
        rows.rank,
        count,
        shape,
        *logits(tile.student),
        label_logits,
        above,
        count,
        tile.columns,
        labels,
        X_KIND=kind(tile.student),
    )


def gradient(
    tile: Tile,
    terms: Terms,
    frame: Tensor,
    c: Tensor,
    label_gains: Tensor,
    student: Rows | None,
    teacher: Rows | None,
) -> None:
    """Writes row gradients into the rows of `student` and `teacher`."""
    count, labels = tile.labels.shape
    shape = blocks.shape("gradient", tile.columns)
    pair = bool(terms) or teacher is not None
    other = tile.teacher if pair else None
    functions: list[Callable[..., Any]] = [table[d.name] for table in (language.DLP, language.DLQ) for d, _ in terms]
    run(
        rows.gradient,
        count,
        shape,
        *logits(tile.student),
        *place(student),
        *logits(other),
        *place(teacher),
        tile.inverse_temperature,
        tile.labels,
        label_gains,
        frame,
        c,
        tuple(float(parameter) for _, parameter in terms),
        count,
        tile.columns,
        tile.first_column,
        DLP=tuple(functions[: len(terms)]),
        DLQ=tuple(functions[len(terms) :]),
        X_KIND=kind(tile.student),
        Y_KIND=kind(other),
        POLYNOMIAL=True,
        LABELS=labels,
        LABEL_BLOCK=blocks.power_of_two(labels),
    )
