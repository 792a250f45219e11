"""From logits that exist, forward and backward apart: 512 tokens x 49152 in float32 on a CPU, 8192 x 151936 in bfloat16
on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import fastdiv
from fastdiv import backends
from fastdiv.backends import cuda

from . import eager, floors, others
from .common import FASTDIV, PLACES, TOLERANCE, TRITON, Case, Contestant, Place, Tensors, Unavailable, standard

SIZES = {  # tokens, vocabulary
    "cpu": {"full": (512, 49152), "small": (32, 2048)},
    "cuda": {"full": (8192, 151936), "small": (64, 4096)},
}


def eager_log_prob(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    log_prob = eager.log_prob(student, labels)
    return {"loss": -(weights * log_prob).sum(), "log_prob": log_prob}


def fastdiv_log_prob(student: Tensor, labels: Tensor, weights: Tensor, backend: str | None = None) -> Tensors:
    log_prob = fastdiv.log_prob(student, labels, backend=backend)
    return {"loss": -(weights * log_prob).sum(), "log_prob": log_prob}


def eager_log_prob_entropy(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    log_prob, entropy = eager.log_prob_entropy(student, labels)
    loss = -(weights * (log_prob + 0.1 * entropy)).sum()
    return {"loss": loss, "log_prob": log_prob, "entropy": entropy}


def fastdiv_log_prob_entropy(student: Tensor, labels: Tensor, weights: Tensor, backend: str | None = None) -> Tensors:
    stats = fastdiv.token_stats(student, labels, outputs=("log_prob", "entropy"), backend=backend)
    loss = -(weights * (stats.log_prob + 0.1 * stats.entropy)).sum()
    return {"loss": loss, "log_prob": stats.log_prob, "entropy": stats.entropy}


def eager_reverse_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensors:
    divergence = eager.reverse_kl(student, teacher)
    return {"loss": (weights * divergence).sum(), "reverse_kl": divergence}


def fastdiv_reverse_kl(student: Tensor, teacher: Tensor, weights: Tensor, backend: str | None = None) -> Tensors:
    divergence = fastdiv.divergence(student, teacher, "reverse_kl", backend=backend)
    return {"loss": (weights * divergence).sum(), "reverse_kl": divergence}


def eager_js(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensors:
    divergence = eager.js(student, teacher)
    return {"loss": (weights * divergence).sum(), "js": divergence}


def fastdiv_js(student: Tensor, teacher: Tensor, weights: Tensor, backend: str | None = None) -> Tensors:
    divergence = fastdiv.divergence(student, teacher, "js", backend=backend)
    return {"loss": (weights * divergence).sum(), "js": divergence}


Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Work:
    """What is computed, by whom, and how often fastdiv reads each model's logits on the way if it keeps none of them.

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


def on_triton(ours: Contestant, place: Place) -> Contestant:
    """`ours` on the Triton backend, beside what runs on CUDA kernels of our own."""

    def call(**inputs: Tensor) -> Tensors:
        preferred = backends.select([place.dtype], torch.device(place.device), None)
        if preferred != "cuda":
            raise Unavailable(f"it is for beside the cuda backend, fastdiv ran on {preferred}")
        if absent := backends.available()["triton"]:
            raise Unavailable(f"the backend is absent: {absent}")
        return ours(**inputs, backend="triton")

    return call


KEPT, CLUSTER = 100 << 10, 8
"""Bytes of two rows that a block of csrc/cuda keeps for a second look, and blocks that share a row, at most."""
KEPT_IN_LOCKSTEP, CLUSTER_IN_LOCKSTEP = 4 << 10, 2


def reads(work: Work, timed: Direction, backend: str | None, vocabulary: int, place: Place) -> int:
    """How often the kernels of a backend read each of the models' logits.

    Two models' statistics take two looks.  Triton looks again only where the terms need both normalisers; CUDA's
    kernels always, but at what they keep on the chip, if it fits.
    """
    if timed == "backward":
        return 1
    if backend != "cuda":
        return work.looks
    return 1 if len(work.models) == 1 or fits_on_chip(vocabulary, place) else 2


def fits_on_chip(vocabulary: int, place: Place) -> bool:
    """Whether CUDA's kernels keep a row of both models in shared memory."""
    if cuda.in_lockstep():
        blocks, room = CLUSTER_IN_LOCKSTEP, KEPT_IN_LOCKSTEP
    else:
        it = torch.cuda.get_device_properties(place.device)
        blocks = CLUSTER if it.major >= 9 else 1
        # Of a processor's memory the system takes 1 KiB a block, and the kernels less than another one.
        room = min(KEPT, it.shared_memory_per_multiprocessor - (2 << 10))
    packs = -(-vocabulary * place.dtype.itemsize // 16)
    return -(-packs // blocks) * 2 * 16 <= room


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
    on_gpu = place.name == "cuda"
    guests = work.guests if on_gpu else {}
    beside = {TRITON: on_triton(work.fastdiv, place)} if on_gpu else {}
    ours = {FASTDIV: None, TRITON: "triton"} if on_gpu else {}

    def moved(backend: str | None) -> float:
        count = len(work.models) * reads(work, timed, backend, vocabulary, place)
        return floors.bytes_moved(tokens, vocabulary, place.dtype.itemsize, reads=count, writes=int(backward))

    return Case(
        name=f"{work.name}_{timed}",
        shape={"tokens": tokens, "vocabulary": vocabulary},
        make=make,
        contestants={**standard(work.eager, work.fastdiv), **beside, **guests},
        floor=floors.traffic(work.models, tokens, vocabulary, write=backward, itemsize=place.dtype.itemsize),
        timed=timed,
        gradients=("student",) if backward else (),
        rounds=15,
        device=place.device,
        tolerance=TOLERANCE[place.dtype],
        dtype=place.dtype,
        ours=ours,
        moved=moved,
        guests=tuple(guests),
    )
