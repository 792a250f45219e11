"""Aggregation: golden numbers, exact sums over micro-batches, nothing valid, nothing read where masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv.objectives import aggregate, ppo_clip

CASES = [
    ("token_mean", None, "agg/token_mean"),
    ("seq_mean_token_mean", None, "agg/seq_mean_token_mean"),
    ("seq_mean_token_sum", None, "agg/seq_mean_token_sum"),
    ("seq_mean_token_sum_norm", 4, "agg/seq_mean_token_sum_norm_L4"),
]


@pytest.mark.parametrize(("mode", "length", "key"), CASES)
def test_golden(
    mode: str, length: float | None, key: str, golden: dict[str, Any], fixture_a: dict[str, Tensor]
) -> None:
    tensors = (fixture_a[name] for name in ("logp", "old", "adv", "mask"))
    loss, _ = ppo_clip(*tensors, clip_high=0.28, aggregation=mode, length=length)
    assert loss.item() == pytest.approx(golden[key], rel=1e-8)


@pytest.mark.parametrize(("mode", "length", "_"), CASES)
def test_functions_are_the_modes(mode: str, length: float | None, _: str) -> None:
    values, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.7
    named = {} if length is None else {"length": length}
    direct = getattr(aggregate, mode)(values, mask, **named)
    assert torch.equal(direct, aggregate.reduce(values, mask, mode, length=length))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("mode", "length", "_"), CASES)
def test_micro_batches_add_up(mode: str, length: float | None, _: str, parts: int) -> None:
    mask = torch.rand(8, 6) < 0.6
    mask[3] = False  # a padded sequence counts nowhere
    values = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    whole = aggregate.reduce(values, mask, mode, length=length)
    (expected,) = torch.autograd.grad(whole, values)

    total = sum(aggregate.normalizer(m, mode) for m in mask.chunk(parts))
    assert torch.equal(torch.as_tensor(total), aggregate.normalizer(mask, mode))
    losses = [
        aggregate.reduce(v, m, mode, normalizer=total, length=length)
        for v, m in zip(values.chunk(parts), mask.chunk(parts), strict=True)
    ]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-13, atol=1e-15)
    (gradient,) = torch.autograd.grad(sum(losses), values)
    assert torch.equal(gradient, expected)
    as_number = aggregate.reduce(values, mask, mode, normalizer=int(total), length=length)
    assert torch.equal(as_number, whole)


def test_normalizer_counts_tokens_or_sequences_that_have_one() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert [aggregate.normalizer(mask, mode).item() for mode in aggregate.MODES] == [3, 2, 2, 2]
    ones = torch.ones(3, 3)
    assert aggregate.seq_mean_token_sum(ones, mask).item() == 1.5
    assert aggregate.seq_mean_token_mean(ones, mask).item() == 1


@pytest.mark.parametrize(("mode", "length", "_"), CASES)
def test_nothing_valid_is_zero_with_zero_gradient(mode: str, length: float | None, _: str) -> None:
    values = torch.full((2, 3), torch.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in (None, aggregate.normalizer(mask, mode), 5):
        loss = aggregate.reduce(values, mask, mode, normalizer=normalizer, length=length)
        (gradient,) = torch.autograd.grad(loss, values)
        assert loss.item() == 0 and torch.equal(gradient, torch.zeros(2, 3))


def test_none_returns_tokens() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0])
    mask = torch.tensor([True, False, True])
    assert aggregate.reduce(values, mask, "none").tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, "unknown mode 'mean'.*; known are token_mean, .*, none"),
        ({"mode": "mean", "normalizer": 3}, "unknown mode 'mean'"),
        ({"mode": "seq_mean_token_sum_norm"}, "length goes with seq_mean_token_sum_norm only"),
        ({"mode": "token_mean", "length": 3}, "length goes with seq_mean_token_sum_norm only"),
        ({"mode": "token_mean", "normalizer": 0}, "normalizer must be positive, got 0"),
        (
            {"mode": "token_mean", "normalizer": torch.ones(2)},
            r"normalizer must be a number or 0-dim, got \[2\]",
        ),
        ({"mode": "none", "normalizer": 2}, "mode 'none' takes no normalizer"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="aggregate: " + message):
        aggregate.reduce(torch.zeros(2, 3), None, **arguments)


def test_sequences_are_rows() -> None:
    with pytest.raises(ValueError, match=r"seq_mean_token_mean needs \[sequences, T\], got \[6\]"):
        aggregate.seq_mean_token_mean(torch.zeros(6), normalizer=2)
