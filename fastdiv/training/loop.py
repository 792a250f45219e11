"""The trainer: sample, score, and for each update three phases, none of which holds logits.

1. statistics: stream the answers once without gradients, for log-probabilities, entropies and the exact KL to
the reference; 2. weights: evaluate the loss on the whole window's per-token statistics (``objective.py``); 3.
backward: per micro-batch, the weighted sum of statistics through ``fastdiv.linear_loss``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiv import objectives
from fastdiv.training import checkpoint, report
from fastdiv.training.checks import check_backend, check_length, check_output, check_weights
from fastdiv.training.config import TrainConfig, UserError, check_same_run, flatten
from fastdiv.training.data import Sampler, encode_prompt, load_task
from fastdiv.training.meter import Meter
from fastdiv.training.models import Policy, load_policy
from fastdiv.training.objective import WindowLoss
from fastdiv.training.passes import Passes
from fastdiv.training.problems import Problem, Task
from fastdiv.training.rollout import Rollout, sample
from fastdiv.training.run import Run, holds_run, remove_run


class Trainer:
    """One run of on-policy training with verifiable rewards.

    Arguments:
        config: the run.
        task: problems and reward; None: what ``config.data`` names.
        on_step: called with the metrics of each step, after they are on disk.
        replace: a run that ``config.output`` already holds is deleted when this one begins.

    Raises:
        UserError: something in the configuration cannot be met, or ``config.output`` already holds a run. Nothing
            has been written then.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        task: Task | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        replace: bool = False,
    ) -> None:
        self.config, self._on_step, self._replace = config, on_step, replace
        self.output = Path(config.output)
        check_output(self.output)
        if not config.resume and not replace and holds_run(self.output):
            raise UserError(f"output: {self.output} already holds a run; continue it with --resume or choose another")
        self.loss = WindowLoss(config.loss, seed=config.seed)
        self.task = task or load_task(config.data, seed=config.seed)
        self.sampler = Sampler(len(self.task), seed=config.seed)
        self.identity = Run(data=getattr(self.task, "fingerprint", None))
        self.policy = load_policy(config.model, dtype=config.dtype, device=config.device, seed=config.seed)
        check_backend(self.policy, config, self.measured)
        self._check_prompts()
        self.reference = _frozen(self.policy) if config.loss.reference else None
        self.passes = Passes(config, self.policy, self.reference)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.policy.model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.step, self.records = 0, list[dict[str, Any]]()
        if config.resume:
            self._resume()

    def run(self) -> list[dict[str, Any]]:
        """Trains up to ``config.steps`` and returns the metrics of every step."""
        from tqdm import tqdm

        if self._replace and not self.config.resume:
            remove_run(self.output)
            self._replace = False
        self.output.mkdir(parents=True, exist_ok=True)
        self.identity.write(self.output)
        report.write_config(self.config, self.output / "config.yaml")
        # disable=None: a bar on a terminal only; a log gets a line per step instead.
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None)
        with bar, (self.output / "metrics.jsonl").open("a", encoding="utf-8") as log:
            while self.step < self.config.steps:
                record = self.train_step()
                log.write(json.dumps(record) + "\n")
                log.flush()
                every = self.config.checkpoint_every
                if every and (self.step % every == 0 or self.step == self.config.steps):
                    self._save()
                bar.update()
                bar.set_postfix_str(report.one_line(record))
                if bar.disable:
                    print(f"step {self.step}/{self.config.steps}: {report.one_line(record)}", flush=True)
                if self._on_step is not None:
                    self._on_step(record)
        report.plot(
            self.records,
            self.output / "curves.png",
            title=f"{self.config.model}, {self.config.loss.objective}",
        )
        return self.records

    def train_step(self) -> dict[str, Any]:
        """Samples a batch of groups, updates the policy on it, and returns (and keeps) the step's metrics."""
        begin = time.perf_counter()
        problems, rollout = self.collect(self.step)
        sampled = time.perf_counter()
        group = self.config.rollout.group_size
        rewards = torch.tensor(
            [self.task.reward(text, problems[i // group]) for i, text in enumerate(rollout.texts)],
            dtype=torch.float64,
        )
        meter = Meter(self.policy.device)
        metrics = self.update(rollout, rewards, meter)
        record = {
            "step": self.step + 1,
            "reward": rewards.mean().item(),
            "solved": (rewards == 1).double().mean().item(),
            **metrics,
            "response_length": rollout.response_mask.sum(1).double().mean().item(),
            "tokens": int(rollout.response_mask.sum()),
            "rollout_seconds": sampled - begin,
            "loss_seconds": meter.seconds,
            "step_seconds": time.perf_counter() - begin,
            "loss_peak_mib": meter.peak_mib,
        }
        self.step += 1
        self.records.append(record)
        return record

    def collect(self, step: int) -> tuple[list[Problem], Rollout]:
        """Problems and sampled answers of a step: a function of the weights, the seed and the step alone."""
        settings = self.config.rollout
        first = step * settings.prompts
        problems = [self.task.problem(self.sampler[first + i]) for i in range(settings.prompts)]
        prompts = [encode_prompt(self.config.data, p, self.policy.tokenizer) for p in problems]
        check_length(self.policy, zip((p.where for p in problems), prompts, strict=True), settings.max_new_tokens)
        try:
            rollout = sample(
                self.policy,
                prompts,
                group_size=settings.group_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=(self.config.seed << 32) + step,
            )
        except RuntimeError:  # torch.multinomial, which says that probabilities are NaN
            check_weights(self.policy)
            raise
        return problems, rollout

    def update(self, rollout: Rollout, rewards: Tensor, meter: Meter) -> dict[str, Any]:
        """All optimiser updates of one rollout.

        Arguments:
            rollout: the answers.
            rewards: float64 [answers].
            meter: counts the loss section, from hidden states to the gradients of hidden states and head.

        Returns:
            Metrics, averaged over the updates unless they say otherwise.
        """
        settings, mask = self.config.optimizer, rollout.response_mask
        answers = len(mask)
        groups = torch.arange(answers) // self.config.rollout.group_size
        advantage = getattr(objectives.advantages, self.config.loss.advantage)(rewards, groups)
        old = self.passes.statistics(rollout, slice(0, answers), self.measured, meter)
        advantages = advantage.to(old["log_prob"])[:, None].expand_as(mask)
        mean = objectives.aggregate.token_mean
        metrics = {"entropy": mean(old["entropy"], mask).item()}
        metrics["kl_ref"] = mean(old["reverse_kl"], mask).item() if self.reference else math.nan
        share = answers // settings.updates
        losses, norms, selected = [], [], 0.0
        for part in range(settings.updates):
            rows = slice(part * share, (part + 1) * share)
            # Fresh samples: until the first update the current policy is the old one.
            current = {name: values[rows] for name, values in old.items()}
            if part > 0:
                current = self.passes.statistics(rollout, rows, self.loss.outputs, meter)
            update = self.step * settings.updates + part
            with meter:
                loss, of_loss, weights = self.loss(
                    current, old["log_prob"][rows], advantages[rows], mask[rows], update=update
                )
            self.optimizer.zero_grad()
            self.passes.backward(rollout, rows, weights, meter)
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * min(1.0, (update + 1) / max(1, settings.warmup))
            parameters = self.policy.model.parameters()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            if not norm.isfinite():
                check_weights(self.policy)
                raise UserError(
                    f"step {self.step + 1}: the norm of the gradient is {norm.item()}, so the update was not made; "
                    "optimizer.lr may be too high, or a reward infinite"
                )
            self.optimizer.step()
            losses.append(loss)
            norms.append(norm.item())
            selected += of_loss.get("selected", math.nan)
        # How far the last update's policy had moved from the one that sampled.
        moved = objectives.sampled_kl(old["log_prob"][rows], current["log_prob"], mask[rows])[1]["kl"]
        metrics |= {"kl_old": moved.item(), "selected": selected / int(mask.sum())}
        metrics |= {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
        return {k: None if math.isnan(v) else v for k, v in metrics.items()}

    @property
    def measured(self) -> tuple[str, ...]:
        """Statistics of the policy that sampled."""
        return ("log_prob", "entropy") + (("reverse_kl",) if self.config.loss.reference else ())

    def _check_prompts(self) -> None:
        """Every prompt of a file that the run will see, the first step's of a task that makes its problems."""
        steps = self.config.steps if self.identity.data else 1
        seen = {self.sampler[i] for i in range(min(steps * self.config.rollout.prompts, 2 * len(self.task)))}
        for index in sorted(seen):
            problem = self.task.problem(index)
            ids = encode_prompt(self.config.data, problem, self.policy.tokenizer)
            check_length(self.policy, [(problem.where, ids)], self.config.rollout.max_new_tokens)

    def _save(self) -> None:
        folder, keep = self.output / "checkpoints", self.config.keep
        checkpoint.save(folder, self.step, self.policy, self.optimizer, flatten(self.config), self.identity, keep=keep)

    def _resume(self) -> None:
        last = checkpoint.latest(self.output / "checkpoints")
        metrics = self.output / "metrics.jsonl"
        if last is None:
            print(f"fastdiv: no checkpoint in {self.output}: starting at step 0")
            report.keep_records(metrics, 0)
            return
        known = Run.read(self.output).id
        if not known:
            raise UserError(f"--resume: {self.output} has no run.json, which says whose checkpoints it holds")
        self.identity = dataclasses.replace(self.identity, id=known)
        checkpoint.check_run(last, self.identity)
        state = checkpoint.read_state(last)
        check_same_run(state["config"], self.config)
        checkpoint.restore(last, state, self.policy, self.optimizer)
        check_weights(self.policy)
        self.step = state["step"]
        # Steps after the checkpoint are done again, and their lines with them.
        self.records = report.keep_records(metrics, self.step)


def train(config: TrainConfig, *, task: Task | None = None) -> list[dict[str, Any]]:
    """Trains as ``config`` says, on ``task`` where given, and returns the metrics of every step."""
    return Trainer(config, task=task).run()


def _frozen(policy: Policy) -> Policy:
    return Policy(copy.deepcopy(policy.model).requires_grad_(False), policy.tokenizer)
