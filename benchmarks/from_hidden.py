"""From hidden states, forward and backward: 2048 tokens and a small model's head, 576 x 49152 in float32, on a CPU;
4096 tokens and a large model's head, 4096 x 128256 in bfloat16, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import fastdiv

from . import eager, floors, others
from .common import FASTDIV, PLACES, Case, Contestant, Place, Tensors, standard

SIZES = {  # tokens, hidden, vocabulary
    "cpu": {"full": (2048, 576, 49152), "small": (96, 64, 1536)},
    "cuda": {"full": (4096, 4096, 128256), "small": (128, 64, 1536)},
}
# In bfloat16 plain torch rounds each logit to 4e-3 of itself, and the probabilities of its backward again.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


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


def eager_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
    return {"loss": -eager.log_prob(hidden @ weight.T, labels).sum()}


def fastdiv_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
    head = fastdiv.LinearLogits(hidden, weight)
    return {"loss": fastdiv.linear_loss(head, labels, lambda stats, rows: -stats.log_prob)}


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


def cases(scale: str, place: Place = PLACES["cpu"]) -> list[Case]:
    """The cases at `scale`, "full" or "small"."""
    tokens, hidden, vocabulary = SIZES[place.name][scale]

    def numbers(source: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=place.device, dtype=place.dtype)

    def some(source: torch.Generator) -> Tensor:
        return torch.rand(tokens, generator=source, device=place.device) + 0.5

    def head(source: torch.Generator) -> tuple[Tensor, Tensor]:
        # Logits of standard deviation 3.
        return numbers(source, tokens, hidden), numbers(source, vocabulary, hidden).mul_(3.0 / hidden**0.5)

    def supervised() -> Tensors:
        source = place.generator()
        states, weight = head(source)
        labels = torch.randint(vocabulary, (tokens,), generator=source, device=place.device)
        return {"hidden": states, "weight": weight, "labels": labels}

    def policy() -> Tensors:
        tensors, source = supervised(), place.generator()
        return tensors | {"advantages": some(source), "bonuses": 0.1 * some(source)}

    def distillation() -> Tensors:
        source = place.generator()
        states, weight = head(source)
        teacher_states, teacher_weight = head(source)
        return {
            "hidden": states,
            "weight": weight,
            "teacher_hidden": teacher_states,
            "teacher_weight": teacher_weight,
            "weights": some(source),
        }

    def case(
        name: str,
        make: Callable[[], Tensors],
        contestants: Mapping[str, Contestant],
        guests: Mapping[str, Contestant] | None = None,
        **floor: bool,
    ) -> Case:
        return Case(
            name=name,
            shape={"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
            make=make,
            contestants={**contestants, **(guests or {})},
            floor=floors.products(tokens, hidden, vocabulary, **floor),
            timed="forward + backward",
            gradients=("hidden", "weight"),
            rounds=5,
            device=place.device,
            tolerance=TOLERANCE[place.dtype],
            dtype=place.dtype,
            ours={FASTDIV: None} if place.name == "cuda" else {},
            guests=tuple(guests or ()),
        )

    found = [
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
    if place.name == "cuda":
        guests = {others.LIGER: others.liger_cross_entropy, others.TORCH: others.torch_cross_entropy}
        both = standard(eager_cross_entropy, fastdiv_cross_entropy)
        found.append(case("log_prob_alone", supervised, both, guests, teacher=False, recompute=False))
    return found
