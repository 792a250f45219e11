"""The two passes of an update that touch the model, micro-batch by micro-batch: neither holds logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiv
from fastdiv.training.config import TrainConfig
from fastdiv.training.meter import Meter
from fastdiv.training.models import Policy
from fastdiv.training.rollout import Rollout

#: A statistic's name, and its values [answers, response].
Stats = dict[str, Tensor]


class Passes:
    """Statistics of a policy's answers, and the gradients of their weighted sum.

    Arguments:
        config: the run.
        policy: the model that is trained.
        reference: the teacher of ``reverse_kl``, if there is one.
    """

    def __init__(self, config: TrainConfig, policy: Policy, reference: Policy | None) -> None:
        self._config, self._policy, self._reference = config, policy, reference

    @torch.no_grad()
    def statistics(self, rollout: Rollout, rows: slice, outputs: tuple[str, ...], meter: Meter) -> Stats:
        """Phase one: each output for the answers ``rows``, [rows, response]; the meter counts what it takes."""
        parts = []
        for micro in self._micro_batches(rows):
            hidden, teacher = rollout.hidden(self._policy, micro), self._teacher(rollout, micro, outputs)
            with meter:
                stats = fastdiv.token_stats(
                    self._policy.head(hidden),
                    rollout.labels[micro],
                    teacher=teacher,
                    outputs=outputs,
                    temperature=self._config.rollout.temperature,
                    mask=rollout.response_mask[micro],
                    backend=self._config.backend,
                )
            parts.append([stats[name] for name in outputs])
        return {name: torch.cat(columns) for name, columns in zip(outputs, zip(*parts, strict=True), strict=True)}

    def backward(self, rollout: Rollout, rows: slice, weights: Stats, meter: Meter) -> None:
        """Phase three: gradients of the sum of weights times statistics, micro-batch by micro-batch."""
        outputs = tuple(weights)
        for micro in self._micro_batches(rows):
            inside = slice(micro.start - rows.start, micro.stop - rows.start)
            flat = {name: weight[inside].flatten() for name, weight in weights.items()}

            def weighted(stats: Any, tokens: Tensor, flat: Stats = flat) -> Tensor:
                return torch.stack([flat[name][tokens] * stats[name] for name in flat]).sum(0)

            hidden, teacher = rollout.hidden(self._policy, micro), self._teacher(rollout, micro, outputs)
            # Cut off from the backbone, so that the loss section ends with the gradient of the hidden states.
            leaf = hidden.detach().requires_grad_()
            with meter:
                loss = fastdiv.linear_loss(
                    self._policy.head(leaf),
                    rollout.labels[micro],
                    weighted,
                    teacher=teacher,
                    outputs=outputs,
                    temperature=self._config.rollout.temperature,
                    mask=rollout.response_mask[micro],
                    backend=self._config.backend,
                )
                loss.backward()
            hidden.backward(leaf.grad)

    @torch.no_grad()
    def _teacher(self, rollout: Rollout, rows: slice, outputs: tuple[str, ...]) -> fastdiv.LinearLogits | None:
        if self._reference is None or "reverse_kl" not in outputs:
            return None
        return self._reference.head(rollout.hidden(self._reference, rows))

    def _micro_batches(self, rows: slice) -> Iterator[slice]:
        for start in range(rows.start, rows.stop, self._config.optimizer.micro_batch):
            yield slice(start, min(start + self._config.optimizer.micro_batch, rows.stop))
