"""From sums over the vocabulary to outputs, and from upstream gradients to the coefficients of the row gradient.

Backends sum (`STATE`) and apply coefficients.  What lies between stands here as torch on [rows] tensors, its values in
`fastdiv.rowwise`; the Triton backend does the same in a launch (`scalars.py`).  Notation: z = logit / temperature, m
its maximum, p = softmax(z), lp = log p, H the entropy.

A row gradient is dL/dz = p (c0 + c1 lp + c2 lp^2 + c3 p) + c4 + sum of gain * dlp + label terms for the student, and
e0 q + sum of gain * dlq for the teacher: with L = sum l(lp), h = dl/dlp, dL/dz = h - p sum(h) is linear in these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastdiv import rowwise
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


_EMPTY = torch.tensor([-torch.inf if name in ("max", "teacher_max") else 0.0 for name in STATE], dtype=torch.float64)


def empty_state(rows: int, device: torch.device) -> Tensor:
    """The state [rows, len(STATE)] before any column was seen."""
    if device.type == "cpu":
        return _EMPTY.expand(rows, -1).clone(memory_format=torch.contiguous_format)
    state = torch.zeros(rows, len(STATE), dtype=torch.float64, device=device)
    state[:, STATE.index("max")] = state[:, STATE.index("teacher_max")] = -torch.inf
    return state


@dataclass  # not frozen, which costs more than the fields are worth
class Tokens:
    """What belongs to n rows beside their logits."""

    inverse_temperature: Tensor  # [n]
    labels: Tensor  # [n, K] int64, in whole-vocabulary numbers
    ignore_index: int
    mask: Tensor | None  # [n] bool, for a backend that skips rows itself; else all rows take part
    vocabulary: int
    clean: bool = False
    """Known: every label is an id, and none is ignored."""

    def part(self, rows: slice) -> Tokens:
        """Those of some rows."""
        if rows == slice(0, self.labels.shape[0]):
            return self
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, inverse_temperature=self.inverse_temperature[rows], labels=self.labels[rows], mask=mask)

    @property
    def ignored(self) -> Tensor:
        """[n, K]."""
        return self.labels == self.ignore_index

    @property
    def active(self) -> Tensor:
        """[n] rows that take part: not masked, and with a label that counts if they have labels."""
        every = torch.ones_like(self.inverse_temperature, dtype=torch.bool) if self.mask is None else self.mask
        return every & (~self.ignored).any(1) if self.labels.shape[1] else every

    @property
    def invalid(self) -> Tensor:
        """[n, K] labels that are neither ids nor ignored."""
        return ~self.ignored & ((self.labels < 0) | (self.labels >= self.vocabulary))


@dataclass  # not frozen, which costs more than the fields are worth
class Sums:
    """What one look or two at the logits of n rows leave."""

    state: Tensor  # [n, len(STATE)] float64
    label_logits: Tensor  # [n, K], NaN at labels outside the vocabulary
    compared: Tensor  # [n, C, 3] float64: value, dlp, dlq of each divergence that needs a second look
    rank: Tensor  # [n, K] int64; meaningless unless rank is an output

    def part(self, rows: slice) -> Sums:
        """Those of some rows."""
        if rows == slice(0, self.state.shape[0]):
            return self
        return Sums(self.state[rows], self.label_logits[rows], self.compared[rows], self.rank[rows])


_PLACES = {name: place for place, name in enumerate(STATE)}


class Statistics:
    """The finished numbers of some rows, float64 [rows] each, computed when asked for by `fastdiv.rowwise`."""

    def __init__(self, tokens: Tokens, sums: Sums) -> None:
        self._state = sums.state
        self.inverse_temperature = tokens.inverse_temperature.double()
        self.vocabulary = tokens.vocabulary
        self.labels = tokens.labels
        self.label_logits = sums.label_logits
        self.rank = sums.rank

    def __getattr__(self, name: str) -> Tensor:
        if name not in _PLACES:
            raise AttributeError(name)
        column = self._state.select(1, _PLACES[name])
        setattr(self, name, column)
        return column

    @cached_property
    def log_norm(self) -> Tensor:
        return rowwise.log_norm(self.max, self.tail)

    @cached_property
    def teacher_log_norm(self) -> Tensor:
        return rowwise.log_norm(self.teacher_max, self.teacher_tail)

    @cached_property
    def entropy(self) -> Tensor:
        return rowwise.entropy(self.max, self.tail, self.first)

    @cached_property
    def varentropy(self) -> Tensor:
        return rowwise.varentropy(self.max, self.tail, self.first, self.second)

    @cached_property
    def log_sum_sq_probs(self) -> Tensor:
        return rowwise.log_sum_sq_probs(self.max, self.tail, self.squares)

    @cached_property
    def log_prob(self) -> Tensor:
        """[rows, K]."""
        maximum, tail = (self._state.narrow(1, _PLACES[name], 1) for name in ("max", "tail"))
        it = self.inverse_temperature[:, None]
        return rowwise.log_prob(maximum, tail, it, self.label_logits)

    @cached_property
    def logsumexp(self) -> Tensor:
        return rowwise.logsumexp(self.max, self.tail, self.inverse_temperature)

    @cached_property
    def forward_kl(self) -> Tensor:
        return rowwise.kl(self.forward, self.teacher_tail, self.log_norm - self.teacher_log_norm)

    @cached_property
    def reverse_kl(self) -> Tensor:
        return rowwise.kl(self.reverse, self.tail, self.teacher_log_norm - self.log_norm)

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
    "logsumexp": Output(lambda s: s.logsumexp, _logsumexp_gradient),
    "log_sum_sq_probs": Output(lambda s: s.log_sum_sq_probs, _log_sum_sq_probs_gradient, ("squares",)),
    "varentropy": Output(lambda s: s.varentropy, _varentropy_gradient, ("first", "second")),
    "max_log_prob": Output(lambda s: -s.log_norm, _max_log_prob_gradient, ("argmax",)),
    "mean_logit": Output(lambda s: s.sum / s.vocabulary * s.inverse_temperature, _mean_logit_gradient, ("sum",)),
    "argmax": Output(lambda s: s.argmax, None, ("argmax",), dtype=torch.int64),
    "is_top1": Output(lambda s: s.labels == s.argmax[:, None], None, ("argmax",), per_label=True, dtype=torch.bool),
    "rank": Output(lambda s: s.rank, None, per_label=True, dtype=torch.int64),
}
"""Every output of one model; a divergence's name is an output too."""


