"""From logits that exist, forward and backward apart: 512 tokens x 49152, float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import fastdiv

from . import eager, floors
from .common import Case, Contestant, Tensors, generator, standard

SIZES = {"full": (512, 49152), "small": (32, 2048)}  # tokens, vocabulary


def eager_log_prob_entropy(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    log_prob, entropy = eager.log_prob_entropy(student, labels)
    loss = -(weights * (log_prob + 0.1 * entropy)).sum()
    return {"loss": loss, "log_prob": log_prob, "entropy": entropy}


def fastdiv_log_prob_entropy(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    stats = fastdiv.token_stats(student, labels, outputs=("log_prob", "entropy"))
    loss = -(weights * (stats.log_prob + 0.1 * stats.entropy)).sum()
    return {"loss": loss, "log_prob": stats.log_prob, "entropy": stats.entropy}


def eager_reverse_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensors:
    divergence = eager.reverse_kl(student, teacher)
    return {"loss": (weights * divergence).sum(), "reverse_kl": divergence}


def fastdiv_reverse_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensors:
    divergence = fastdiv.divergence(student, teacher, "reverse_kl")
    return {"loss": (weights * divergence).sum(), "reverse_kl": divergence}


def eager_js(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensors:
    divergence = eager.js(student, teacher)
    return {"loss": (weights * divergence).sum(), "js": divergence}


def fastdiv_js(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensors:
    divergence = fastdiv.divergence(student, teacher, "js")
    return {"loss": (weights * divergence).sum(), "js": divergence}


def cases(scale: str) -> list[Case]:
    """The cases at `scale`, a key of `SIZES`."""
    tokens, vocabulary = SIZES[scale]

    def make(second: str) -> Tensors:
        source = generator()
        tensors = {
            "student": 3.0 * torch.randn(tokens, vocabulary, generator=source),
            "weights": torch.rand(tokens, generator=source) + 0.5,
        }
        if second == "labels":
            return tensors | {"labels": torch.randint(vocabulary, (tokens,), generator=source)}
        return tensors | {"teacher": 3.0 * torch.randn(tokens, vocabulary, generator=source)}

    works: list[tuple[str, str, Contestant, Contestant]] = [
        ("log_prob_entropy", "labels", eager_log_prob_entropy, fastdiv_log_prob_entropy),
        ("reverse_kl", "teacher", eager_reverse_kl, fastdiv_reverse_kl),
        ("js", "teacher", eager_js, fastdiv_js),
    ]
    found = []
    for name, second, plain, ours in works:
        read = ("student", "teacher") if second == "teacher" else ("student",)
        directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
        for timed in directions:
            found.append(
                Case(
                    name=f"{name}_{timed}",
                    shape={"tokens": tokens, "vocabulary": vocabulary},
                    make=lambda second=second: make(second),  # type: ignore[misc]
                    contestants=standard(plain, ours),
                    floor=floors.traffic(read, tokens, vocabulary, write=timed == "backward"),
                    timed=timed,
                    gradients=("student",) if timed == "backward" else (),
                    rounds=15,
                )
            )
    return found
