"""From logits that exist, forward and backward apart: 512 tokens x 49152 in float32 on a CPU, 8192 x 151936 in bfloat16
on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import fastdiv

from . import eager, floors, others
from .common import PLACES, TOLERANCE, Case, Contestant, Place, Tensors, standard

SIZES = {  # tokens, vocabulary
    "cpu": {"full": (512, 49152), "small": (32, 2048)},
    "cuda": {"full": (8192, 151936), "small": (64, 4096)},
}


def eager_log_prob(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    log_prob = eager.log_prob(student, labels)
    return {"loss": -(weights * log_prob).sum(), "log_prob": log_prob}


def fastdiv_log_prob(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    log_prob = fastdiv.log_prob(student, labels)
    return {"loss": -(weights * log_prob).sum(), "log_prob": log_prob}


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


Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Work:
    """What is computed, by whom, and how often fastdiv's kernels read each of the models' logits on the way.

    `guests` take part on a GPU, for which they are made.
    """

    name: str
    eager: Contestant
    fastdiv: Contestant
    second: Literal["labels", "teacher"]
    looks: int = 1
    guests: Mapping[str, Contestant] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        return ("student", "teacher") if self.second == "teacher" else ("student",)


WORKS = (
    Work(
        "log_prob_entropy",
        eager_log_prob_entropy,
        fastdiv_log_prob_entropy,
        "labels",
        guests={others.TRL: others.trl_log_prob_entropy},
    ),
    Work("reverse_kl", eager_reverse_kl, fastdiv_reverse_kl, "teacher"),
    # The mixture is known only when both normalisers are.
    Work("js", eager_js, fastdiv_js, "teacher", looks=2),
)
# Only where there is somebody to compare with.
LOG_PROB_ALONE = Work(
    "log_prob_alone",
    eager_log_prob,
    fastdiv_log_prob,
    "labels",
    guests={others.LIGER: others.liger_log_prob, others.TRL: others.trl_log_prob},
)


def cases(scale: str, place: Place = PLACES["cpu"]) -> list[Case]:
    """The cases at `scale`, "full" or "small"."""
    works = (*WORKS, LOG_PROB_ALONE) if place.name == "cuda" else WORKS
    directions: tuple[Direction, ...] = ("forward", "backward")
    return [_case(work, timed, *SIZES[place.name][scale], place) for work in works for timed in directions]


def _case(work: Work, timed: Direction, tokens: int, vocabulary: int, place: Place) -> Case:
    def logits(source: torch.Generator) -> Tensor:
        numbers = torch.randn(tokens, vocabulary, generator=source, device=place.device, dtype=place.dtype)
        return numbers.mul_(3.0)

    def make() -> Tensors:
        source = place.generator()
        tensors = {
            "student": logits(source),
            "weights": torch.rand(tokens, generator=source, device=place.device) + 0.5,
        }
        if work.second == "labels":
            return tensors | {"labels": torch.randint(vocabulary, (tokens,), generator=source, device=place.device)}
        return tensors | {"teacher": logits(source)}

    backward = timed == "backward"
    guests = work.guests if place.name == "cuda" else {}
    sizes = tokens, vocabulary, place.dtype.itemsize
    reads = len(work.models) * (1 if backward else work.looks)
    return Case(
        name=f"{work.name}_{timed}",
        shape={"tokens": tokens, "vocabulary": vocabulary},
        make=make,
        contestants={**standard(work.eager, work.fastdiv), **guests},
        floor=floors.traffic(work.models, tokens, vocabulary, write=backward, itemsize=place.dtype.itemsize),
        timed=timed,
        gradients=("student",) if backward else (),
        rounds=15,
        device=place.device,
        tolerance=TOLERANCE[place.dtype],
        moved=floors.bytes_moved(*sizes, reads=reads, writes=int(backward)),
        guests=tuple(guests),
    )
