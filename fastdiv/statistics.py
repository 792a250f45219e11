"""From sums over the vocabulary to outputs, and from upstream gradients to the coefficients of the row gradient.

Backends only sum (`STATE`) and apply coefficients; every formula that turns the one into the other stands here, as
torch on [rows] tensors.  Notation: z = logit / temperature, m its maximum, p = softmax(z), lp = log p, H the entropy.

A row gradient is dL/dz = p (c0 + c1 lp + c2 lp^2 + c3 p) + c4 + sum of gain * dlp + label terms for the student, and
e0 q + sum of gain * dlq for the teacher: with L = sum l(lp), h = dl/dlp, dL/dz = h - p sum(h) is linear in these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastdiv.divergences import DIVERGENCES, Divergence
from fastdiv.request import Request

STATE = (
    "max",  # of the student's logits t
    "tail",  # sum exp(z - m) over all entries but one maximum
    "first",  # sum exp(z - m) (z - m)
    "second",  # sum exp(z - m) (z - m)^2
    "squares",  # sum exp(2 (z - m)) over all entries but one maximum
    "sum",  # sum t
    "argmax",
    "teacher_max",
    "teacher_tail",
    "forward",  # sum of forward_kl's value on the unnormalised exponentials
    "reverse",  # sum of reverse_kl's value, likewise
)
"""Columns of a row's state, float64, in the order of `RowState` in csrc/rows.h."""

COEFFICIENTS = 6
"""c0 c1 c2 c3 c4 e0; one gain per divergence follows."""

WANTED = {"first": 1, "second": 2, "squares": 4, "sum": 8, "argmax": 16, "forward": 32, "reverse": 64}
"""Sums that cost extra, as the bits of csrc/rows.h."""


def empty_state(rows: int, device: torch.device) -> Tensor:
    """The state [rows, len(STATE)] before any column was seen."""
    state = torch.zeros(rows, len(STATE), dtype=torch.float64, device=device)
    state[:, [STATE.index("max"), STATE.index("teacher_max")]] = -torch.inf
    return state


