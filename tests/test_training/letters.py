"""A task that random bytes can learn, so that rewards differ inside a group from the first step on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastdiv.training.config import LossConfig, OptimizerConfig, RolloutConfig, TrainConfig
from fastdiv.training.problems import Problem


class Letters:
    """The reward is the share of lower-case letters in the answer."""

    def __len__(self) -> int:
        return 10

    def problem(self, index: int) -> Problem:
        return Problem("a" * (index + 1) + "=", "", {})  # prompts of different length: padding is at work

    def reward(self, completion: str, problem: Problem) -> float:
        return sum(c.islower() for c in completion) / max(1, len(completion))


def tiny(output: Path, **changes: Any) -> TrainConfig:
    """A run of the tiny model that takes a fraction of a second per step."""
    config = TrainConfig(
        model="tiny",
        output=str(output),
        steps=6,
        device="cpu",
        checkpoint_every=2,
        rollout=RolloutConfig(prompts=4, group_size=4, max_new_tokens=8, temperature=0.9),
        loss=LossConfig(options={"ratio": 0.05}, kl_coef=0.1, entropy_coef=0.01),
        optimizer=OptimizerConfig(lr=3e-3, updates=2, micro_batch=6, warmup=3),
    )
    return dataclasses.replace(config, **changes)
