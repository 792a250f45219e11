"""Plain torch, any floating dtype, any device: the same three operations written to be read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdiv.backends import Backend
from fastdiv.divergences import DIVERGENCES
from fastdiv.sources import transform
from fastdiv.statistics import COEFFICIENTS, STATE, WANTED, Prepared, Sums
from fastdiv.tiles import Rows, Terms, Tile

_ELEMENTS = 1 << 21  # of one [rows, columns] temporary; about a dozen are alive at once


def _read(rows: Rows, part: slice, work: torch.dtype) -> Tensor:
    """Transformed logits [rows, columns] of a part of the rows."""
    raw = rows.tensor[rows.unravelled(part)]
    return transform(raw.to(work), rows.transform.scale, rows.transform.softcap)


def _taken_back(rows: Rows, part: slice, gradient: Tensor, logits: Tensor, inverse_temperature: Tensor) -> Tensor:
    """A gradient with respect to z taken back through temperature and transform of `rows`; 0 at -inf logits.

    The softcap's slope 1 / cosh^2 comes from its argument: near saturation 1 - tanh^2 has no digits.
    """
    slope = inverse_temperature[:, None] * rows.transform.scale
    if rows.transform.softcap:
        raw = rows.tensor[rows.unravelled(part)].to(logits.dtype)
        e = torch.exp(-2.0 * (raw * rows.transform.scale / rows.transform.softcap).abs())
        slope = slope * (4.0 * e / (1.0 + e) ** 2)
    return torch.where(logits == -torch.inf, 0.0, gradient * slope)


def _write(rows: Rows, part: slice, value: Tensor) -> None:
    rows.tensor[rows.unravelled(part)] = value.to(rows.tensor.dtype)


def _parts(tile: Tile) -> Iterator[slice]:
    step = max(1, _ELEMENTS // tile.columns)
    rows = tile.tokens.inverse_temperature.numel()
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _offset(maximum: Tensor) -> Tensor:
    """An offset that may be subtracted: a row of -inf so far has none yet."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def _shifted(x: Tensor, maximum: Tensor) -> Tensor:
    return x - _offset(maximum).to(x.dtype)[:, None]


def _log_ratio(x: Tensor, y: Tensor, max_x: Tensor, max_y: Tensor, norm: Tensor, it: Tensor) -> Tensor:
    """z_x - z_y - norm.  Where the maxima are close, x - y keeps digits that x - max_x and y - max_y have each lost;
    where they are far apart it is the other way round."""
    max_x, max_y = (_offset(m).to(x.dtype)[:, None] for m in (max_x, max_y))
    apart = max_x - max_y  # rounded like x - y: where both are at their maxima nothing is left of them
    far = (apart * it.to(x.dtype)[:, None]).abs() > 8.0
    difference = (x - torch.where(far, max_x, 0.0)) - (y - torch.where(far, max_y, 0.0)) - torch.where(far, 0.0, apart)
    return difference * it.to(x.dtype)[:, None] - norm.to(x.dtype)[:, None]


def _settled(x: Tensor, maximum: Tensor, tail: Tensor, it: Tensor) -> Tensor:
    """`x` with the row's maximum as its normaliser has it, where the others' exponentials together are below a half.

    A product of hidden states that was formed once more, in another shape, may have rounded it otherwise; where one
    entry has most of the mass the digits of its gradient are in that difference.
    """
    alone = (tail < 0.5) & (maximum > -torch.inf)
    cut = torch.where(alone, maximum - 0.25 / it, torch.inf).to(x.dtype)[:, None]
    return torch.where(x > cut, maximum.to(x.dtype)[:, None], x)


def _sum(x: Tensor) -> Tensor:
    return x.sum(1, dtype=torch.float64)


def _times(p: Tensor, z: Tensor) -> Tensor:
    """p z with 0 (-inf) = 0."""
    return torch.where(p == 0.0, 0.0, p * z)


