"""Phase two of an update: from the statistics of a whole window to one weight per token and statistic.

A loss over an accumulation window depends on the model only through per-token numbers. So it is evaluated
once, on the window's ``[answers, response]`` tensors, and differentiated with respect to *them*. Selection,
ratios of sequences and normalisers then see the whole window however it is cut into micro-batches, and what
each micro-batch has to send backward is a plain weighted sum of its own statistics.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiv import objectives
from fastdiv.training.config import LossConfig, UserError, check_name

_GIVEN_BY_THE_TRAINER = ("selected", "seed", "step", "index", "normalizer")
_PAPER = {
    "ppo_clip": objectives.policy.PPO,
    "clip_cov": objectives.policy.CLIP_COV,
    "kl_cov": objectives.policy.KL_COV_7B,
}


class WindowLoss:
    """The loss of one update: a policy objective by name, plus KL to the reference and an entropy bonus.

    Options that the configuration leaves out are those of the paper's own runs where ``fastdiv.objectives``
    has them as a preset.
    """

    def __init__(self, config: LossConfig, *, seed: int) -> None:
        entries = {entry.name: entry for entry in objectives.list() if entry.family == "policy"}
        check_name("loss.objective", "objective", config.objective, sorted(entries))
        self._function = entries[config.objective].function
        self._config, self._seed = config, seed
        preset = _PAPER.get(config.objective)
        defaults = {**preset.select, **preset.loss} if preset else {}
        parameters = inspect.signature(self._function).parameters
        allowed = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in _GIVEN_BY_THE_TRAINER]
        for name in config.options:
            check_name("loss.options", f"option of {config.objective}", name, allowed)
        self._options: dict[str, Any] = defaults | config.options
        self._seeded = "seed" in parameters
        try:  # the objective checks its own ranges; let it do so before a model is loaded
            one = torch.ones(2, 2)
            self({name: one for name in self.outputs}, one, one, one.bool(), update=0)
        except (TypeError, ValueError) as error:
            raise UserError(f"loss.options: {error}") from error

    @property
    def outputs(self) -> tuple[str, ...]:
        """Statistics of the current policy that the loss is a function of."""
        divergence = ("reverse_kl",) if self._config.kl_coef else ()
        return ("log_prob", *divergence, *(("entropy",) if self._config.entropy_coef else ()))

    def __call__(
        self,
        stats: Mapping[str, Tensor],
        old_log_prob: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        update: int,
    ) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        """Loss of a window and its derivative with respect to each statistic.

        Arguments:
            stats: :attr:`outputs` of the current policy, each [answers, response]; constants.
            old_log_prob: [answers, response], of the policy that sampled.
            advantages: [answers, response].
            mask: bool [answers, response].
            update: number of this update since the start of the run; seeds random selection.

        Returns:
            The loss, the objective's metrics, and for each statistic the weights d loss / d statistic
            [answers, response].
        """
        leaves = {name: stats[name].detach().requires_grad_() for name in self.outputs}
        seeds = {"seed": self._seed, "step": update} if self._seeded else {}
        options = self._options | seeds
        loss, metrics = self._function(leaves["log_prob"], old_log_prob, advantages, mask, **options)
        mean = objectives.aggregate.token_mean
        if "reverse_kl" in leaves:
            loss = loss + self._config.kl_coef * mean(leaves["reverse_kl"], mask)
        if "entropy" in leaves:
            loss = loss - self._config.entropy_coef * mean(leaves["entropy"], mask)
        weights = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), {k: float(v) for k, v in metrics.items()}, dict(zip(leaves, weights, strict=True))
