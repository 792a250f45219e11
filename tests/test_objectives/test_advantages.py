"""Group advantages: golden numbers, groups of any size and order, rewards without spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv.objectives import advantages

REWARDS = [1.0, 0, 0, 1, 1, 0, 0, 0]
ESTIMATORS = [
    (advantages.grpo, "adv/grpo(std ddof1,eps1e-6)"),
    (advantages.dr_grpo, "adv/drgrpo"),
    (advantages.rloo, "adv/rloo"),
]


@pytest.mark.parametrize(("estimator", "key"), ESTIMATORS)
def test_golden(estimator: Callable[..., Tensor], key: str, golden: dict[str, Any]) -> None:
    got = estimator(torch.tensor(REWARDS, dtype=torch.float64), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(got, torch.tensor(golden[key], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("estimator", "_"), ESTIMATORS)
def test_groups_are_apart_whatever_their_size_order_and_name(estimator: Callable[..., Tensor], _: str) -> None:
    groups = [torch.randn(n, dtype=torch.float64) for n in (2, 3, 7)]
    names = torch.cat([torch.full((len(g),), name) for g, name in zip(groups, (907, -3, 0), strict=True)])
    alone = torch.cat([estimator(g, torch.zeros(len(g), dtype=torch.int32)) for g in groups])
    order = torch.randperm(12)
    got = estimator(torch.cat(groups)[order], names[order])
    torch.testing.assert_close(got, alone[order], rtol=1e-12, atol=1e-14)


def test_rloo_is_the_mean_of_the_others() -> None:
    rewards = torch.randn(5, dtype=torch.float64)
    expected = torch.stack([rewards[i] - rewards[torch.arange(5) != i].mean() for i in range(5)])
    torch.testing.assert_close(advantages.rloo(rewards, torch.zeros(5, dtype=torch.long)), expected)


def test_a_group_of_one_keeps_its_reward() -> None:
    for reward in (1.0, 4.0, -3.0):
        rewards, names = torch.tensor([3.0, reward, 5.0]), torch.tensor([0, 1, 0])
        assert advantages.grpo(rewards, names, eps=0.5)[1].item() == pytest.approx(reward / 1.5)
        assert advantages.dr_grpo(rewards, names).tolist() == [-1, reward, 1]
        assert advantages.rloo(rewards, names).tolist() == [-2, reward, 2]


def test_equal_rewards_give_exactly_zero() -> None:
    """In float32 the mean of equal rewards is off by an ulp, which eps = 1e-6 would blow up to 1e-2."""
    rewards = torch.full((7,), 0.1)
    assert advantages.grpo(rewards, torch.zeros(7, dtype=torch.long)).tolist() == [0.0] * 7


def test_result_is_a_constant_of_the_same_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        rewards = torch.randn(4, dtype=dtype, requires_grad=True)
        for estimator, _ in ESTIMATORS:
            got = estimator(rewards, torch.zeros(4, dtype=torch.long))
            assert got.dtype == dtype and not got.requires_grad
            assert estimator(rewards[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_errors() -> None:
    ids = torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"grpo: rewards must be float32 or float64, got torch.int64"):
        advantages.grpo(ids, ids)
    with pytest.raises(TypeError, match=r"rloo: group_ids must be integers, got torch.float32"):
        advantages.rloo(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \[responses\], got \[2, 3\] and \[2, 3\]"):
        advantages.dr_grpo(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="eps must not be negative"):
        advantages.grpo(torch.zeros(3), ids, eps=-1.0)