class _Growing:
    """A row's normaliser while columns arrive: (max, tail) of the state, and the factor that old sums fade by."""

    def __init__(self, x: Tensor, maximum: Tensor, tail: Tensor, inverse_temperature: Tensor) -> None:
        new = torch.maximum(maximum, torch.where(x.isnan(), -torch.inf, x).amax(1).double())
        self.old_total = torch.where(maximum == -torch.inf, tail, 1.0 + tail)
        self.shift = torch.where(maximum == -torch.inf, 0.0, (new - maximum) * inverse_temperature)
        self.shift = torch.where(new == maximum, 0.0, self.shift)
        self.raised = new > maximum
        self.maximum = new
        self.z = _shifted(x, new) * inverse_temperature.to(x.dtype)[:, None]
        self.p = torch.exp(self.z)
        self.top = (x == new.to(x.dtype)[:, None]) & (new > -torch.inf)[:, None]
        old_tail = torch.where(self.raised, self.old_total * torch.exp(-self.shift), tail)
        old_tail = torch.where(new == torch.inf, torch.nan, old_tail)
        beside = self.beside_maximum(self.p)
        self.own = beside + self.raised.double()  # the sum over this tile
        self.tail = old_tail + beside
        self.total = torch.where(new == -torch.inf, self.tail, 1.0 + self.tail)

    def beside_maximum(self, p: Tensor) -> Tensor:
        """The sum over this tile, leaving out the one maximum that the state counts apart."""
        return _sum(torch.where(self.top, 0.0, p)) + (_sum(self.top) - self.raised.double())


def _fade(x: Tensor, factor: Tensor, least: float) -> Tensor:
    """x * factor; below `least` the factor removes even an infinite x, as in csrc/row_state.h."""
    return torch.where(factor < least, 0.0, x * factor)


