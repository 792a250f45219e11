"""Bitwise promises: the same call twice, a row alone or among others, any number of threads, any strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, head
from torch import Tensor

import fastdiv
from fastdiv.request import Transform
from fastdiv.testing import assert_bitwise_equal
from fastdiv.tiles import Rows

OUTPUTS = (*MODEL_OUTPUTS, "argmax", "is_top1", "rank", *DIVERGENCES)


def inputs(dtype: torch.dtype, rows: int = 9, v: int = 3001) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = ((torch.randn(rows, v, generator=generator) * 4).to(dtype) for _ in range(2))
    return x, y, torch.randint(0, v, (rows,), generator=generator)


def everything(x: Tensor, y: Tensor, labels: Tensor, backend: str, **options: Any) -> dict[str, Tensor]:
    """Every output, and the gradients of their sum."""
    x, y = (t.detach().requires_grad_() for t in (x, y))
    stats = fastdiv.token_stats(x, labels, teacher=y, outputs=OUTPUTS, backend=backend, **options)
    total = torch.stack([v for v in stats.values() if v.requires_grad]).sum()
    dx, dy = torch.autograd.grad(total, (x, y))
    return {**{k: v.detach() for k, v in stats.items()}, "student gradient": dx, "teacher gradient": dy}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], pick: Any = slice(None)) -> None:
    for name in want:
        assert_bitwise_equal(got[name], want[name][pick], name)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
def test_the_same_call_twice(backend: str, dtype: torch.dtype) -> None:
    want = everything(*inputs(dtype), backend)
    for _ in range(3):
        assert_same(everything(*inputs(dtype), backend), want)


def test_the_same_call_twice_from_hidden_states(backend: str) -> None:
    tensors, labels = head(50, 3001, 32), torch.arange(50)

    def run() -> list[Tensor]:
        stats = fastdiv.token_stats(fastdiv.LinearLogits(*tensors), labels, backend=backend, workspace=200_000)
        return [*stats.values(), *torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), tensors)]

    for a, b in zip(run(), run(), strict=True):
        assert_bitwise_equal(a, b)


@DTYPES
def test_a_row_alone_is_the_row_in_a_batch(backend: str, dtype: torch.dtype) -> None:
    x, y, labels = inputs(dtype)
    want = everything(x, y, labels, backend)
    for pick in (slice(0, 1), slice(4, 5), slice(8, 9), slice(2, 7)):
        assert_same(everything(x[pick], y[pick], labels[pick], backend), want, pick)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_row_alone_has_the_stride_of_its_batch(dimensions: int) -> None:
    """Triton has one kernel for strides that are multiples of 16 and another one for others."""
    batch = torch.empty(*(3,) * dimensions, 301)
    alone = batch[(slice(1, 2),) * dimensions]
    assert Rows(alone, None, Transform()).place() == Rows(batch, None, Transform()).place() == (None, 301)


@DTYPES
def test_a_row_of_a_large_batch(backend: str, dtype: torch.dtype) -> None:
    """More rows than any block of rows: how a batch is cut must not show."""
    x, y, labels = inputs(dtype, rows=900, v=2500)
    want = everything(x, y, labels, backend)
    pick = slice(837, 840)
    assert_same(everything(x[pick], y[pick], labels[pick], backend), want, pick)


@DTYPES
def test_any_number_of_threads(backend: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(everything(*inputs(dtype), backend))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@DTYPES
def test_strided_rows_are_the_contiguous_ones(backend: str, dtype: torch.dtype) -> None:
    x, y, labels = inputs(dtype)
    want = everything(x, y, labels, backend)
    wide = torch.cat([x, torch.full_like(x[:, :5], torch.nan)], 1)[:, : x.shape[1]]
    across = y.T.contiguous().T
    assert not wide.is_contiguous() and across.stride(-1) != 1
    assert_same(everything(wide, across, labels, backend), want)


@DTYPES
def test_masked_rows_leave_the_others_alone(backend: str, dtype: torch.dtype) -> None:
    x, y, labels = inputs(dtype)
    mask = torch.tensor([True, False, True, True, False, False, True, True, False])
    got = everything(x, y, labels, backend, mask=mask)
    want = everything(x[mask], y[mask], labels[mask], backend)
    for name, value in want.items():
        assert_bitwise_equal(got[name][mask], value, name)
        assert (got[name][~mask] == 0).all(), name


def test_the_workspace_does_not_change_per_token_numbers_from_logits(backend: str) -> None:
    want = everything(*inputs(torch.float32), backend)
    assert_same(everything(*inputs(torch.float32), backend, workspace=1), want)


def test_one_pass_of_linear_loss_equals_the_two_of_log_prob(backend: str) -> None:
    """With full rows in one tile both take the same products in the same order."""
    tensors, labels = head(20, 700, 16), torch.arange(20)
    own = fastdiv.LinearLogits(*tensors)
    seen: list[Tensor] = []

    def token_loss(stats: fastdiv.TokenStats, rows: Tensor) -> Tensor:
        seen.append(stats.log_prob.detach())
        return -stats.log_prob

    loss = fastdiv.linear_loss(own, labels, token_loss, backend=backend)
    fused = torch.autograd.grad(loss, tensors)
    log_prob = fastdiv.log_prob(own, labels, backend=backend)
    apart = torch.autograd.grad(-log_prob.sum(), tensors)
    assert_bitwise_equal(torch.cat(seen), log_prob.detach())
    for a, b in zip(fused, apart, strict=True):
        assert_bitwise_equal(a, b)
