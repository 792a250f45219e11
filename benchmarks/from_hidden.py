"""From hidden states, forward and backward: 2048 tokens and a small model's head, 576 x 49152, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import fastdiv

from . import eager, floors
from .common import Case, Contestant, Tensors, generator, standard

SIZES = {"full": (2048, 576, 49152), "small": (96, 64, 1536)}  # tokens, hidden, vocabulary


def eager_policy(hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, bonuses: Tensor) -> Tensors:
    log_prob, entropy = eager.log_prob_entropy(hidden @ weight.T, labels)
    loss = -(advantages * log_prob + bonuses * entropy).sum()
    return {"loss": loss, "log_prob": log_prob, "entropy": entropy}


def fastdiv_policy(hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, bonuses: Tensor) -> Tensors:
    stats = fastdiv.token_stats(fastdiv.LinearLogits(hidden, weight), labels, outputs=("log_prob", "entropy"))
    loss = -(advantages * stats.log_prob + bonuses * stats.entropy).sum()
    return {"loss": loss, "log_prob": stats.log_prob, "entropy": stats.entropy}


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, bonuses: Tensor) -> Tensors:
    return {"loss": eager_policy(hidden, weight, labels, advantages, bonuses)["loss"]}


def fastdiv_loss(hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, bonuses: Tensor) -> Tensors:
    def token_loss(stats: fastdiv.TokenStats, rows: Tensor) -> Tensor:
        return -(advantages[rows] * stats.log_prob + bonuses[rows] * stats.entropy)

    head = fastdiv.LinearLogits(hidden, weight)
    return {"loss": fastdiv.linear_loss(head, labels, token_loss, outputs=("log_prob", "entropy"))}


def eager_distillation(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, weights: Tensor
) -> Tensors:
    divergence = eager.reverse_kl(hidden @ weight.T, teacher_hidden @ teacher_weight.T)
    return {"loss": (weights * divergence).sum(), "reverse_kl": divergence}


def fastdiv_distillation(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, weights: Tensor
) -> Tensors:
    student = fastdiv.LinearLogits(hidden, weight)
    teacher = fastdiv.LinearLogits(teacher_hidden, teacher_weight)
    divergence = fastdiv.divergence(student, teacher, "reverse_kl")
    return {"loss": (weights * divergence).sum(), "reverse_kl": divergence}


def cases(scale: str) -> list[Case]:
    """The cases at `scale`, a key of `SIZES`."""
    tokens, hidden, vocabulary = SIZES[scale]

    def head(source: torch.Generator) -> tuple[Tensor, Tensor]:
        # Logits of standard deviation 3.
        return (
            torch.randn(tokens, hidden, generator=source),
            torch.randn(vocabulary, hidden, generator=source) * (3.0 / hidden**0.5),
        )

    def policy() -> Tensors:
        source = generator()
        states, weight = head(source)
        return {
            "hidden": states,
            "weight": weight,
            "labels": torch.randint(vocabulary, (tokens,), generator=source),
            "advantages": torch.rand(tokens, generator=source) + 0.5,
            "bonuses": 0.1 * (torch.rand(tokens, generator=source) + 0.5),
        }

    def distillation() -> Tensors:
        source = generator()
        states, weight = head(source)
        teacher_states, teacher_weight = head(source)
        return {
            "hidden": states,
            "weight": weight,
            "teacher_hidden": teacher_states,
            "teacher_weight": teacher_weight,
            "weights": torch.rand(tokens, generator=source) + 0.5,
        }

    def case(name: str, make: Callable[[], Tensors], contestants: Mapping[str, Contestant], **floor: bool) -> Case:
        return Case(
            name=name,
            shape={"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
            make=make,
            contestants=contestants,
            floor=floors.products(tokens, hidden, vocabulary, **floor),
            timed="forward + backward",
            gradients=("hidden", "weight"),
            rounds=5,
        )

    return [
        case("log_prob_entropy", policy, standard(eager_policy, fastdiv_policy), teacher=False, recompute=True),
        case("linear_loss", policy, standard(eager_loss, fastdiv_loss), teacher=False, recompute=False),
        case(
            "reverse_kl",
            distillation,
            standard(eager_distillation, fastdiv_distillation),
            teacher=True,
            recompute=True,
        ),
    ]
