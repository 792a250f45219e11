"""Per-token quantities in plain torch, as trainers write them: what the other contestants must equal and beat.

Logits of any dtype are taken to float32 before anything is summed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label), [tokens]."""
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def log_prob_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy, [tokens] each."""
    log_probs = _log_softmax(logits)
    log_prob = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return log_prob, -(log_probs.exp() * log_probs).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), [tokens]."""
    p, q = _log_softmax(student), _log_softmax(teacher)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def js(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence with equal weights, [tokens]."""
    p, q = _log_softmax(student), _log_softmax(teacher)
    mixture = torch.logaddexp(p, q) - math.log(2.0)
    to_p = F.kl_div(mixture, p, reduction="none", log_target=True).sum(-1)
    to_q = F.kl_div(mixture, q, reduction="none", log_target=True).sum(-1)
    return 0.5 * (to_p + to_q)
