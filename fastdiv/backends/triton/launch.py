"""Launches of the row kernels: from a `Tile` to a kernel's arguments."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fastdiv.backends.triton import blocks, language, rows, scalars
from fastdiv.backends.triton.accumulate import accumulate as accumulate_kernel
from fastdiv.backends.triton.compare import compare as compare_kernel
from fastdiv.backends.triton.compare import rank as rank_kernel
from fastdiv.backends.triton.gradient import gradient as gradient_kernel
from fastdiv.divergences import DIVERGENCES
from fastdiv.request import Request
from fastdiv.statistics import COEFFICIENTS, WANTED, Prepared, Sums, Tokens, output_dtype, per_label
from fastdiv.tiles import Rows, Terms, Tile

Arguments = tuple[Any, ...]


def place(it: Rows | None) -> Arguments:
    """(tensor, row offsets or None, row stride) as the kernels take a tensor's rows."""
    if it is None:
        return None, None, 0
    return it.tensor, *it.place()


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
    if rows == 0:
        return
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


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if not language.INTERPRETED:
        with torch.cuda.device(device):
            yield
        return
    import numpy as np

    # The interpreter changes triton.language while a kernel runs; numpy evaluates both arms of a `where`.
    with _ONE_AT_A_TIME, np.errstate(all="ignore"):
        yield