def _balance(total_p: Tensor, total_q: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """(k, log k), float64: with p scaled by k both models weigh about the same, and no large terms cancel."""
    ratio = total_q / total_p
    k = torch.where((ratio > 1e-30) & (ratio < 1e30), ratio, 1.0).to(work).double()
    return k, torch.log(k)


def _shift_kl(kl: Tensor, a: Tensor, b: Tensor, sum_p: Tensor, sum_q: Tensor, least: float) -> Tensor:
    """sum q phi(d) after the log-offsets of p and q moved by a and b."""
    s, fade_b = b - a, torch.exp(-b)
    growth = torch.where(s.abs() < 1.0, fade_b * torch.expm1(s), torch.exp(-a) - fade_b)
    moved = _fade(kl, fade_b, least) + growth * sum_p - _fade(s * sum_q, fade_b, least)
    return torch.where((a == 0.0) & (b == 0.0), kl, moved)


class _Compared:
    """p, q and d = log p - log q against finished normalisers."""

    def __init__(self, x: Tensor, y: Tensor, state: dict[str, Tensor], it: Tensor) -> None:
        norm_x, norm_y = torch.log1p(state["tail"]), torch.log1p(state["teacher_tail"])
        self.p = torch.exp(_log_probs(x, state["max"], norm_x, it))
        self.q = torch.exp(_log_probs(y, state["teacher_max"], norm_y, it))
        nothing = torch.maximum(-state["max"], -state["teacher_max"]) == torch.inf
        norm = torch.where(nothing, torch.nan, norm_x - norm_y)
        self.d = _log_ratio(x, y, state["max"], state["teacher_max"], norm, it)


def _log_probs(x: Tensor, maximum: Tensor, log_norm: Tensor, it: Tensor) -> Tensor:
    norm = torch.where(maximum == -torch.inf, torch.nan, log_norm).to(x.dtype)
    return _shifted(x, maximum) * it.to(x.dtype)[:, None] - norm[:, None]


def _add_labels(
    tile: Tile,
    prepared: Prepared,
    part: slice,
    x: Tensor,
    dx: Tensor,
    p: Tensor,
    state: dict[str, Tensor],
    log_norm: Tensor,
) -> Tensor:
    """dx + sum_k gain_k ([v = label_k] - p); at the labels themselves 1 - p = -expm1(log p) keeps its digits."""
    labels, gains = prepared.labels[part], prepared.gains[part]
    total = gains.sum(1, keepdim=True)
    at = labels - tile.first_column
    here = (at >= 0) & (at < tile.columns)
    inside = at.clamp(0, tile.columns - 1)
    # Labels outside the tile write into a column of their own, which is dropped.
    place = torch.where(here, at, tile.columns)
    same = gains.new_zeros(x.shape[0], tile.columns + 1).scatter_add(1, place, gains).gather(1, inside)
    it = tile.tokens.inverse_temperature[part].double()[:, None]
    lp = (x.gather(1, inside).double() - state["max"][:, None]) * it - log_norm[:, None]
    exact = dx.gather(1, inside) - (same * torch.expm1(lp) + (total - same) * torch.exp(lp)).to(dx.dtype)
    spare = torch.cat([dx - total * p, dx[:, :1]], 1)
    return spare.scatter(1, place, exact)[:, :-1]


class Reference(Backend):
    """Row operations in plain torch, in float64 for float64 inputs and in float32 for everything else."""

    name = "reference"

    def refuses(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why inputs of this dtype and device cannot be taken, or None."""
        return None if dtype.is_floating_point else f"it takes floating dtypes, got {dtype}"

    def accumulate(self, tile: Tile, wanted: int, state: Tensor, label_logits: Tensor) -> None:
        for part in _parts(tile):
            s = dict(zip(STATE, state[part].unbind(1), strict=True))
            it = tile.tokens.inverse_temperature[part].double()
            x = _read(tile.student, part, tile.tokens.inverse_temperature.dtype)
            grown = _Growing(x, s["max"], s["tail"], it)
            a, fade, total = grown.shift, torch.exp(-grown.shift), grown.old_total
            if wanted & WANTED["argmax"]:
                local = torch.where(x.isnan(), -torch.inf, x).argmax(1) + tile.first_column
                s["argmax"] = torch.where(grown.raised, local.double(), s["argmax"])
            s["second"] = fade * (s["second"] - 2.0 * a * s["first"] + a * a * total)
            s["first"] = fade * (s["first"] - a * total)
            if wanted & WANTED["first"]:
                s["first"] = s["first"] + _sum(_times(grown.p, grown.z))
            if wanted & WANTED["second"]:
                s["second"] = s["second"] + _sum(_times(_times(grown.p, grown.z), grown.z))
            if wanted & WANTED["squares"]:
                old = torch.where(total == 0.0, 0.0, fade * fade * (1.0 + s["squares"]))
                s["squares"] = torch.where(grown.raised, old, s["squares"]) + grown.beside_maximum(grown.p**2)
            if wanted & WANTED["sum"]:
                s["sum"] = s["sum"] + _sum(x)
            s["max"], s["tail"] = grown.maximum, grown.tail
            if tile.teacher:
                y = _read(tile.teacher, part, tile.tokens.inverse_temperature.dtype)
                taught = _Growing(y, s["teacher_max"], s["teacher_tail"], it)
                s["teacher_max"], s["teacher_tail"] = taught.maximum, taught.tail
                if wanted & (WANTED["forward"] | WANTED["reverse"]):
                    k, log_k = _balance(grown.total, taught.total, x.dtype)
                    b, p, q = taught.shift, grown.p * k.to(x.dtype)[:, None], taught.p
                    d = _log_ratio(x, y, grown.maximum, taught.maximum, -log_k, it)
                    none, still = torch.zeros((), dtype=x.dtype, device=x.device), torch.zeros_like(it)
                    least = torch.finfo(x.dtype).tiny
                    forward = _shift_kl(s["forward"], a, b, total, taught.old_total, least)
                    reverse = _shift_kl(s["reverse"], b, a, taught.old_total, total, least)
                    own_p, own_q = k * grown.own, taught.own
                    own = _sum(DIVERGENCES["forward_kl"].value(d, p, q, none))
                    s["forward"] = forward + _shift_kl(own, log_k, still, own_p, own_q, least)
                    own = _sum(DIVERGENCES["reverse_kl"].value(d, p, q, none))
                    s["reverse"] = reverse + _shift_kl(own, still, log_k, own_q, own_p, least)
            state[part] = torch.stack([s[name] for name in STATE], 1)
            self._labels(tile, part, x, label_logits)

    def _labels(self, tile: Tile, part: slice, x: Tensor, label_logits: Tensor) -> None:
        at = tile.tokens.labels[part] - tile.first_column
        here = (at >= 0) & (at < tile.columns)
        found = x.gather(1, at.clamp(0, tile.columns - 1))
        label_logits[part] = torch.where(here, found, label_logits[part])

    def compare(self, tile: Tile, terms: Terms, sums: Sums, rank: bool) -> None:
        for part in _parts(tile):
            x = _read(tile.student, part, tile.tokens.inverse_temperature.dtype)
            if rank:
                for k in range(sums.rank.shape[1]):
                    sums.rank[part, k] += (x > sums.label_logits[part, k, None]).sum(1)
            if not terms or tile.teacher is None:
                continue
            s = dict(zip(STATE, sums.state[part].unbind(1), strict=True))
            c = _Compared(
                x,
                _read(tile.teacher, part, tile.tokens.inverse_temperature.dtype),
                s,
                tile.tokens.inverse_temperature[part].double(),
            )
            for i, (divergence, parameter) in enumerate(terms):
                a = torch.full((), parameter, dtype=x.dtype, device=x.device)
                for j, function in enumerate((divergence.value, divergence.dlp, divergence.dlq)):
                    sums.compared[part, i, j] += _sum(function(c.d, c.p, c.q, a))

    def gradient(
        self, tile: Tile, prepared: Prepared, state: Tensor, student: Rows | None, teacher: Rows | None
    ) -> None:
        for part in _parts(tile):
            s = dict(zip(STATE, state[part].unbind(1), strict=True))
            it, c = tile.tokens.inverse_temperature[part], prepared.c[part]
            x = _settled(_read(tile.student, part, it.dtype), s["max"], s["tail"], it.double())
            log_norm = torch.log1p(s["tail"])
            lp = _log_probs(x, s["max"], log_norm, it.double())
            p = torch.exp(lp)
            c0, c1, c2, c3, c4, e0 = (v[:, None] for v in c[:, :COEFFICIENTS].unbind(1))
            p_lp = _times(p, lp)
            dx = p * (c0 + c3 * p) + c1 * p_lp + c2 * _times(p_lp, lp) + c4
            if tile.teacher:
                y = _read(tile.teacher, part, it.dtype)
                y = _settled(y, s["teacher_max"], s["teacher_tail"], it.double())
                pair = _Compared(x, y, s, it.double())
                dy = torch.where(e0 == 0.0, 0.0, e0 * pair.q)  # nothing of the teacher's, whatever it is
                for i, (divergence, parameter) in enumerate(prepared.terms):
                    a = torch.full((), parameter, dtype=x.dtype, device=x.device)
                    g = c[:, COEFFICIENTS + i, None]
                    dx = dx + g * divergence.dlp(pair.d, pair.p, pair.q, a)
                    dy = dy + g * divergence.dlq(pair.d, pair.p, pair.q, a)
            dx = _add_labels(tile, prepared, part, x, dx, p, s, log_norm)
            # Both gradients are formed before either is stored: a target may be the logits' own memory.
            dx = _taken_back(tile.student, part, dx, x, it)
            if teacher is not None and tile.teacher:
                _write(teacher, part, _taken_back(tile.teacher, part, dy, y, it))
            if student is not None:
                _write(student, part, dx)