class Statistics:
    """The finished numbers of some rows, float64 [rows] each, computed when asked for."""

    def __init__(
        self,
        state: Tensor,  # [rows, len(STATE)]
        inverse_temperature: Tensor,  # [rows]
        vocabulary: int,
        labels: Tensor,  # [rows, K]
        label_logits: Tensor,  # [rows, K]
        rank: Tensor,  # [rows, K]
    ) -> None:
        self._columns = dict(zip(STATE, state.unbind(1), strict=True))
        self.inverse_temperature = inverse_temperature.double()
        self.vocabulary = vocabulary
        self.labels = labels
        self.label_logits = label_logits
        self.rank = rank

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._columns[name]
        except KeyError:
            raise AttributeError(name) from None

    @cached_property
    def log_norm(self) -> Tensor:
        """log sum exp(z - m); NaN for a row of -inf, which has no distribution."""
        return torch.where(self.max == -torch.inf, torch.nan, torch.log1p(self.tail))

    @cached_property
    def teacher_log_norm(self) -> Tensor:
        return torch.where(self.teacher_max == -torch.inf, torch.nan, torch.log1p(self.teacher_tail))

    @cached_property
    def mean_shifted(self) -> Tensor:
        """E_p[z - m]."""
        return torch.where(self.max == -torch.inf, torch.nan, self.first / (1.0 + self.tail))

    @cached_property
    def entropy(self) -> Tensor:
        return self.log_norm - self.mean_shifted

    @cached_property
    def varentropy(self) -> Tensor:
        return (self.second / (1.0 + self.tail) - self.mean_shifted**2).clamp(min=0.0)

    @cached_property
    def log_sum_sq_probs(self) -> Tensor:
        return torch.log1p(self.squares) - 2.0 * self.log_norm

    @cached_property
    def log_prob(self) -> Tensor:
        """[rows, K]."""
        shifted = (self.label_logits - self.max[:, None]) * self.inverse_temperature[:, None]
        return shifted - self.log_norm[:, None]

    @cached_property
    def offset(self) -> Tensor:
        """c: the offsets that `forward` and `reverse` were summed with have normalisers that differ by c, so each sum,
        normalised, is KL + phi(+-c).  In float64 phi may be formed by subtraction: its error is about 1e-16 c."""
        return self.log_norm - self.teacher_log_norm

    @cached_property
    def forward_kl(self) -> Tensor:
        phi = torch.expm1(self.offset) - self.offset
        return (self.forward / (1.0 + self.teacher_tail) - phi).clamp(min=0.0)

    @cached_property
    def reverse_kl(self) -> Tensor:
        phi = torch.expm1(-self.offset) + self.offset
        return (self.reverse / (1.0 + self.tail) - phi).clamp(min=0.0)

    def divergence(self, divergence: Divergence, sums: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the vocabulary of (value, dlp, dlq); `sums` [rows, 3] where a second look took them."""
        if divergence.one_pass is None:
            assert sums is not None
            value, dlp, dlq = sums.unbind(1)
            return value, dlp, dlq
        f, r = divergence.one_pass
        # A part that does not belong is left out, not multiplied by 0: it may be infinite.
        f_part = f * self.forward_kl if f else torch.zeros_like(self.tail)
        r_part = r * self.reverse_kl if r else torch.zeros_like(self.tail)
        return f_part + r_part, r_part, f_part


@dataclass
class Coefficients:
    """The linear map from upstream gradients to row gradients; see the module's first lines."""

    c: Tensor  # [rows, COEFFICIENTS + gains]
    labels: list[Tensor] = field(default_factory=list)  # each [rows, K]
    gains: list[Tensor] = field(default_factory=list)  # each [rows, K]

    def add(self, index: int, value: Tensor) -> None:
        self.c[:, index] += value

    def add_label(self, labels: Tensor, gains: Tensor) -> None:
        self.labels.append(labels)
        self.gains.append(gains)


@dataclass(frozen=True)
class Output:
    """One output: its value from the statistics, and what an upstream gradient g adds to the coefficients."""

    value: Callable[[Statistics], Tensor]
    gradient: Callable[[Statistics, Tensor, Coefficients], None] | None
    wanted: tuple[str, ...] = ()
    per_label: bool = False
    dtype: torch.dtype | None = None


def _log_prob_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    c.add_label(s.labels, g)


def _entropy_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    """dH/dz = -p (lp + H)."""
    c.add(1, -g)
    c.add(0, -g * s.entropy)


def _logsumexp_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    c.add(0, g)


def _log_sum_sq_probs_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    """d log sum p^2 / dz = 2 (p^2 / sum p^2 - p)."""
    c.add(3, 2.0 * g * torch.exp(-s.log_sum_sq_probs))
    c.add(0, -2.0 * g)


def _varentropy_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    """h = lp^2 + 2 lp + 2 H lp, E_p[h] = varentropy - H^2 - 2 H."""
    c.add(2, g)
    c.add(1, 2.0 * g * (1.0 + s.entropy))
    c.add(0, -g * (s.varentropy - s.entropy**2 - 2.0 * s.entropy))


def _max_log_prob_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    c.add_label(s.argmax.long()[:, None], g[:, None])


def _mean_logit_gradient(s: Statistics, g: Tensor, c: Coefficients) -> None:
    c.add(4, g / s.vocabulary)


OUTPUTS = {
    "log_prob": Output(lambda s: s.log_prob, _log_prob_gradient, per_label=True),
    "entropy": Output(lambda s: s.entropy, _entropy_gradient, ("first",)),
    "logsumexp": Output(lambda s: s.max * s.inverse_temperature + torch.log1p(s.tail), _logsumexp_gradient),
    "log_sum_sq_probs": Output(lambda s: s.log_sum_sq_probs, _log_sum_sq_probs_gradient, ("squares",)),
    "varentropy": Output(lambda s: s.varentropy, _varentropy_gradient, ("first", "second")),
    "max_log_prob": Output(lambda s: -s.log_norm, _max_log_prob_gradient, ("argmax",)),
    "mean_logit": Output(lambda s: s.sum / s.vocabulary * s.inverse_temperature, _mean_logit_gradient, ("sum",)),
    "argmax": Output(lambda s: s.argmax, None, ("argmax",), dtype=torch.int64),
    "is_top1": Output(lambda s: s.labels == s.argmax[:, None], None, ("argmax",), per_label=True, dtype=torch.bool),
    "rank": Output(lambda s: s.rank, None, per_label=True, dtype=torch.int64),
}
"""Every output of one model; a divergence's name is an output too."""


def wanted(request: Request) -> int:
    """The extra sums that a request's outputs need, as bits of `WANTED`."""
    names = {name for output in request.outputs if output in OUTPUTS for name in OUTPUTS[output].wanted}
    for divergence, _ in request.divergences:
        if divergence.one_pass is not None:
            names |= {name for name, weight in zip(("forward", "reverse"), divergence.one_pass, strict=True) if weight}
    return sum(WANTED[name] for name in names)


def output_dtype(name: str, work: torch.dtype) -> torch.dtype:
    """The dtype of an output computed in `work`."""
    return (OUTPUTS[name].dtype or work) if name in OUTPUTS else work


def per_label(name: str) -> bool:
    """Whether an output has one number per label rather than per row."""
    return name in OUTPUTS and OUTPUTS[name].per_label


def differentiable(name: str) -> bool:
    """Whether an output has a gradient."""
    return name in DIVERGENCES or OUTPUTS[name].gradient is not None


def values(request: Request, s: Statistics, sums: Tensor) -> list[Tensor]:
    """The outputs of a request, [rows] or [rows, K] each; `sums` [rows, len(request.compared), 3]."""
    compared = iter(sums.unbind(1))
    result = []
    for name in request.outputs:
        if name in OUTPUTS:
            result.append(OUTPUTS[name].value(s))
        else:
            divergence = DIVERGENCES[name]
            result.append(s.divergence(divergence, next(compared) if divergence.one_pass is None else None)[0])
    return result


def coefficients(
    request: Request, s: Statistics, sums: Tensor, upstream: dict[str, Tensor]
) -> tuple[Coefficients, list[tuple[Divergence, float]]]:
    """Coefficients for the outputs that have an upstream gradient ([rows] or [rows, K]), and the divergences of the
    gains."""
    terms = [pair for pair in request.divergences if pair[0].name in upstream]
    rows = sums.shape[0]
    c = Coefficients(torch.zeros(rows, COEFFICIENTS + len(terms), dtype=torch.float64, device=sums.device))
    for name, g in upstream.items():
        if name in OUTPUTS and (gradient := OUTPUTS[name].gradient) is not None:
            gradient(s, g, c)
    compared = [divergence for divergence, _ in request.compared]
    for i, (divergence, _) in enumerate(terms):
        g = upstream[divergence.name]
        own = sums[:, compared.index(divergence)] if divergence.one_pass is None else None
        _, dlp, dlq = s.divergence(divergence, own)
        c.add(COEFFICIENTS + i, g)
        c.add(0, -g * dlp)
        c.add(5, -g * dlq)
    return c, terms