def accumulate(tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
    """Adds a tile's columns to the state [n, len(STATE)] and finds logits of labels [n, K]."""
    count, labels = tile.tokens.labels.shape
    shape = blocks.shape("accumulate_pair" if tile.teacher else "accumulate", tile.columns)
    kinds = kind(tile.student), kind(tile.teacher)
    run(
        accumulate_kernel,
        count,
        shape,
        *logits(tile.student),
        *logits(tile.teacher),
        tile.tokens.inverse_temperature,
        tile.tokens.mask,
        tile.tokens.labels,
        tile.tokens.ignore_index,
        label_logits,
        state,
        count,
        tile.columns,
        tile.first_column,
        X_KIND=kinds[0],
        Y_KIND=kinds[1],
        FIRST=bool(wanted & (WANTED["first"] | WANTED["second"])),
        SECOND=bool(wanted & WANTED["second"]),
        SQUARES=bool(wanted & WANTED["squares"]),
        SUM=bool(wanted & WANTED["sum"]),
        ARGMAX=bool(wanted & WANTED["argmax"]),
        FORWARD=bool(wanted & WANTED["forward"]),
        REVERSE=bool(wanted & WANTED["reverse"]),
        FRESH=tile.first_column == 0,
        LABELS=labels,
        LABEL_BLOCK=blocks.power_of_two(labels),
        STAGES=blocks.stages(tile.teacher is not None, rows.CAPPED.value in kinds),
    )


def _tokens(tokens: Tokens) -> Arguments:
    return tokens.inverse_temperature, tokens.mask, tokens.labels, tokens.ignore_index


def _labels(tokens: Tokens) -> dict[str, Any]:
    labels = tokens.labels.shape[1]
    return {"LABELS": labels, "LABEL_BLOCK": blocks.power_of_two(labels)}


def _divergences(request: Request, names: tuple[str, ...]) -> dict[str, Any]:
    """Of each name: its weights of the two KLs, or its place among the sums of the second look."""
    places = {divergence.name: i for i, (divergence, _) in enumerate(request.compared)}
    found = [DIVERGENCES.get(name) for name in names]
    weights = [(d.one_pass if d else None) or (0.0, 0.0) for d in found]
    return {
        "NAMES": names,
        "FORWARD": tuple(forward for forward, _ in weights),
        "REVERSE": tuple(reverse for _, reverse in weights),
        "COMPARED": tuple(places.get(name, -1) for name in names),
    }


def _frames(tokens: Tokens, state: Tensor) -> Tensor:
    count = state.shape[0]
    frame = torch.empty(count, rows.FRAME.value, dtype=torch.float32, device=state.device)
    run(scalars.frames, count, blocks.SCALARS, state, *_tokens(tokens), frame, count, **_labels(tokens))
    return frame


def finish(request: Request, tokens: Tokens, sums: Sums) -> list[Tensor]:
    """The outputs, all by one launch."""
    count, labels = tokens.labels.shape
    outputs = [
        torch.empty(
            (count, labels) if per_label(name) else (count,),
            dtype=output_dtype(name, torch.float32),
            device=sums.state.device,
        )
        for name in request.outputs
    ]
    run(
        scalars.finish,
        count,
        blocks.SCALARS,
        sums.state,
        *_tokens(tokens),
        sums.label_logits,
        sums.compared,
        sums.compared.stride(0),
        sums.rank,
        tuple(outputs),
        tokens.vocabulary,
        count,
        **_divergences(request, request.outputs),
        **_labels(tokens),
    )
    return outputs


@dataclass(frozen=True)
class Framed(Prepared):
    """`Prepared`, and what the kernel subtracts from logits."""

    frame: Tensor  # [n, FRAME] float32
    polynomial: bool  # whether c1 to c4 are in use


def prepare(request: Request, tokens: Tokens, sums: Sums, upstream: dict[str, Tensor]) -> Framed:
    """Coefficients, label gains and frame, all by one launch."""
    count, labels = tokens.labels.shape
    device, names = sums.state.device, tuple(upstream)
    terms = [pair for pair in request.divergences if pair[0].name in upstream]
    places = {divergence.name: i for i, (divergence, _) in enumerate(terms)}
    width = labels * ("log_prob" in upstream) + ("max_log_prob" in upstream)
    given = [g.reshape(count, labels).contiguous() if per_label(n) else g.reshape(count) for n, g in upstream.items()]
    result = Framed(
        torch.empty(count, COEFFICIENTS + len(terms), dtype=torch.float32, device=device),
        torch.empty(count, width, dtype=torch.int64, device=device),
        torch.empty(count, width, dtype=torch.float32, device=device),
        terms,
        torch.empty(count, rows.FRAME.value, dtype=torch.float32, device=device),
        any(name in _POLYNOMIAL for name in names),
    )
    run(
        scalars.prepare,
        count,
        blocks.SCALARS,
        sums.state,
        *_tokens(tokens),
        sums.compared,
        sums.compared.stride(0),
        tuple(given),
        tuple(g.stride(0) for g in given),
        result.frame,
        result.c,
        result.labels,
        result.gains,
        tokens.vocabulary,
        count,
        TERM=tuple(places.get(name, -1) for name in names),
        TERMS=len(terms),
        GAINS=width,
        **_divergences(request, names),
        **_labels(tokens),
    )
    return result


_POLYNOMIAL = ("entropy", "log_sum_sq_probs", "varentropy", "mean_logit")
"""Outputs whose gradient has terms in log p or p^2, or a constant."""


def compare(tile: Tile, terms: Terms, sums: Sums) -> None:
    """Adds sums of value, dlp and dlq, a launch a divergence."""
    count = sums.state.shape[0]
    frame, shape = _frames(tile.tokens, sums.state), blocks.shape("compare", tile.columns)
    for i, (divergence, parameter) in enumerate(terms):
        run(
            compare_kernel,
            count,
            shape,
            *logits(tile.student),
            *logits(tile.teacher),
            tile.tokens.inverse_temperature,
            frame,
            float(parameter),
            sums.compared[:, i],
            sums.compared.stride(0),
            count,
            tile.columns,
            VALUE=language.VALUE[divergence.name],
            DLP=language.DLP[divergence.name],
            DLQ=language.DLQ[divergence.name],
            X_KIND=kind(tile.student),
            Y_KIND=kind(tile.teacher),
        )


def rank(tile: Tile, sums: Sums) -> None:
    """Adds to `sums.rank` [n, K] how many of the tile's logits are above each label's."""
    count, labels = sums.rank.shape
    shape = blocks.shape("rank", tile.columns)
    run(
        rank_kernel,
        count,
        shape,
        *logits(tile.student),
        tile.tokens.mask,
        sums.label_logits,
        sums.rank,
        count,
        tile.columns,
        labels,
        times=labels,
        X_KIND=kind(tile.student),
    )


def _narrower(gradient: Rows | None, logits: Rows | None) -> bool:
    return bool(gradient and logits and gradient.tensor.itemsize < logits.tensor.itemsize)


def gradient(tile: Tile, prepared: Framed, student: Rows | None, teacher: Rows | None) -> None:
    """Writes row gradients into the rows of `student` and `teacher`."""
    count, labels = prepared.labels.shape
    terms = prepared.terms
    other = tile.teacher if terms or teacher else None
    shape = blocks.shape("gradient_pair" if other else "gradient", tile.columns)
    run(
        gradient_kernel,
        count,
        shape,
        *logits(tile.student),
        *place(student),
        *logits(other),
        *place(teacher),
        tile.tokens.inverse_temperature,
        prepared.labels,
        prepared.gains,
        prepared.frame,
        prepared.c,
        tuple(float(parameter) for _, parameter in terms),
        count,
        tile.columns,
        tile.first_column,
        DLP=tuple(language.DLP[divergence.name] for divergence, _ in terms),
        DLQ=tuple(language.DLQ[divergence.name] for divergence, _ in terms),
        TEXT=language.TEXT,
        X_KIND=kind(tile.student),
        Y_KIND=kind(other),
        POLYNOMIAL=prepared.polynomial,
        NARROWER=_narrower(student, tile.student) or _narrower(teacher, other),
        LABELS=labels,
        LABEL_BLOCK=blocks.power_of_two(labels),
    )