@lru_cache(maxsize=256)
def wanted(outputs: tuple[str, ...]) -> int:
    """The extra sums that outputs need, as bits of `WANTED`."""
    names: set[str] = set()
    for output in outputs:
        if output in OUTPUTS:
            names.update(OUTPUTS[output].wanted)
        elif (kls := DIVERGENCES[output].one_pass) is not None:
            names.update(name for name, weight in zip(("forward", "reverse"), kls, strict=True) if weight)
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


@dataclass(frozen=True)
class Prepared:
    """The linear map from a row's p and log p to its gradient, for given upstream gradients."""

    c: Tensor  # [n, COEFFICIENTS + terms] in the work dtype: c0 c1 c2 c3 c4 e0, then a gain per term
    labels: Tensor  # [n, G] int64
    gains: Tensor  # [n, G] in the work dtype
    terms: list[tuple[Divergence, float]]


def finish(request: Request, tokens: Tokens, sums: Sums, skipped: bool = False) -> list[Tensor]:
    """The outputs of a request, [n] or [n, K] each; 0 at ignored labels and, where rows were `skipped`, at those."""
    s, compared = Statistics(tokens, sums), iter(sums.compared.unbind(1) if request.compared else ())
    absent = ~tokens.active if skipped else None
    result = []
    for name in request.outputs:
        if name in OUTPUTS:
            value = OUTPUTS[name].value(s)
        else:
            divergence = DIVERGENCES[name]
            value = s.divergence(divergence, next(compared) if divergence.one_pass is None else None)[0]
        if per_label(name) and not tokens.clean:
            value = value.masked_fill(tokens.ignored, 0)
        if absent is not None:
            value = value.masked_fill(absent[:, None] if per_label(name) else absent, 0)
        result.append(value.to(output_dtype(name, tokens.inverse_temperature.dtype)))
    return result


def prepare(request: Request, tokens: Tokens, sums: Sums, upstream: dict[str, Tensor]) -> Prepared:
    """Coefficients for the outputs that have an upstream gradient, [n] or [n, K] each."""
    terms = [pair for pair in request.divergences if pair[0].name in upstream]
    s, work = Statistics(tokens, sums), tokens.inverse_temperature.dtype
    c = Coefficients(sums.state.new_zeros(sums.state.shape[0], COEFFICIENTS + len(terms)))
    for name, g in upstream.items():
        if name in OUTPUTS and (gradient := OUTPUTS[name].gradient) is not None:
            gradient(s, usable(name, g.double(), tokens), c)
    compared = [divergence for divergence, _ in request.compared]
    for i, (divergence, _) in enumerate(terms):
        g = upstream[divergence.name].double()
        own = sums.compared[:, compared.index(divergence)] if divergence.one_pass is None else None
        _, dlp, dlq = s.divergence(divergence, own)
        c.add(COEFFICIENTS + i, g)
        c.add(0, -g * dlp)
        c.add(5, -g * dlq)
    labels, gains = c.labels[0] if c.labels else tokens.labels[:, :0], c.gains[0] if c.gains else sums.state[:, :0]
    if len(c.labels) > 1:
        labels, gains = torch.cat(c.labels, 1), torch.cat(c.gains, 1)
    return Prepared(c.c.to(work), labels, gains.to(work), terms)


def usable(name: str, g: Tensor, tokens: Tokens) -> Tensor:
    """Upstream of a per-label output: 0 at ignored labels, NaN (so that the row shows it) at impossible ones."""
    if not per_label(name):
        return g
    if tokens.clean:
        return g.reshape(tokens.labels.shape)
    return g.reshape(tokens.labels.shape).masked_fill(tokens.ignored, 0.0).masked_fill(tokens.invalid, torch.nan)
