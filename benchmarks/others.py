"""The same work by other packages, where they are installed; where one is not, it raises `Unavailable` with the reason.

What they compute decides in which case they stand: Liger and torch's `linear_cross_entropy` give the log-probability of
the label and nothing else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .common import Contestant, Tensors, Unavailable

LIGER, TRL, TORCH = "Liger", "TRL", "torch linear_cross_entropy"


def _find(module: str, *names: str) -> tuple[Any, ...]:
    """Attributes of a module that may be absent, broken, or of another version."""
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except Exception as error:  # whatever the import of a foreign package runs into, it cannot take part
        raise Unavailable(f"{module}: {type(error).__name__}: {error}") from error


def _guest(function: Callable[..., Tensors]) -> Contestant:
    """A call that fails, other than for want of memory, makes the guest unavailable and not the run void."""

    @functools.wraps(function)
    def call(**inputs: Tensor) -> Tensors:
        try:
            return function(**inputs)
        except (Unavailable, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    return call


@_guest
def liger_log_prob(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    """Liger writes its gradient over the logits, so it gets a copy, which is timed with it."""
    (loss,) = _find("liger_kernel.transformers", "LigerCrossEntropyLoss")
    log_prob = -loss(reduction="none")(student.clone(), labels)
    return {"loss": -(weights * log_prob).sum(), "log_prob": log_prob.float()}


@_guest
def trl_log_prob(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    (select,) = _find("trl.trainer.utils", "selective_log_softmax")
    log_prob = select(student, labels).float()
    return {"loss": -(weights * log_prob).sum(), "log_prob": log_prob}


@_guest
def trl_log_prob_entropy(student: Tensor, labels: Tensor, weights: Tensor) -> Tensors:
    select, entropy_of = _find("trl.trainer.utils", "selective_log_softmax", "entropy_from_logits")
    log_prob, entropy = select(student, labels).float(), entropy_of(student).float()
    return {"loss": -(weights * (log_prob + 0.1 * entropy)).sum(), "log_prob": log_prob, "entropy": entropy}


@_guest
def liger_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
    (loss,) = _find("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    return {"loss": loss(reduction="sum")(weight, hidden, labels).float()}


@_guest
def torch_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
    (linear_cross_entropy,) = _find("torch.nn.functional", "linear_cross_entropy")
    (options,) = _find("torch.nn", "LinearCrossEntropyOptions")
    return {"loss": linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options()).float()}
